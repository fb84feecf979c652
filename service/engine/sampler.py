"""Chooses next tokens from logits, for all sequences of a step at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.batch import NONFINITE, Failure, Token
from service.engine.choice import draw, find_peaks
from service.engine.grammar import Grammars
from service.engine.logprobs import read_logprobs
from service.engine.penalties import Adjuster
from service.engine.sequence import Sequence

_NUM_UNIFORMS = 32
_MOST_KEPT = 2**22
"""Logits that are copied to an array which is kept: a new one is faulted in page by page, which takes as long again."""


class Sampler:
    """Samples, and keeps the random generator and the history of each sequence. Owned by the engine thread.

    One uniform number of a sequence's own generator is spent per sampled token, also if a step is
    computed twice, so what a seed gives does not depend on its neighbours.
    """

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars()
        self._streams: dict[str, Iterator[float]] = {}
        self._uniforms: dict[str, tuple[int, float]] = {}  # the last one drawn, and for which token
        self._unchanged: Tensor | None = None
        self._adjuster = Adjuster()
        self._failures: dict[str, Failure] = {}

    def begin(self, sequences: Seq[Sequence]) -> None:
        """Start what `sample` needs for these sequences and a forward does not change: the masks of grammars."""
        self._grammars.begin(sequences)

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[Token | None]:
        """Choose a token for each row.

        Args:
            logits: float32[rows, vocab]; overwritten.
            sequences: of each row; they are read, and the tokens are not added to them.

        Returns:
            A token for each row; None where there is none, as `failure` tells.
        """
        if not sequences:
            return []
        logits = logits.contiguous()
        asking = [row for row, sequence in enumerate(sequences) if sequence.params.num_logprobs is not None]
        peaks = find_peaks(logits)
        is_usable = list(map(math.isfinite, peaks.logits))
        self._failures = {}
        ends: Mapping[int, int] = {}
        unchanged = None
        if not all(sequence.params.takes_logits_as_they_are for sequence in sequences):
            unchanged = self._keep(logits, asking) if asking else None
            ends = self._change(logits, sequences)
            peaks = find_peaks(logits)
            is_usable = [before and math.isfinite(after) for before, after in zip(is_usable, peaks.logits, strict=True)]
        tokens = self._choose(logits, peaks.tokens, sequences, is_usable)
        tokens |= {row: token_id for row, token_id in ends.items() if row in tokens}
        if not asking:
            return [
                None if token_id is None else Token(token_id) for token_id in map(tokens.get, range(len(sequences)))
            ]
        if unchanged is None:
            unchanged = logits if len(asking) == len(logits) else _copy(logits, asking)
        chosen = [tokens.get(row, 0) for row in asking]
        counts = [sequences[row].params.num_logprobs or 0 for row in asking]
        logprobs = dict(zip(asking, read_logprobs(unchanged, chosen, counts), strict=True))
        return [Token(tokens[row], logprobs.get(row)) if row in tokens else None for row in range(len(sequences))]

    def failure(self, request_id: str) -> Failure:
        """Why the last `sample` gave a sequence no token: logits with NaN, +inf or nothing but -inf, or its grammar."""
        return self._failures.get(request_id, NONFINITE)

    def _keep(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Copy some rows to where the last ones were."""
        size = len(rows) * logits.shape[1]
        if size > _MOST_KEPT:
            return _copy(logits, rows)
        if self._unchanged is None or len(self._unchanged) < size:
            self._unchanged = logits.new_empty(size)
        kept = self._unchanged[:size].view(len(rows), -1)
        return torch.index_select(logits, 0, torch.tensor(rows, device=logits.device), out=kept)

    def _change(self, logits: Tensor, sequences: Seq[Sequence]) -> Mapping[int, int]:
        """Apply penalties, biases and grammars; says which rows end with which token, and notes which fail."""
        self._adjuster.apply(logits, sequences)
        verdicts = self._grammars.take(sequences)
        if verdicts.masks:
            _apply_masks(logits, verdicts.masks)
        for row, failure in verdicts.failures.items():
            self._failures[sequences[row].request_id] = failure
            logits[row] = math.nan
        return verdicts.ends

    def _choose(
        self, logits: Tensor, likeliest: Seq[int], sequences: Seq[Sequence], is_usable: Seq[bool]
    ) -> dict[int, int]:
        """Tokens of the usable rows."""
        rows = [row for row, usable in enumerate(is_usable) if usable]
        random = [row for row in rows if sequences[row].params.temperature > 0]
        tokens = {row: likeliest[row] for row in rows}
        if random:
            params = [sequences[row].params for row in random]
            uniforms = [self._uniform(sequences[row]) for row in random]
            tokens |= zip(random, draw(logits, random, params, uniforms), strict=True)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._streams.pop(request_id, None)
        self._uniforms.pop(request_id, None)
        self._adjuster.forget(request_id)
        self._grammars.forget(request_id)

    def _uniform(self, sequence: Sequence) -> float:
        """A number in [0, 1) of a sequence's own, the same one until it has another token."""
        request_id = sequence.request_id
        index, drawn = self._uniforms.get(request_id, (None, 0.0))
        if index == sequence.num_generated:
            return drawn
        stream = self._streams.get(request_id)
        if stream is None:
            stream = self._streams[request_id] = _uniforms(sequence.params.seed)
        drawn = next(stream)
        self._uniforms[request_id] = sequence.num_generated, drawn
        return drawn


def _uniforms(seed: int | None) -> Iterator[float]:
    """Numbers in [0, 1) of a generator; several are drawn at once, which costs as much as one."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    while True:
        yield from torch.rand(_NUM_UNIFORMS, dtype=torch.float64, generator=generator).tolist()


def _apply_masks(logits: Tensor, masks: Mapping[int, bytearray]) -> None:
    """Rule out tokens of contiguous logits float32[rows, vocab]: masks have a byte for each, 0 for those.

    A minimum with infinities takes a tenth of the time of `masked_fill_`, which branches at each token.
    """
    for row, mask in masks.items():
        allowed = torch.frombuffer(mask, dtype=torch.uint8).to(logits.device)
        torch.minimum(logits[row], allowed.float().sub_(0.5).mul_(math.inf), out=logits[row])


def _copy(logits: Tensor, rows: list[int]) -> Tensor:
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
