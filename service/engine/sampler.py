"""Chooses next tokens from logits, for all sequences of a step at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.batch import NONFINITE, Failure, Token
from service.engine.candidates import block_maxima, draw, likeliest
from service.engine.grammar import Grammars
from service.engine.logprobs import read_logprobs
from service.engine.penalties import Adjuster
from service.engine.sequence import Sequence


class Sampler:
    """Samples, and keeps the random generator and the history of each sequence. Owned by the engine thread.

    One uniform number of a sequence's own generator is spent per sampled token, also if a step is
    computed twice, so what a seed gives does not depend on its neighbours.
    """

    def __init__(self, grammars: Grammars | None = None) -> None:
        self._grammars = grammars or Grammars()
        self._generators: dict[str, torch.Generator] = {}
        self._uniforms: dict[str, tuple[int, Tensor]] = {}  # the last one drawn, and for which token
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
        logits = logits.contiguous()
        asking = [row for row, sequence in enumerate(sequences) if sequence.params.num_logprobs is not None]
        unchanged = _copy(logits, asking) if asking else None
        maxima = block_maxima(logits)
        is_usable = _are_finite(maxima)
        self._failures = {}
        ends: Mapping[int, int] = {}
        if not all(sequence.params.takes_logits_as_they_are for sequence in sequences):
            ends = self._change(logits, sequences)
            maxima = block_maxima(logits)
            is_usable = [before and after for before, after in zip(is_usable, _are_finite(maxima), strict=True)]
        tokens = self._choose(logits, maxima, sequences, is_usable)
        tokens |= {row: token_id for row, token_id in ends.items() if row in tokens}
        if unchanged is None:
            return [
                None if token_id is None else Token(token_id) for token_id in map(tokens.get, range(len(sequences)))
            ]
        chosen = [tokens.get(row, 0) for row in asking]
        counts = [sequences[row].params.num_logprobs or 0 for row in asking]
        logprobs = dict(zip(asking, read_logprobs(unchanged, chosen, counts), strict=True))
        return [Token(tokens[row], logprobs.get(row)) if row in tokens else None for row in range(len(sequences))]

    def failure(self, request_id: str) -> Failure:
        """Why the last `sample` gave a sequence no token: logits with NaN, +inf or nothing but -inf, or its grammar."""
        return self._failures.get(request_id, NONFINITE)

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

    def _choose(self, logits: Tensor, maxima: Tensor, sequences: Seq[Sequence], is_usable: Seq[bool]) -> dict[int, int]:
        """Tokens of the usable rows."""
        rows = [row for row, usable in enumerate(is_usable) if usable]
        greedy = [row for row in rows if sequences[row].params.temperature == 0]
        tokens: dict[int, int] = {}
        if greedy:
            tokens |= zip(greedy, likeliest(_rows(logits, greedy), _rows(maxima, greedy)).tolist(), strict=True)
            if len(greedy) == len(rows):
                return tokens
        random = [row for row in rows if sequences[row].params.temperature > 0]
        if random:
            params = [sequences[row].params for row in random]
            uniforms = torch.stack([self._uniform(sequences[row]) for row in random]).to(logits.device)
            tokens |= zip(random, draw(_rows(logits, random), params, uniforms).tolist(), strict=True)
        return tokens

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._generators.pop(request_id, None)
        self._uniforms.pop(request_id, None)
        self._adjuster.forget(request_id)
        self._grammars.forget(request_id)

    def _uniform(self, sequence: Sequence) -> Tensor:
        """A float64[] in [0, 1) of a sequence's own, the same one until it has another token."""
        request_id = sequence.request_id
        index, drawn = self._uniforms.get(request_id, (None, None))
        if drawn is not None and index == sequence.num_generated:
            return drawn
        generator = self._generators.get(request_id)
        if generator is None:
            generator = self._generators[request_id] = torch.Generator()
            if sequence.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sequence.params.seed)
        drawn = torch.rand((), dtype=torch.float64, generator=generator)
        self._uniforms[request_id] = sequence.num_generated, drawn
        return drawn


def _are_finite(maxima: Tensor) -> list[bool]:
    """Of each row whether the largest is a number; for so few that is told sooner in Python than by torch."""
    return list(map(math.isfinite, maxima.amax(1).tolist()))


def _apply_masks(logits: Tensor, masks: Mapping[int, bytearray]) -> None:
    """Rule out tokens of contiguous logits float32[rows, vocab]: masks have a byte for each, 0 for those.

    A minimum with infinities takes a tenth of the time of `masked_fill_`, which branches at each token.
    """
    for row, mask in masks.items():
        allowed = torch.frombuffer(mask, dtype=torch.uint8).to(logits.device)
        torch.minimum(logits[row], allowed.float().sub_(0.5).mul_(math.inf), out=logits[row])


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows; no copy if they are all."""
    return logits if len(rows) == len(logits) else _copy(logits, rows)


def _copy(logits: Tensor, rows: list[int]) -> Tensor:
    return logits.index_select(0, torch.tensor(rows, device=logits.device))
