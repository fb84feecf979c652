"""Random texts under grammars, token by token, against `jsonschema`, `re` and words counted by hand."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel

from service.api.grammar_schemas import Constraint
from service.api.matchers import GrammarMatcher, Matchers
from service.errors import GrammarError
from tests.models import VOCAB_SIZE, build_tokenizer

TOKENIZER = build_tokenizer().backend_tokenizer
MATCHERS = Matchers(TOKENIZER.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=[0])
MAX_TOKENS = 3000
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", 3, None, {"a": [1, 2]}, "\u00e9\u4e2d\U0001f600"]},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$", "maxLength": 9},
    "any of": {"anyOf": [{"type": "number", "minimum": -1, "maximum": 1}, {"const": "none"}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30, "multipleOf": 4}]},
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/node"}, "value": {"type": "integer", "maximum": 9}},
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "format": {"type": "string", "format": "date-time"},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "boolean"}], "items": False, "minItems": 1},
}
LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -5, "maximum": 700},
        {"type": "string", "maxLength": 4},
        {"type": "boolean"},
        {"enum": ["x", 1.5, None]},
        {"type": "string", "pattern": "^(ab|c)+$", "maxLength": 8},
    ]
)


def _nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b c", 'q"', "\u00fc"]), children, min_size=1, max_size=3)
    objects = properties.flatmap(
        lambda found: st.sets(st.sampled_from(sorted(found))).map(
            lambda required: {
                "type": "object",
                "properties": found,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )
    arrays = st.tuples(children, st.integers(0, 2)).map(
        lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
    )
    return st.one_of(objects, arrays, st.lists(children, min_size=1, max_size=3).map(lambda each: {"anyOf": each}))


def matcher_of(kind: Any, text: str, matchers: Matchers = MATCHERS) -> GrammarMatcher:
    return matchers.compile(matchers.grammar_of(Constraint(kind, text, kind)))


def random_text(matcher: GrammarMatcher, seed: int, *, decode: Callable[[list[int]], str] = TOKENIZER.decode) -> str:
    """Draw tokens that are allowed until the text may end and a coin says so."""
    generator = random.Random(seed)
    ids: list[int] = []
    while len(ids) < MAX_TOKENS:
        allowed = [token_id for token_id, is_in in enumerate(matcher.mask()) if is_in]
        assert (0 in allowed) == matcher.is_accepting
        if allowed == [0] or (0 in allowed and generator.random() < 0.5):
            return decode(ids)
        ids.append(generator.choice([token_id for token_id in allowed if token_id]))
        matcher.advance(ids[-1:])
    raise AssertionError(decode(ids)[:300])


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_random_texts_validate_against_their_schema(schema: dict[str, Any]) -> None:
    for seed in range(5):
        text = random_text(matcher_of("json_schema", json.dumps(schema)), seed)
        jsonschema.validate(json.loads(text), schema)


@settings(max_examples=100, deadline=None)
@given(schema=st.recursive(LEAVES, _nested, max_leaves=5), seed=st.integers(0, 2**32))
def test_random_texts_validate_against_random_schemas(schema: dict[str, Any], seed: int) -> None:
    jsonschema.validate(json.loads(random_text(matcher_of("json_schema", json.dumps(schema)), seed)), schema)


@pytest.mark.parametrize(
    "expression",
    [
        r"[a-z]{3,6}@[a-z]+\.(com|org)",
        r"(\+|-)?[0-9]{1,3}(,[0-9]{3})*",
        r'say "[^"]{0,9}"/x',
        r"(a|b)*c?",
        r"^anchored$",
        r"(?i:yes|no)",
        r"\w{2}\s\d",
        "\u00e9+\U0001f600?",
    ],
)
def test_random_texts_match_their_expression_as_a_whole(expression: str) -> None:
    for seed in range(5):
        text = random_text(matcher_of("regex", expression), seed)
        assert re.fullmatch(expression, text), text


def test_random_texts_follow_their_grammar() -> None:
    grammar = 'start: word (" " word){2}\nword: "the" | NUMBER\nNUMBER: /[1-9][0-9]?/'
    for seed in range(5):
        words = random_text(matcher_of("grammar", grammar), seed).split(" ")
        assert len(words) == 3
        assert all(word == "the" or 1 <= int(word) <= 99 for word in words)


def test_space_in_json_has_an_end() -> None:
    matcher = matcher_of("json_schema", '{"type": "object"}')
    matcher.advance(TOKENIZER.encode("{").ids)
    space = TOKENIZER.encode(" ").ids
    for _ in range(64):
        assert matcher.mask()[space[0]]
        matcher.advance(space)
    assert not matcher.mask()[space[0]]


def test_a_token_that_may_not_come_is_an_error() -> None:
    matcher = matcher_of("regex", "a+")
    with pytest.raises(GrammarError, match="doesn't satisfy the grammar"):
        matcher.advance(TOKENIZER.encode("b").ids)


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 10, VOCAB_SIZE + 10])
def test_a_mask_is_as_wide_as_the_model(vocab_size: int) -> None:
    matchers = Matchers(TOKENIZER.to_str, vocab_size=vocab_size, eos_token_ids=[0])
    mask = matcher_of("regex", "(?s:.)*", matchers).mask()
    assert len(mask) == vocab_size
    assert not any(mask[VOCAB_SIZE:])
    assert all(mask[ord(letter) + 1] for letter in "az ")


@pytest.mark.parametrize(
    ("eos_token_ids", "message"), [([], "eos_token list must not be empty"), ([999], "999 is out of range")]
)
def test_a_tokenizer_without_a_usable_end_is_refused(eos_token_ids: list[int], message: str) -> None:
    matchers = Matchers(TOKENIZER.to_str, vocab_size=VOCAB_SIZE, eos_token_ids=eos_token_ids)
    with pytest.raises(GrammarError, match=f"do not know this model's tokenizer .*{message}"):
        matcher_of("regex", "a", matchers)


def test_a_tokenizer_of_an_unknown_kind_is_refused() -> None:
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="<end>"))
    with pytest.raises(GrammarError, match="do not know this model's tokenizer"):
        matcher_of("regex", "a", Matchers(words.to_str, vocab_size=2, eos_token_ids=[0]))


def test_sentencepiece_vocabularies_with_bytes_are_understood() -> None:
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581the", "a", "1", "12"]
    core = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="</s>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    matchers = Matchers(core.to_str, vocab_size=len(pieces), eos_token_ids=[0])
    for seed in range(5):
        text = random_text(matcher_of("regex", "x the(a|1)+", matchers), seed, decode=core.decode)
        assert re.fullmatch("x the(a|1)+", text), text
