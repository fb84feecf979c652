"""What the engine asks of a model, and the packed path: one row holds the tokens of all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from service.engine.attention import STEP_KEYWORD, Step, install
from service.engine.batch import Work
from service.engine.blocks import Capacity, KVBlocks, plan_capacity
from service.engine.config import KVFormat
from service.engine.filters import first_position
from service.engine.inputs import pack
from service.engine.stats import EnginePath


class ModelRunner(Protocol):
    """How an engine computes its model. Owned by the engine thread; `num_bytes` may be read from any.

    Attributes:
        path: in which way it computes.
        chunked: whether the tokens of a prompt may be spread over several steps.
    """

    path: EnginePath
    chunked: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and states: sums over tensors."""

    def allocate(
        self, kv_memory_bytes: int, *, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
    ) -> Capacity:
        """Say what the memory holds, and take what is taken in advance.

        Raises:
            SettingError: the memory holds no block, or this way of computing stores no `kv_cache` of that format.
        """

    def forward(self, works: Sequence[Work]) -> Tensor:
        """Compute each work's tokens and keep what the next ones need.

        Returns:
            Logits float32[rows, vocab] behind the last `num_logits` tokens of each work, in order.
        """

    def make_deterministic(self) -> None:
        """From now on let a forward of one sequence depend on nothing but its tokens and positions, in every bit."""

    def resume_position(self, work: Work) -> int | None:
        """From where on a work is computed in smaller pieces after it has failed; None if it cannot be."""

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended, or that will be computed again."""


class Runner:
    """The packed path: a model with its KV blocks. A `ModelRunner`.

    The first forward tells what a token costs in the KV blocks, so it comes before `allocate`.

    Raises:
        UnsupportedModel: the model takes no attention function.
    """

    path = EnginePath.PACKED
    chunked = True

    def __init__(self, model: nn.Module) -> None:
        install(model)
        self._model = model
        self._device = next(model.parameters()).device
        self._first_position = first_position(model)
        self._reads_in_place = True
        self.kv = KVBlocks()

    @property
    def num_bytes(self) -> int:
        """See `ModelRunner`."""
        return self.kv.num_bytes

    @torch.inference_mode()
    def allocate(
        self, kv_memory_bytes: int, *, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
    ) -> Capacity:
        """See `ModelRunner`; the blocks are made here, and what was stored before is dropped.

        The format changes only here: the probe comes before and compares with keys and values as they are,
        because int8 is further from the model's own forward than the probe tolerates.
        """
        self.kv.set_format(kv_cache)
        capacity = plan_capacity(
            kv_memory_bytes,
            token_bytes=self.kv.bytes_per_token,
            state_bytes=0,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
        self.kv.resize(capacity.num_blocks)
        return capacity

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> Tensor:
        """See `ModelRunner`; all works are one row of tokens."""
        ids, positions, tails, step = pack(works, self.kv, self._device, reads_in_place=self._reads_in_place)
        return self._call(ids[None], positions[None], tails, step)

    def make_deterministic(self) -> None:
        """See `ModelRunner`; keys that are read in place lie now in a row, now apart, and differently aligned."""
        self._reads_in_place = False

    def resume_position(self, work: Work) -> int:
        """See `ModelRunner`; slots are written again with the same."""
        return work.position

    def forget(self, request_id: str) -> None:
        """See `ModelRunner`; the blocks belong to the scheduler, and nothing else is kept."""

    def _call(self, ids: Tensor, positions: Tensor, tails: Tensor, step: Step) -> Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions + self._first_position if self._first_position else positions,
            use_cache=False,
            logits_to_keep=tails,
            **{STEP_KEYWORD: step},
        )
        logits: Tensor = output.logits[0]
        if logits.shape[0] != tails.shape[0]:  # the model ignores `logits_to_keep` and returns every column
            logits = logits[tails]
        return logits.float()
