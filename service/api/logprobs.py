"""Log-probabilities of tokens as answers tell them, each with the text that it belongs to."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from service.api.text import TextCodec
from service.engine.sequence import TokenLogprobs

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's value."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable ones as themselves, others from U+0100 on.

    Source: GPT-2, Radford et al. 2019; `tokenizers.pre_tokenizers.ByteLevel` uses the same.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


class TokenScore(NamedTuple):
    """Log-probabilities at one token.

    Attributes:
        offset: characters of the choice's text, an echoed prompt included, that were certain before the token.
        logprobs: None for the first token of a prompt, which nothing comes before.
    """

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


class ScoreQueue:
    """Holds scores back until the text of their tokens is released, so that a stop string takes its own away.

    `num_before` characters stand before that text.
    """

    def __init__(self, num_before: int = 0) -> None:
        self._held: list[TokenScore] = []
        self._num_released = num_before

    def add(self, score: TokenScore) -> None:
        """Put a score behind the others."""
        self._held.append(score)

    def take(self, text: str, *, all_text: bool) -> tuple[TokenScore, ...]:
        """Scores of tokens that begin in the text released so far, of which `text` is the last piece.

        With `all_text` nothing follows and nothing was cut, so that tokens without text come too.
        """
        self._num_released += len(text)
        if not self._held:
            return ()
        is_free = [all_text or score.offset < self._num_released for score in self._held]
        freed = tuple(score for score, free in zip(self._held, is_free, strict=True) if free)
        self._held = self._held[len(freed) :]  # offsets rise, so that the freed are the first
        return freed


class LogprobWriter:
    """Writes scores in the forms of the routes. Remembers how tokens are spelled, so it serves one request."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._spellings: dict[int, tuple[str, list[int]]] = {}

    def completion(self, scores: tuple[TokenScore, ...]) -> dict[str, list[Any]]:
        """The form of OpenAI's completions; the likeliest tokens include the one that was sampled."""
        return {
            "tokens": [self._spelling(score.token_id)[0] for score in scores],
            "token_logprobs": [None if score.logprobs is None else _finite(score.logprobs.logprob) for score in scores],
            "top_logprobs": [self._by_text(score) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def chat(self, scores: tuple[TokenScore, ...]) -> dict[str, Any]:
        """The form of OpenAI's chats."""
        return {"content": [self._with_top(score, with_ids=False) for score in scores], "refusal": None}

    def native(self, scores: tuple[TokenScore, ...]) -> list[dict[str, Any]]:
        """As in chats, with token ids."""
        return [self._with_top(score, with_ids=True) for score in scores]

    def _with_top(self, score: TokenScore, *, with_ids: bool) -> dict[str, Any]:
        logprob, top = score.logprobs or (None, ())
        entry = self._entry(score.token_id, logprob, with_ids=with_ids)
        entry["top_logprobs"] = [self._entry(*pair, with_ids=with_ids) for pair in top]
        return entry

    def _entry(self, token_id: int, logprob: float | None, *, with_ids: bool) -> dict[str, Any]:
        text, spelled = self._spelling(token_id)
        entry: dict[str, Any] = {"token_id": token_id} if with_ids else {}
        entry["token"], entry["bytes"] = text, spelled
        entry["logprob"] = None if logprob is None else _finite(logprob)
        return entry

    def _by_text(self, score: TokenScore) -> dict[str, float] | None:
        """Texts to log-probabilities; of tokens with the same text the likeliest counts."""
        if score.logprobs is None:
            return None
        found: dict[str, float] = {}
        for token_id, logprob in (*score.logprobs.top, (score.token_id, score.logprobs.logprob)):
            found.setdefault(self._spelling(token_id)[0], _finite(logprob))
        return found

    def _spelling(self, token_id: int) -> tuple[str, list[int]]:
        spelling = self._spellings.get(token_id)
        if spelling is None:
            text, spelled = spell(self._codec, token_id)
            spelling = self._spellings[token_id] = text, list(spelled)
        return spelling


def spell(codec: TextCodec, token_id: int) -> tuple[str, bytes]:
    """A token's text and bytes; one that holds a part of a character is written `bytes:` and hexadecimal escapes."""
    # Twice, as some decoders drop the blank before the first token.
    once = codec.decode([token_id], skip_special_tokens=False)
    text = codec.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]
    if _REPLACEMENT not in text:
        return text, text.encode()
    name = codec.names([token_id])[0] or ""
    if byte := _BYTE_TOKEN.fullmatch(name):
        spelled = bytes.fromhex(byte[1])
    elif all(character in _BYTE_CHARACTERS for character in name):
        spelled = bytes(_BYTE_CHARACTERS[character] for character in name)
    else:
        return text, text.encode()
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
