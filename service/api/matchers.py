"""Grammars by llguidance, for the engine: what serves JSON schemas, regular expressions and Lark grammars."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from service.api.grammar_schemas import Constraint
from service.api.worker_loop import one_line
from service.errors import GrammarError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_LIMITS = LLParserLimits(max_lexer_states=30_000, verbose_errors=False)
"""A state takes 1 to 2 kB, so that a sequence holds 60 MB at most. The others are llguidance's own: what one mask
may take ends after 10 to 50 ms."""
_JSON_DEFAULTS: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{1,64}"}
"""Space between the parts of JSON: enough to indent, and an end to what small models like to repeat."""
_JSON_OVERRIDES: JsonCompileOptions = {"lenient": False}
"""Keywords that llguidance does not know are an error whatever a schema says, so that each text validates."""


class Matchers:
    """Compiles grammars for a tokenizer; from any thread.

    Args:
        tokenizer_json: makes the contents of `tokenizer.json`.
        vocab_size: of the model, which may have more tokens than the tokenizer, or fewer.
        eos_token_ids: tokens that end a text; at least one.
    """

    def __init__(self, tokenizer_json: Callable[[], str], *, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()  # guards `_tokenizer`

    def source(self) -> dict[str, Any]:
        """What another process needs to make equal ones, with `from_source`."""
        return {
            "tokenizer_json": self._tokenizer_json(),
            "vocab_size": self._vocab_size,
            "eos_token_ids": self._eos_token_ids,
        }

    @staticmethod
    def from_source(source: dict[str, Any]) -> Matchers:
        """The opposite of `source`."""
        text = source["tokenizer_json"]
        return Matchers(lambda: text, vocab_size=source["vocab_size"], eos_token_ids=source["eos_token_ids"])

    @staticmethod
    def grammar_of(constraint: Constraint) -> str:
        """What `compile` reads.

        Raises:
            GrammarError: a JSON schema asks llguidance for what it does not know.
        """
        match constraint.kind:
            case "json_schema":
                try:
                    return LLMatcher.grammar_from_json_schema(
                        constraint.text, defaults=_JSON_DEFAULTS, overrides=_JSON_OVERRIDES
                    )
                except ValueError as error:
                    raise GrammarError(one_line(str(error))) from error
            case "regex":
                return LLMatcher.grammar_from_regex(constraint.text)
            case "grammar":
                return LLMatcher.grammar_from_lark(constraint.text)

    def compile(self, grammar: str) -> GrammarMatcher:
        """Make a matcher at the begin of a text; takes 1 ms for an ordinary grammar, and 0.2 s more the first time.

        Raises:
            GrammarError: the grammar is wrong, too large, or allows no text; or the tokenizer is of an unknown kind.
        """
        # Copies of a matcher share what they have learned of a grammar, and its limit: each sequence has its own.
        matcher = LLMatcher(self.tokenizer(), grammar, log_level=0, limits=_LIMITS)
        _check(matcher)
        return GrammarMatcher(matcher, self._vocab_size)

    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance has it, made when it is first wanted; raises GrammarError."""
        with self._lock:
            if self._tokenizer is None:
                try:
                    self._tokenizer = LLTokenizer(self._tokenizer_json(), eos_token=self._eos_token_ids)
                except ValueError as error:
                    raise GrammarError(
                        f"grammars do not know this model's tokenizer ({one_line(str(error))})"
                    ) from error
            return self._tokenizer


class GrammarMatcher:
    """See `service.engine.grammar.Matcher`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_accepting(self) -> bool:
        """See `Matcher`."""
        return self._matcher.is_accepting()

    def advance(self, token_ids: Sequence[int]) -> None:
        """See `Matcher`."""
        self._matcher.consume_tokens(list(token_ids))
        _check(self._matcher)

    def mask(self) -> bytes:
        """See `Matcher`; other threads run while it is worked out."""
        mask = self._matcher.compute_logit_bias()
        _check(self._matcher)
        return mask[: self._vocab_size].ljust(self._vocab_size, b"\0")


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error().removesuffix("<non-verbose/>")))
