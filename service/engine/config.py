"""Limits of an engine, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.engine.pacing import StepSize
from service.engine.stats import EnginePath
from service.errors import SettingError

KVFormat = Literal["auto", "int8"]
"""How keys and values are stored; `auto` is the dtype of the activations."""

_CHUNK_LENGTH = 64
"""Tokens of a prompt that deterministic steps compute at once: few, because a step is longer by up to so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_num_seqs: sequences computed together.
        max_num_batched_tokens: tokens of one step; longer prompts are computed in chunks.
        max_model_len: prompt and new tokens of one sequence.
        kv_memory_bytes: memory for keys and values.
        kv_cache: in which format they are stored; another than `auto` on the packed path only.
        max_queue: sequences that wait.
        vocab_size: token ids are below it.
        num_threads: torch threads of the engine thread; None leaves torch's choice.
        prefix_cache: keep the KV blocks of ended sequences for others that begin alike; on the packed path only.
        step_budget_ms: by how much prompts may prolong a step that also decodes.
        deterministic: compute each sequence in forwards of its own and always in the same chunks, without the
            prefix cache, so that its tokens and log-probabilities are the same bits whatever its neighbours.
        least_step_limit_s: a step is never thought to be stuck sooner.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int
    kv_memory_bytes: int
    kv_cache: KVFormat = "auto"
    max_queue: int = 256
    vocab_size: int
    num_threads: int | None = None
    prefix_cache: bool = True
    step_budget_ms: int = 50
    deterministic: bool = False
    least_step_limit_s: float = 30.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise SettingError(f"{name} is {value}; it must be at least 1; raise it")

    def chunk_length(self, *, chunked: bool) -> int | None:
        """Where prompts are cut if all is `deterministic`, at multiples of it; None if anywhere."""
        if not self.deterministic:
            return None
        return min(_CHUNK_LENGTH, self.max_num_batched_tokens) if chunked else self.max_model_len

    def longest_step(self, path: EnginePath, *, chunked: bool) -> StepSize:
        """More than any step holds: a step may exceed the limit by one prompt or chunk of it."""
        num_prompt_tokens = self.max_num_batched_tokens + (_CHUNK_LENGTH if chunked else self.max_model_len)
        is_packed = path is EnginePath.PACKED and not self.deterministic
        return StepSize(num_prompt_tokens, 1 if is_packed else self.max_num_seqs)
