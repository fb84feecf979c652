"""One choice of an answer: what events of its sequence bring, and what they make together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.api.echo import Echo, EchoReader
from service.api.logprobs import ScoreQueue, TokenScore
from service.api.text import TextStream
from service.engine.sequence import FinishReason, SequenceEvent, SequenceTimings, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class Delta:
    """What one event brought for one choice; it stays as it is, though it is not frozen: that takes longer to make.

    Attributes:
        prompt_text, prompt_scores: of the prompt, if they are asked for; all of them come before any other text.
        scores: of the tokens that begin in this text or an earlier one and were not told yet, if they are asked for.
        finish_reason: `stop` or `length` in the last delta of a choice.
        timings: with `finish_reason`.
    """

    index: int
    prompt_text: str = ""
    prompt_scores: tuple[TokenScore, ...] = ()
    text: str = ""
    token_ids: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish_reason: str | None = None
    timings: SequenceTimings | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One choice as a whole."""

    prompt_text: str
    prompt_scores: tuple[TokenScore, ...]
    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]
    finish_reason: str
    num_prompt_tokens: int
    timings: SequenceTimings


class Choice:
    """Turns the events of one sequence into text.

    Args:
        text: makes that of the generated tokens.
        echo: what is told of the prompt, if anything is.
        tells_end: whether the token that ended the text is among the scores. Beside a prompt it is, because
            clients that count from the end rely on a score for each token that was sampled.
    """

    def __init__(
        self, index: int, text: TextStream, *, num_prompt_tokens: int, echo: Echo | None, tells_end: bool
    ) -> None:
        self.index = index
        self.num_prompt_tokens = num_prompt_tokens
        self._text = text
        self._prompt = None if echo is None else EchoReader(echo)
        self._num_before = 0 if echo is None else len(echo.text)
        self._scores = ScoreQueue(self._num_before)
        self._tells_end = tells_end

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; all that follows is dropped."""
        return self._text.stopped

    def read(self, event: SequenceEvent) -> Delta:
        """What an event brings; one with a finish reason ends the choice."""
        prompt_text, prompt_scores = ("", ()) if self._prompt is None else self._prompt.take(event)
        token_ids = () if self.stopped else event.token_ids
        text = self._push(event) if token_ids else ""
        reason = event.finish_reason
        if reason is not None:
            if event.stop_token is not None and self._tells_end:
                self._add_score(*event.stop_token)
            text += self._text.finish()
            reason = FinishReason.STOP if self.stopped else reason
        return Delta(
            index=self.index,
            prompt_text=prompt_text,
            prompt_scores=prompt_scores,
            text=text,
            token_ids=token_ids,
            scores=self._scores.take(text, all_text=reason is not None and not self.stopped),
            finish_reason=None if reason is None else str(reason),
            timings=event.timings,
        )

    def _push(self, event: SequenceEvent) -> str:
        """The text that an event's tokens set free."""
        if not event.logprobs:
            return self._text.push(event.token_ids)
        text = ""
        for token_id, logprobs in zip(event.token_ids, event.logprobs, strict=True):
            self._add_score(token_id, logprobs)
            text += self._text.push((token_id,))
        return text

    def _add_score(self, token_id: int, logprobs: TokenLogprobs) -> None:
        self._scores.add(TokenScore(token_id, self._num_before + self._text.num_characters, logprobs))


def join_events(events: Sequence[SequenceEvent]) -> list[SequenceEvent]:
    """One event for each sequence, where its events tell of nothing but tokens and an end."""
    by_sequence: dict[str, list[SequenceEvent]] = {}
    for event in events:
        by_sequence.setdefault(event.request_id, []).append(event)
    joined: list[SequenceEvent] = []
    for parts in by_sequence.values():
        if any(part.logprobs or part.prompt_logprobs or part.stop_token for part in parts):
            joined.extend(parts)
        else:
            token_ids = tuple(token_id for part in parts for token_id in part.token_ids)
            joined.append(parts[-1]._replace(token_ids=token_ids))
    return joined


def join(deltas: Sequence[Delta], num_prompt_tokens: int) -> Result:
    """All deltas of one choice as a whole."""
    last = deltas[-1]
    assert last.finish_reason is not None
    assert last.timings is not None
    return Result(
        prompt_text="".join(delta.prompt_text for delta in deltas),
        prompt_scores=tuple(score for delta in deltas for score in delta.prompt_scores),
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        scores=tuple(score for delta in deltas for score in delta.scores),
        finish_reason=last.finish_reason,
        num_prompt_tokens=num_prompt_tokens,
        timings=last.timings,
    )
