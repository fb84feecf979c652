"""The paths for models that cannot be packed: a cache object of transformers for each sequence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from service.engine.batch import Work
from service.engine.blocks import Capacity, plan_capacity
from service.engine.config import KVFormat
from service.engine.filters import first_position, length_dependent_rope, rope_parameters
from service.engine.stats import EnginePath
from service.errors import SettingError

_STATE_KEYWORDS = ("cache_params", "state")
_CACHE_KEYWORDS = ("past_key_values", *_STATE_KEYWORDS)
_NUM_MEASURED_TOKENS = 33


@dataclass(frozen=True, slots=True)
class _Held:
    """A cache with all of a sequence's first `num_tokens` tokens."""

    cache: Any
    num_tokens: int
    num_bytes: int


class CacheRunner:
    """The per-request path, or with `path` SINGLE that of one sequence at a time. A `ModelRunner`.

    In a step the sequences are computed one after the other, each with its own cache. A cache that
    does not end where a work begins, because a forward raised or because the model has none, is
    replaced by computing the sequence from its first token. Bytes that a model keeps in its modules
    (path SINGLE) are not counted.
    """

    def __init__(self, model: nn.Module, *, path: EnginePath, chunked: bool) -> None:
        self.path = path
        self.chunked = chunked
        self.num_bytes = 0
        self._model = model
        self._device = next(model.parameters()).device
        self._first_position = first_position(model)
        self._keywords = set(inspect.signature(model.forward).parameters)
        self._cache_keyword = next((name for name in _CACHE_KEYWORDS if name in self._keywords), None)
        if self._cache_keyword in _STATE_KEYWORDS:
            self._keywords.discard("attention_mask")  # such a model applies it to the new tokens only
        self._rotary = _rotary_with_memory(model)
        self._rope_switches = _rope_switches(model)
        self._held: dict[str, _Held] = {}
        self._makes_cache = True
        with torch.inference_mode():
            self._makes_cache = self._cache_keyword is None or self._call([0], 0, None)[1] is not None

    @torch.inference_mode()
    def allocate(
        self, kv_memory_bytes: int, *, max_num_seqs: int, max_model_len: int, kv_cache: KVFormat = "auto"
    ) -> Capacity:
        """See `ModelRunner`; two caches are measured, and none is made in advance."""
        if kv_cache != "auto":
            raise SettingError(
                f"--kv-cache {kv_cache}: this model is computed {self.path}, with caches of transformers; "
                "only what packed models store can be converted; use --kv-cache auto"
            )
        short, long = (cache_bytes(self._start([0] * count)[1]) for count in (1, _NUM_MEASURED_TOKENS))
        token_bytes = -(-(long - short) // (_NUM_MEASURED_TOKENS - 1))
        return plan_capacity(
            kv_memory_bytes,
            token_bytes=token_bytes,
            state_bytes=max(0, short - token_bytes),
            max_num_seqs=1 if self.path is EnginePath.SINGLE else max_num_seqs,
            max_model_len=max_model_len,
        )

    @torch.inference_mode()
    def forward(self, works: Sequence[Work]) -> Tensor:
        """See `ModelRunner`."""
        logits = [self._forward_one(work) for work in works]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def make_deterministic(self) -> None:
        """See `ModelRunner`; caches are a sequence's own in any case."""

    def resume_position(self, work: Work) -> int | None:
        """See `ModelRunner`; from the first token if the cache was dropped or has come too far."""
        if not self.chunked or self._cache_keyword is None:
            return None
        held = self._held.get(work.sequence.request_id)
        return held.num_tokens if held is not None and held.num_tokens <= work.position else 0

    def forget(self, request_id: str) -> None:
        """See `ModelRunner`."""
        self._hold(request_id, None)

    def _forward_one(self, work: Work) -> Tensor:
        request_id = work.sequence.request_id
        end = work.position + work.count
        # Where chunks are computed wrongly, a prompt that is scored in chunks is computed whole for each of them.
        stop = end if self.chunked else len(work.sequence.token_ids)
        columns = range(end - work.num_logits, end)
        held = self._held.get(request_id)
        try:
            if held is None or held.num_tokens != work.position or self._switches_rope(work.position, stop):
                logits, cache = self._start(work.sequence.token_ids[:stop], columns)
            else:
                token_ids = work.sequence.token_ids[work.position : stop]
                logits, cache = self._call(token_ids, work.position, held.cache, columns)
        except BaseException:
            self.forget(request_id)  # some layers may have taken in the tokens, others not
            raise
        self._hold(request_id, None if cache is None else _Held(cache, stop, cache_bytes(cache)))
        return logits

    def _hold(self, request_id: str, held: _Held | None) -> None:
        before = self._held.pop(request_id, None)
        if held is not None:
            self._held[request_id] = held
        self.num_bytes += (held.num_bytes if held else 0) - (before.num_bytes if before else 0)

    def _switches_rope(self, start: int, stop: int) -> bool:
        """Whether the frequencies differ from those that the tokens before `start` were stored with."""
        return any(start <= length < stop for length in self._rope_switches)

    def _start(self, token_ids: list[int], columns: range | None = None) -> tuple[Tensor, Any]:
        """Compute a sequence from its first token."""
        if self.path is EnginePath.SINGLE and "use_cache" in self._keywords:
            # Without a cache a model drops what the sequence before has left in its modules.
            self._model(input_ids=torch.tensor([token_ids[:1]], device=self._device), use_cache=False)
        config: Any = self._model.config
        return self._call(token_ids, 0, None if self._makes_cache else DynamicCache(config=config), columns)

    def _call(self, token_ids: list[int], start: int, cache: Any, columns: range | None = None) -> tuple[Tensor, Any]:
        """Compute tokens that follow the `start` tokens of a cache.

        Returns:
            Logits float32[rows, vocab] behind the tokens at the positions `columns`, by default the last one,
            and the cache with all tokens or None.
        """
        for module, prefix in self._rotary:
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.to(self._device, copy=True))
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        stop = start + len(token_ids)
        columns = columns or range(stop - 1, stop)
        is_last = columns.start == stop - 1
        arguments = {
            "attention_mask": torch.ones((1, stop), dtype=torch.int64, device=self._device),
            "position_ids": torch.arange(start, stop, device=self._device)[None] + self._first_position,
            "use_cache": True,
            "logits_to_keep": 1 if is_last else torch.tensor(columns, device=self._device) - start,
        }
        arguments = {name: value for name, value in arguments.items() if name in self._keywords}
        if self._cache_keyword is not None:
            arguments[self._cache_keyword] = cache
        output = self._model(input_ids=torch.tensor([token_ids], device=self._device), **arguments)
        returned = None if self._cache_keyword is None else getattr(output, self._cache_keyword, None)
        logits = output.logits[0]
        if len(logits) != len(columns):  # the model returns every column
            logits = logits[columns.start - start : columns.stop - start]
        return logits.float(), cache if returned is None else returned


def cache_bytes(cache: object) -> int:
    """Bytes of all tensors that a cache object holds, shared storage once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(cache)}.values())


def _storages(value: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _storages(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _storages(vars(value))


def _rotary_with_memory(model: nn.Module) -> list[tuple[Any, str]]:
    """Rotary embeddings that keep the frequencies of the longest sequence so far, and the prefixes of their names.

    transformers' `dynamic_rope_update` goes back to the original ones only for a short sequence, so
    without help a sequence would be computed with those of a longer neighbour.
    """
    found: list[tuple[Any, str]] = []
    if "dynamic" in length_dependent_rope(model):
        for module in model.modules():
            names = [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]
            found += [(module, name.removesuffix("original_inv_freq")) for name in names]
    return found


def _rope_switches(model: nn.Module) -> list[int]:
    """Lengths up to which longrope uses one set of frequencies and above which another."""
    return [
        parameters["original_max_position_embeddings"]
        for parameters in rope_parameters(model)
        if parameters["rope_type"] == "longrope"
    ]
