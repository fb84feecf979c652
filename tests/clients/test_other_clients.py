"""Requests as programs send them that are no libraries to be installed for a test.

Sources: LiteLLM's `openai/` and `hosted_vllm/` providers, Open WebUI's connection check and chats, LangChain for
JavaScript, the load generator of vLLM, lm-evaluation-harness, and curl as the README of every server has it.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from tests.api.support import RunningService, sse_events
from tests.clients.conftest import KEY, MODEL

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
QUESTION = {"role": "user", "content": "Where is the sea?"}
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "LiteLLM, openai/": (
        CHATS,
        {
            "model": MODEL,
            "messages": [QUESTION],
            "temperature": 0.2,
            "max_tokens": 4,
            "user": "a",
            "metadata": {"a": "b"},
        },
        {"X-Stainless-Lang": "python", "X-Stainless-Raw-Response": "true"},
    ),
    "LiteLLM, hosted_vllm/, streamed": (
        CHATS,
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 4}
        | USAGE,
        {},
    ),
    "LiteLLM, text-completion-openai/": (
        COMPLETIONS,
        {"model": MODEL, "prompt": ["The sea"], "max_tokens": 4, "n": 2, "stream": False},
        {},
    ),
    "Open WebUI": (
        CHATS,
        {
            "model": MODEL,
            "messages": [{"role": "system", "content": "Be kind."}, QUESTION],
            "stream": True,
            "max_tokens": 4,
        },
        {
            "X-OpenWebUI-User-Name": "Ada",
            "X-OpenWebUI-User-Email": "ada@a.example",
            "HTTP-Referer": "https://a.example",
        },
    ),
    "Open WebUI, a title for a chat": (
        CHATS,
        {"model": MODEL, "messages": [QUESTION], "stream": False, "max_completion_tokens": 4},
        {},
    ),
    "LangChain for JavaScript": (
        CHATS,
        {"model": MODEL, "temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1}
        | {"messages": [QUESTION], "max_tokens": 4, **USAGE},
        {"User-Agent": "langchainjs-openai/1.0.0 (node)"},
    ),
    "the load generator of vLLM": (
        COMPLETIONS,
        {"model": MODEL, "prompt": "The sea", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 4}
        | {"logprobs": None, "ignore_eos": True, **USAGE},
        {},
    ),
    "lm-evaluation-harness": (
        COMPLETIONS,
        {
            "model": MODEL,
            "prompt": [[7, 8, 9], [10, 11]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
        }
        | {"echo": True},
        {},
    ),
    "aider": (
        CHATS,
        {"model": MODEL, "temperature": 0, "stream": True, "max_tokens": 4}
        | {"messages": [QUESTION, {"role": "assistant", "content": "Ok."}, {"role": "user", "content": "And now?"}]},
        {},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_request_of_this_shape_is_answered(served: RunningService, shape: str) -> None:
    route, body, headers = SHAPES[shape]
    response = served.client.post(route, json=body, headers=headers)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        assert len(response.json()["choices"]) == len(body.get("prompt", [""])) * body.get("n", 1)
        return
    chunks = sse_events(response.text)
    texts = [chunk for chunk in chunks if chunk["choices"]]
    assert texts[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    if "stream_options" in body:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["total_tokens"] > 0
        assert all(chunk["usage"] is None for chunk in texts)


def test_a_connection_is_checked_by_the_list_of_models(served: RunningService) -> None:
    response = served.client.get(
        "/v1/models", headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    )
    assert [model["id"] for model in response.json()["data"]] == [MODEL]


@pytest.mark.parametrize("content_type", [True, False], ids=["as JSON", "as a form"])
def test_curl_is_answered_or_told_what_is_missing(served: RunningService, content_type: bool) -> None:
    command = ["curl", "-s", f"{served.url}{CHATS}", "-H", f"Authorization: Bearer {KEY}"]
    command += ["-H", "Content-Type: application/json"] * content_type
    body = json.dumps({"messages": [QUESTION], "max_tokens": 2})
    try:
        done = subprocess.run([*command, "-d", body], capture_output=True, check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no curl here")
    answer = json.loads(done.stdout)
    assert "choices" in answer if content_type else "Content-Type: application/json" in answer["error"]["message"]
