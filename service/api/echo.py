"""A prompt as an answer tells it: its text, and its tokens with their log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from service.api.logprobs import TokenScore
from service.api.schemas import Prompt, SamplingFields
from service.api.text import Detokenizer, TextCodec
from service.engine.checks import check_token_ids
from service.engine.sequence import SequenceEvent


@dataclass(frozen=True, slots=True)
class Echo:
    """What is told of a prompt.

    Attributes:
        text: as it was sent, or the text of its token ids, special tokens included; empty if only tokens are told.
        offsets: where in the text each token begins, as far as the tokenizer keeps a text as it is; () if
            log-probabilities are not told.
    """

    text: str
    token_ids: Sequence[int]
    offsets: tuple[int, ...]


class EchoReader:
    """Tells one choice's prompt piece by piece, as it is computed."""

    def __init__(self, echo: Echo) -> None:
        self._echo = echo
        self._num_told = 0
        self._num_released = 0

    def take(self, event: SequenceEvent) -> tuple[str, tuple[TokenScore, ...]]:
        """The text that an event sets free, and its tokens; the first token comes first, without log-probabilities."""
        echo, first = self._echo, self._num_told
        start, stop = self._num_released, len(echo.text)
        scores: tuple[TokenScore, ...] = ()
        if first < len(echo.offsets):
            logprobs = event.prompt_logprobs if first else (None, *event.prompt_logprobs)
            self._num_told += len(logprobs)
            span = slice(first, self._num_told)
            tokens = zip(echo.token_ids[span], echo.offsets[span], logprobs, strict=True)
            scores = tuple(TokenScore(*token) for token in tokens)
            stop = echo.offsets[self._num_told] if self._num_told < len(echo.offsets) else stop
        self._num_released = stop
        return echo.text[start:stop], scores


async def make_echo(
    codec: TextCodec, prompt: Prompt, token_ids: Sequence[int], fields: SamplingFields, *, vocab_size: int
) -> Echo | None:
    """What a request wants to be told of a prompt; None for nothing. Off the event loop where it takes long.

    Raises:
        InvalidRequest: a token id that is none.
    """
    is_scored = fields.num_prompt_logprobs() is not None
    if not fields.echoes_prompt():
        return Echo("", token_ids, (0,) * len(token_ids)) if is_scored else None
    check_token_ids(token_ids, vocab_size=vocab_size)
    return await asyncio.to_thread(_read, codec, prompt, token_ids, is_scored=is_scored)


def _read(codec: TextCodec, prompt: Prompt, token_ids: Sequence[int], *, is_scored: bool) -> Echo:
    is_text = isinstance(prompt, str)
    text = prompt if isinstance(prompt, str) else codec.decode(token_ids, skip_special_tokens=False)
    return Echo(text, token_ids, _offsets(codec, text, token_ids, is_text=is_text) if is_scored else ())


def _offsets(codec: TextCodec, text: str, token_ids: Sequence[int], *, is_text: bool) -> tuple[int, ...]:
    """Where tokens begin; the text that a client sent has special tokens only where the client wrote them."""
    detokenizer = Detokenizer(codec, (), skip_special_tokens=is_text)
    offsets: list[int] = []
    offset = 0
    for token_id in token_ids:
        offsets.append(min(offset, len(text)))
        if is_text and token_id in codec.special_ids:
            name = codec.names([token_id])[0] or ""
            offset += len(name) if text.startswith(name, offset) else 0
        else:
            offset += len(detokenizer.push((token_id,)))
    return tuple(offsets)
