"""Log-probabilities on every route, whole and streamed, against the model's own forward by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from service.api.logprobs import LogprobWriter, TokenScore, spell
from service.api.text import TextCodec
from service.engine.sequence import TokenLogprobs
from tests.api.support import CHAT_VOCAB_SIZE, RunningService, build_chat_tokenizer, sse_events
from tests.api.test_chat import MESSAGES, PROMPT_IDS
from tests.models import CONTEXT, build_model, build_tokenizer

GREEDY: dict[str, Any] = {"prompt": "The sea", "max_tokens": 12, "temperature": 0}
SAMPLED: dict[str, Any] = {"prompt": "The sea", "max_tokens": 12, "temperature": 1.5, "top_k": 20, "seed": 3}
TOLERANCE = 1e-4
"""Both compute in float32, in different orders; logits are below 20, and 1e-4 is 50 roundings of them."""


@pytest.fixture
def client(running: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def chat_client(chat: RunningService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def oracle(family: str, prompt_ids: Any, token_ids: list[int], **config: Any) -> Tensor:
    """Log-probabilities float32[len(token_ids), vocab] at each generated token."""
    with torch.inference_mode():
        logits: Tensor = build_model(family, **config)(torch.tensor([prompt_ids + token_ids])).logits[0]
    return logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]


@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_they_are_the_models_own_on_the_native_route(running: RunningService, fields: dict[str, Any]) -> None:
    answer = running.client.post("/generate", json=fields | {"logprobs": True, "top_logprobs": 5}).json()
    entries = answer["logprobs"]
    assert [entry["token_id"] for entry in entries] == answer["token_ids"]
    expected = oracle("faulty", build_tokenizer().encode(fields["prompt"]), answer["token_ids"])
    for entry, row in zip(entries, expected, strict=True):
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=TOLERANCE)
        top = row.topk(5)
        assert [one["token_id"] for one in entry["top_logprobs"]] == top.indices.tolist()
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(top.values.tolist(), abs=TOLERANCE)


def test_a_completion_has_the_form_of_openai(running: RunningService, client: openai.OpenAI) -> None:
    native = running.client.post("/generate", json=SAMPLED | {"logprobs": True, "top_logprobs": 3}).json()
    choice = client.completions.create(
        model="tiny", prompt="The sea", max_tokens=12, temperature=1.5, seed=3, logprobs=3, extra_body={"top_k": 20}
    ).choices[0]
    found = choice.logprobs
    assert found is not None
    assert choice.text == native["text"]
    assert found.tokens == [entry["token"] for entry in native["logprobs"]]
    assert found.token_logprobs == [entry["logprob"] for entry in native["logprobs"]]
    assert found.top_logprobs is not None
    for by_text, entry in zip(found.top_logprobs, native["logprobs"], strict=True):
        assert by_text == {one["token"]: one["logprob"] for one in [*entry["top_logprobs"], entry]}
        assert len(by_text) in (3, 4)
    assert found.text_offset is not None
    assert found.tokens is not None
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        # Bytes that might have begun a character are certain to be none only with the token after them.
        assert choice.text[offset:].lstrip("\ufffd").startswith(token) or token.startswith("bytes:")


def test_0_tells_of_the_sampled_token_only(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", **GREEDY, logprobs=0).choices[0].logprobs
    assert found is not None
    pairs = zip(found.tokens or [], found.token_logprobs or [], strict=True)
    assert found.top_logprobs == [{token: logprob} for token, logprob in pairs]


def test_without_the_field_there_are_none(running: RunningService, chat_client: openai.OpenAI) -> None:
    assert running.complete(**GREEDY).json()["choices"][0]["logprobs"] is None
    assert "logprobs" not in running.client.post("/generate", json=GREEDY).json()
    for logprobs in (None, False):
        answer = chat_client.chat.completions.create(model="talker", messages=MESSAGES, max_tokens=4, logprobs=logprobs)
        assert answer.choices[0].logprobs is None


def test_a_chat_has_the_form_of_openai(chat_client: openai.OpenAI) -> None:
    choice = chat_client.chat.completions.create(
        model="talker", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    spelled = b"".join(bytes(entry.bytes or []) for entry in content)
    assert spelled.decode(errors="replace") == choice.message.content
    first = oracle("llama", PROMPT_IDS, [0], vocab_size=CHAT_VOCAB_SIZE)[0]
    assert content[0].logprob == pytest.approx(first.max().item(), abs=TOLERANCE)
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)


def test_a_chat_without_a_number_has_no_others(chat_client: openai.OpenAI) -> None:
    choice = chat_client.chat.completions.create(model="talker", messages=MESSAGES, max_tokens=3, logprobs=True)
    logprobs = choice.choices[0].logprobs
    assert logprobs is not None
    assert [entry.top_logprobs for entry in logprobs.content or []] == [[], [], []]


@pytest.mark.parametrize("stop", [False, True], ids=["to-the-end", "stopped"])
def test_streamed_completions_tell_the_same_with_the_same_text(running: RunningService, stop: bool) -> None:
    fields = SAMPLED | {"logprobs": 2}
    text = running.complete(**fields).json()["choices"][0]["text"]
    fields |= {"stop": [text[4:6]]} if stop else {}
    whole = running.complete(**fields).json()["choices"][0]
    choices = [event["choices"][0] for event in sse_events(running.complete(**fields, stream=True).text)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for key, expected in whole["logprobs"].items():
        assert [value for choice in choices if choice["logprobs"] for value in choice["logprobs"][key]] == expected
    assert (len(whole["logprobs"]["tokens"]) < 12) == stop
    told = ""
    for choice in choices:
        told += choice["text"]
        assert all(offset <= len(told) for offset in (choice["logprobs"] or {"text_offset": []})["text_offset"])


def test_streamed_chats_tell_the_same(chat_client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "logprobs": True}
    whole = chat_client.chat.completions.create(model="talker", **fields, top_logprobs=2).choices[0]
    with chat_client.chat.completions.create(model="talker", **fields, top_logprobs=2, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    content = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert whole.logprobs is not None
    assert content == whole.logprobs.content


def test_streamed_native_events_tell_the_same(running: RunningService) -> None:
    fields = GREEDY | {"logprobs": True, "top_logprobs": 1}
    whole = running.client.post("/generate", json=fields).json()
    events = sse_events(running.client.post("/generate", json=fields | {"stream": True}).text)
    assert [entry for event in events for entry in event["logprobs"]] == whole["logprobs"]


def test_a_stop_string_takes_the_tokens_of_its_own_away(running: RunningService) -> None:
    whole = running.complete(**GREEDY, logprobs=0).json()["choices"][0]
    offsets = whole["logprobs"]["text_offset"]
    stop = whole["text"][offsets[5] : offsets[8]]
    assert stop
    cut = running.complete(**GREEDY, logprobs=0, stop=stop).json()["choices"][0]
    kept = [offset for offset in offsets if offset < whole["text"].index(stop)]
    assert cut["logprobs"]["text_offset"] == kept
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][: len(kept)]


def test_a_rule_of_chance_does_not_change_them(running: RunningService) -> None:
    forced = {"prompt": "The sea", "max_tokens": 3, "logit_bias": {"77": 100}, "logprobs": True}
    answer = running.client.post("/generate", json=forced).json()
    assert answer["token_ids"] == [77, 77, 77]
    expected = oracle("faulty", build_tokenizer().encode("The sea"), [77, 77, 77])[:, 77]
    assert [entry["logprob"] for entry in answer["logprobs"]] == pytest.approx(expected.tolist(), abs=TOLERANCE)


def byte_fallback_codec() -> TextCodec:
    names = ["<unk>", "▁the", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextCodec(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer),  # type: ignore[no-untyped-call]
        context_length=CONTEXT,
    )


def test_every_token_of_a_byte_level_vocabulary_is_spelled_in_its_bytes() -> None:
    tokenizer = build_chat_tokenizer()
    codec = TextCodec(tokenizer, context_length=CONTEXT)
    for byte in range(256):
        text, spelled = spell(codec, byte + 1)
        assert spelled == bytes([byte])
        assert text == (chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}")
    assert spell(codec, tokenizer.vocab["Ġthe"]) == (" the", b" the")
    assert spell(codec, 0) == ("<|endoftext|>", b"<|endoftext|>")


def test_tokens_of_a_sentencepiece_vocabulary_keep_their_blanks_and_bytes() -> None:
    codec = byte_fallback_codec()
    assert spell(codec, 1) == (" the", b" the")
    assert spell(codec, 2) == ("a", b"a")
    assert spell(codec, 3 + 0xE2) == ("bytes:\\xe2", b"\xe2")
    assert spell(codec, 3 + 0x41) == ("A", b"A")


def test_an_impossible_token_is_valid_json() -> None:
    score = TokenScore(5, 0, TokenLogprobs(-torch.inf, ((5, 0.0), (6, -torch.inf))))
    writer = LogprobWriter(TextCodec(build_tokenizer(), context_length=CONTEXT))
    for written in (writer.completion((score,)), writer.chat((score,)), writer.native((score,))):
        assert "Infinity" not in json.dumps(written)
        assert "-9999.0" in json.dumps(written)


def test_the_schema_takes_what_the_routes_take(running: RunningService) -> None:
    openapi = running.client.get("/openapi.json").json()
    fields = {"n": 2, "min_p": 0.1, "logit_bias": {"5": -1.5}, "min_tokens": 1, "stop_token_ids": [4], "seed": 1}
    bodies: dict[str, dict[str, Any]] = {
        "CompletionRequest": {"prompt": ["a", "b"], "logprobs": 3},
        "ChatRequest": {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3},
        "GenerateRequest": {"prompt": "a", "logprobs": True, "top_logprobs": 0, "ignore_eos": False},
    }
    for name, body in bodies.items():
        schema = openapi | {"$ref": f"#/components/schemas/{name}"}
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(body | fields, schema)
        for wrong in ({"n": 17}, {"top_p": 0}, {"logit_bias": [1]}, {"echo_all": True}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(body | wrong, schema)
