"""`response_format`, `regex` and `grammar` on every route, and a service without the extra for them."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from service import assembly
from service.reports.doctor import examine
from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, run_service, sse_events
from tests.api.test_chat import MESSAGES

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
"""Without space, which a model of random weights likes so much that its texts become too long."""
REGEX = "[a-z]{2,4} [0-9]+!"
FORMATS: dict[str, dict[str, Any]] = {
    "json_schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    },
    "regex": {"regex": REGEX},
    "grammar": {"grammar": 'start: ("yes" | "no") "."+'},
}


def follows(kind: str, text: str) -> bool:
    match kind:
        case "json_schema":
            try:
                jsonschema.validate(json.loads(text), SCHEMA)
            except (ValueError, jsonschema.ValidationError):
                return False
            return True
        case "regex":
            return re.fullmatch(REGEX, text) is not None
    return re.fullmatch(r"(yes|no)\.+", text) is not None


def texts_of(running: RunningService, route: str, **fields: Any) -> list[tuple[str, str]]:
    """Text and finish reason of each choice."""
    prompt = {"messages": MESSAGES} if "chat" in route else {"prompt": "The sea"}
    response = running.client.post(route, json={"max_tokens": 200, "top_k": 0} | prompt | fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    choices = answer.get("choices") or answer.get("results") or [answer]
    texts = [choice["message"]["content"] if "chat" in route else choice["text"] for choice in choices]
    return [(text, choice["finish_reason"]) for text, choice in zip(texts, choices, strict=True)]


def complete(running: RunningService, **fields: Any) -> httpx.Response:
    return running.client.post("/v1/completions", json={"prompt": "The sea", "max_tokens": 9, "seed": 1} | fields)


@pytest.mark.parametrize(
    ("kind", "route", "temperature"),
    [
        ("json_schema", "/v1/chat/completions", 1),
        ("json_schema", "/v1/completions", 2),
        ("json_schema", "/generate", 2),
        ("regex", "/v1/chat/completions", 2),
        ("regex", "/generate", 1),
        ("grammar", "/v1/completions", 1),
    ],
)
def test_texts_follow_what_is_asked_for_and_others_do_not(
    chat: RunningService, kind: str, route: str, temperature: float
) -> None:
    fields = {"n": 6, "seed": 3, "temperature": temperature, "max_tokens": 100}
    texts = texts_of(chat, route, **fields, **FORMATS[kind])
    finished = [text for text, reason in texts if reason == "stop"]
    assert len(finished) >= 3
    assert all(follows(kind, text) for text in finished)
    assert len(set(finished)) > 1
    free = texts_of(chat, route, **fields | {"max_tokens": 30}, response_format={"type": "text"})
    assert not any(follows(kind, text) for text, _ in free)


def test_a_json_object_is_one(chat: RunningService) -> None:
    format_ = {"response_format": {"type": "json_object"}, "logit_bias": {str(ord("}") + 1): 5}}
    finished = [text for text, reason in texts_of(chat, "/generate", n=16, seed=1, **format_) if reason == "stop"]
    assert len(finished) >= 3
    assert all(isinstance(json.loads(text), dict) for text in finished)


def test_a_text_that_is_cut_is_the_begin_of_one_that_follows(chat: RunningService) -> None:
    ((text, reason),) = texts_of(chat, "/v1/completions", max_tokens=3, regex="[a-z]{50}", seed=1)
    assert reason == "length"
    assert re.fullmatch("[a-z]{3,50}", text)


def test_a_stream_tells_the_same_text(chat: RunningService) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 200, "top_k": 0, "seed": 4, "temperature": 1.5, "stop": "!"}
    whole = chat.client.post("/v1/chat/completions", json=fields | FORMATS["regex"]).json()["choices"][0]
    response = chat.client.post("/v1/chat/completions", json=fields | FORMATS["regex"] | {"stream": True})
    choices = [event["choices"][0] for event in sse_events(response.text)]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    assert re.fullmatch(REGEX, whole["message"]["content"] + "!")  # the stop string is not part of the text


def test_logprobs_are_those_of_the_model_without_a_grammar(running: RunningService) -> None:
    fields = {"prompt": "The sea", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    free = running.client.post("/generate", json=fields).json()["logprobs"]
    bound = running.client.post("/generate", json=fields | {"regex": "[0-9]"}).json()
    assert bound["text"] in set("0123456789")
    assert bound["logprobs"][0]["top_logprobs"] == free[0]["top_logprobs"]
    assert bound["logprobs"][0]["logprob"] < free[0]["logprob"]


def test_neighbours_without_a_grammar_get_what_they_get_alone(running: RunningService) -> None:
    def ask(number: int) -> Any:
        fields = FORMATS["json_schema"] | {"n": 2} if number % 2 else {}
        body = {"prompt": "The sea", "max_tokens": 40, "seed": number} | fields
        return running.client.post("/generate", json=body).json()

    alone = [ask(number)["text"] for number in (0, 2)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, [0, 1, 2]))
    assert [together[0]["text"], together[2]["text"]] == alone


def test_the_openai_client_parses_an_answer(chat: RunningService) -> None:
    with openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="talker",
            messages=[{"role": "user", "content": "Who?"}],
            max_tokens=200,
            seed=2,
            response_format=FORMATS["json_schema"]["response_format"],
        )
    content = answer.choices[0].message.content
    assert content is not None
    assert follows("json_schema", content)


def test_any_text_and_a_grammar_do_not_contradict_each_other(running: RunningService) -> None:
    response = complete(running, regex="[ab]{3}", response_format={"type": "text"})
    assert re.fullmatch("[ab]{3}", response.json()["choices"][0]["text"])


def test_without_the_extra_the_load_works_and_the_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("llguidance" in problem.message for problem in examine({}).problems)
    monkeypatch.setitem(sys.modules, "llguidance", None)  # its import fails
    assert runpy.run_path(assembly.__file__)["has_grammars"] is False
    (problem,) = [problem for problem in examine({}).problems if "llguidance" in problem.message]
    assert (problem.severity, problem.remedy[:27]) == ("note", "pip install -e '.[grammar]'")


def test_without_the_extra_a_request_for_it_is_400_that_says_what_to_install(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "has_grammars", False)
    with run_service(SETTINGS | {"model": str(checkpoint("llama"))}) as running:
        refused = complete(running, regex="a")
        assert complete(running, response_format={"type": "text"}).status_code == 200
    message = r"without the extra `grammar`; leave it out, or let the operator run: pip install -e '\.\[grammar\]'"
    assert_error(refused, 400, param="regex", code="not_supported", message=message)
