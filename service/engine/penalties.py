"""What shifts single logits before sampling: penalties for tokens seen, biases, and tokens that may not come yet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from service.engine.sequence import SamplingParams, Sequence


class Adjuster:
    """Applies these parameters of many sequences at once, and keeps what they need of each. Engine thread only.

    Of a sequence it keeps the distinct tokens seen and how often, never a row as wide as the vocabulary.
    """

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}
        self._biases: dict[str, tuple[Tensor, Tensor]] = {}

    def apply(self, logits: Tensor, sequences: Seq[Sequence]) -> None:
        """Shift contiguous logits float32[len(sequences), vocab] in place."""
        rows = list(enumerate(sequences))
        penalized = [(row, sequence) for row, sequence in rows if _is_penalized(sequence.params)]
        biased = [(row, sequence) for row, sequence in rows if sequence.params.logit_bias]
        banned = [
            row * logits.shape[1] + token_id
            for row, sequence in rows
            if sequence.num_generated < sequence.params.min_tokens
            for token_id in sequence.params.stop_token_ids
            if token_id < logits.shape[1]  # a tokenizer may know more tokens than the model has
        ]
        if penalized:
            self._penalize(logits, penalized)
        if biased:
            pairs = [self._bias(sequence, row * logits.shape[1]) for row, sequence in biased]
            ids, values = (torch.cat(parts).to(logits.device) for parts in zip(*pairs, strict=True))
            logits.view(-1).index_add_(0, ids, values)
        if banned:
            logits.view(-1).index_fill_(0, torch.tensor(banned, device=logits.device), -math.inf)

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._histories.pop(request_id, None)
        self._biases.pop(request_id, None)

    def _penalize(self, logits: Tensor, rows: Seq[tuple[int, Sequence]]) -> None:
        histories = [self._read(sequence) for _, sequence in rows]
        sizes = torch.tensor([history.size for history in histories])
        params = [sequence.params for _, sequence in rows]
        factors = torch.tensor([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
        repetition, frequency, presence = factors.repeat_interleave(sizes, dim=0).to(logits.device).unbind(1)
        places = [history.ids + row * logits.shape[1] for (row, _), history in zip(rows, histories, strict=True)]
        ids = torch.cat(places).to(logits.device)
        counts = torch.cat([history.counts for history in histories]).to(logits.device)
        scores = logits.view(-1)[ids]
        scores = torch.where(scores < 0, scores * repetition, scores / repetition)
        scores -= frequency * counts + presence * (counts > 0)
        logits.view(-1)[ids] = scores  # each id once, so that the order of writes does not matter

    def _read(self, sequence: Sequence) -> _History:
        """The history of a sequence, with the tokens that are new to it."""
        history = self._histories.get(sequence.request_id)
        if history is None:
            counts_prompt = sequence.params.repetition_penalty != 1
            prompt_ids = sequence.token_ids[: sequence.num_prompt_tokens] if counts_prompt else ()
            history = self._histories[sequence.request_id] = _History(prompt_ids, sequence.num_prompt_tokens)
        history.read(sequence.token_ids)
        return history

    def _bias(self, sequence: Sequence, offset: int) -> tuple[Tensor, Tensor]:
        bias = self._biases.get(sequence.request_id)
        if bias is None:
            ids, values = zip(*sequence.params.logit_bias, strict=True)
            bias = self._biases[sequence.request_id] = (torch.tensor(ids), torch.tensor(values, dtype=torch.float32))
        return bias[0] + offset, bias[1]


class _History:
    """The distinct tokens of a sequence and how often each was generated, in arrays that grow by doubling."""

    def __init__(self, prompt_ids: Iterable[int], num_read: int) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._num_read = num_read
        self._ids = torch.tensor([*self._slots, 0])
        self._counts = torch.zeros(len(self._ids))

    @property
    def size(self) -> int:
        """Distinct tokens."""
        return len(self._slots)

    @property
    def ids(self) -> Tensor:
        """int64[size]."""
        return self._ids[: self.size]

    @property
    def counts(self) -> Tensor:
        """float32[size]; 0 for tokens of the prompt only."""
        return self._counts[: self.size]

    def read(self, token_ids: Seq[int]) -> None:
        """Count the generated tokens that were not counted yet."""
        for index in range(self._num_read, len(token_ids)):
            token_id = token_ids[index]
            slot = self._slots.setdefault(token_id, len(self._slots))
            if slot == len(self._ids):
                self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
                self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
            self._ids[slot] = token_id
            self._counts[slot] += 1
        self._num_read = len(token_ids)


def _is_penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
