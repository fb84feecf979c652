"""Constraints that are malformed, wrong, or would take minutes or gigabytes: 400, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from service.api.grammar_schemas import MAX_EXPRESSION_BYTES, MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, Constraint
from service.api.grammars import GrammarChecker
from service.api.matchers import Matchers
from service.errors import InvalidRequest
from tests.api.support import RunningService, assert_error
from tests.models import VOCAB_SIZE, build_tokenizer


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema} | fields}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


SCHEMA_PARAM = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "must be 'text', 'json_object' or 'json_schema'",
        ),
        ({"response_format": "json_object"}, "response_format", "must be"),
        ({"response_format": {}}, "response_format.type", "is missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema needs it"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "goes with type json_schema only",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, None, "name: is missing"),
        (json_schema([1]), SCHEMA_PARAM, "must be a JSON schema"),
        (json_schema({}, name="a b"), "response_format.json_schema.name", "pattern"),
        (json_schema({}, strict="yes"), "response_format.json_schema.strict", "must be a valid boolean"),
        (json_schema({}, colour=1), "response_format.json_schema.colour", "unknown field"),
        (json_schema(nested(65)), SCHEMA_PARAM, "more than 64 deep"),
        (json_schema({"enum": [f"value {i}" for i in range(6000)]}), SCHEMA_PARAM, f"at most {MAX_SCHEMA_BYTES}"),
        (json_schema({"const": "x" * 5000}), SCHEMA_PARAM, f"string of more than {MAX_EXPRESSION_BYTES} bytes"),
        ({"regex": ""}, "regex", "at least 1 character"),
        ({"regex": 5}, "regex", "must be a valid string"),
        ({"regex": "\u00e9" * 3000}, "regex", f"has 6000 bytes; at most {MAX_EXPRESSION_BYTES}"),
        ({"grammar": "x" * 20000}, "grammar", f"at most {MAX_GRAMMAR_BYTES}"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar", "send one of them"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "send one of them"),
    ],
)
def test_a_malformed_constraint_is_400_before_anything_is_done(
    running: RunningService, fields: dict[str, Any], param: str | None, message: str
) -> None:
    response = running.client.post("/generate", json={"prompt": "The sea", "max_tokens": 9} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert param in (None, error["param"]), error
    assert re.search(message, error["message"]), error


RULES = "\n".join(f'a{i}: a{i + 1} "x"?' for i in range(700))
HARMFUL: dict[str, tuple[dict[str, Any], str]] = {
    "look-ahead": ({"regex": "a(?=b)"}, "look-around"),
    "back reference": ({"regex": r"(a)\1"}, "backreferences"),
    "open bracket": ({"regex": "(a"}, "unclosed group"),
    "repeated repeat": ({"regex": "foo**" + "(" * 2000}, "cannot be compiled"),
    "nothing matches": ({"regex": r"[^\s\S]"}, "NoExtension"),
    "2,000 parentheses": ({"regex": "(" * 2000 + "a" + ")" * 2000}, "cannot be compiled"),
    "no start": ({"grammar": 'stop: "a"'}, "start"),
    "only itself": ({"grammar": "start: start"}, "NoExtension"),
    "lark parentheses": ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "too deeply nested"),
    "a file": ({"grammar": '%import "/etc/passwd"\nstart: "a"'}, "cannot be compiled"),
    "a chain of rules": ({"grammar": f'start: a0\n{RULES}\na700: "b"'}, "too deep"),
    "a chain of terminals": (
        {"grammar": f'start: a0\n{RULES}\na700: "b"'.replace("a", "A").replace("stArt", "start")},
        "",
    ),
    "2 ** 500 letters": (
        {"grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(500)) + '\nA500: "b"'},
        "takes more than 0.5 s or 32 MiB",
    ),
    "not a schema": (json_schema({"type": "strange"}), "strange"),
    "never": (json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "nsatisfiable"),
    "unknown keyword": (json_schema({"not": {"type": "string"}}), "Unimplemented keys"),
    "unknown keyword, lenient": (json_schema({"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented keys"),
    "a reference to itself": (json_schema({"$ref": "#"}), "NoExtension"),
    "references in a ring": (
        json_schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        "NoExtension",
    ),
    "a remote reference": (json_schema({"$ref": "http://127.0.0.1:9/x.json"}), "does not fetch"),
    "a reference to a file": (json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "100,000 remainders": (json_schema({"type": "integer", "multipleOf": 99991}), "more than 0.5 s or 32 MiB"),
    "26 patterns at once": (
        json_schema({"allOf": [{"type": "string", "pattern": f"(.*{chr(97 + i)}.*){{{i + 1}}}"} for i in range(26)]}),
        "more than 0.5 s or 32 MiB",
    ),
    "3,000 optional properties": (
        json_schema({"type": "object", "properties": {f"k{i}": {} for i in range(3000)}}),
        "cannot be compiled",
    ),
    "8 ** 12 choices": (
        json_schema(
            {
                "allOf": [
                    {"anyOf": [{"type": "object", "properties": {f"k{i}{j}": {"type": "string"}}} for j in range(8)]}
                    for i in range(12)
                ]
            }
        ),
        "too large",
    ),
}


@pytest.mark.usefixtures("still_good")
@pytest.mark.parametrize("name", HARMFUL)
def test_a_grammar_that_cannot_be_served_is_400_with_its_reason(running: RunningService, name: str) -> None:
    fields, message = HARMFUL[name]
    response = running.client.post("/generate", json={"prompt": "The sea", "max_tokens": 9} | fields)
    code = response.json()["error"]["code"]
    assert code in ("invalid_grammar", "grammar_limit")
    assert_error(response, 400, param=next(iter(fields)), code=code, message=message)
    assert response.json()["error"]["message"].isprintable()


@pytest.mark.usefixtures("still_good")
@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "((.{1,300}a){1,300}b){1,300}"},
        {"regex": "(.*[ab].{20}){3}"},
        {"regex": "(x+x+)+y"},
        {"regex": "[ab]*a[ab]{300}"},
        {"grammar": "start: s\ns: s s s s | A | B | C\nA: /a+/\nB: /[ab]+/\nC: /a*b*/"},
        {"grammar": 'start: ((("a"|"b"){1000}){1000}){1000}'},
        json_schema({"enum": [f"value {i}" for i in range(3000)]}),
        json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 100000}),
        json_schema({"type": "string", "minLength": 100000}),
        json_schema(nested(63)),
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_a_grammar_that_is_large_in_theory_is_served_or_ends_with_its_reason(
    running: RunningService, fields: dict[str, Any]
) -> None:
    response = running.client.post("/generate", json={"prompt": "The sea", "max_tokens": 60, "seed": 1} | fields)
    assert response.status_code in (200, 400, 500)
    if response.status_code == 200:
        assert response.json()["finish_reason"] in ("stop", "length")
    else:
        assert response.json()["error"]["code"] in ("grammar_limit", "engine_error")


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("grammar_worker.py") for part in process.cmdline())
    except psutil.NoSuchProcess:  # what another test began has ended
        return False


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    tokenizer = build_tokenizer().backend_tokenizer
    checker = GrammarChecker(Matchers(tokenizer.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=[0]))
    yield checker
    checker.close()


def test_grammars_that_do_harm_do_not_hold_up_others(checker: GrammarChecker) -> None:
    harmful = HARMFUL["26 patterns at once"][0]["response_format"]["json_schema"]["schema"]

    async def work() -> list[Any]:
        await checker.check(Constraint("regex", "warm", "regex"))
        harm = Constraint("json_schema", json.dumps(harmful), "response_format")
        trials = [asyncio.create_task(checker.check(harm)) for _ in range(3)]
        await asyncio.sleep(0)
        await checker.check(Constraint("regex", "fine", "regex"))
        assert not any(trial.done() for trial in trials)
        return await asyncio.gather(*trials, return_exceptions=True)

    assert [type(result) for result in asyncio.run(work())] == [InvalidRequest] * 3


def test_a_grammar_that_was_tried_is_not_tried_again_and_a_process_that_is_gone_is_replaced(
    checker: GrammarChecker,
) -> None:
    async def work() -> None:
        known = set(workers())
        first = await checker.check(Constraint("regex", "a", "regex"))
        (worker,) = set(workers()) - known
        worker.kill()
        worker.wait()
        assert await checker.check(Constraint("regex", "a", "regex")) == first
        assert set(workers()) == known
        await checker.check(Constraint("regex", "b", "regex"))
        assert len(set(workers()) - known) == 1

    asyncio.run(work())


def test_a_process_that_ends_under_a_request_is_not_the_fault_of_the_grammar(checker: GrammarChecker) -> None:
    async def work() -> str:
        known = set(workers())
        await checker.check(Constraint("regex", "a", "regex"))
        (worker,) = set(workers()) - known
        worker.suspend()
        trial = asyncio.create_task(checker.check(Constraint("regex", "b+", "regex")))
        async with asyncio.timeout(60):
            while not any(map(waits_for_an_answer, asyncio.all_tasks())):
                await asyncio.sleep(0)
        worker.kill()
        return await trial

    assert "b+" in asyncio.run(work())


def waits_for_an_answer(task: asyncio.Task[Any]) -> bool:
    coroutine: Any = task.get_coro()
    while coroutine is not None and "_exchange" not in str(coroutine):
        coroutine = getattr(coroutine, "cr_await", None)
    return coroutine is not None
