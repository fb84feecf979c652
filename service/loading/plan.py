"""What a load will take, said before any weight is read: from the config and the headers of the weight files.

While it loads, a process holds at most

    what it holds before + the model as the recipe leaves it + a working set + 100 MB

where the working set is the largest tensor of the checkpoint as it lies in the file, and 64 MB. One of more than
256 MB that becomes one weight counts with the runs of rows that it is read by. Where the checkpoint has each expert
of a layer by itself, they may be merged: then it is the experts of one layer, and 64 MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import torch

from service.errors import DoesNotFit
from service.loading import memory
from service.loading.config import ServedModel
from service.loading.fidelity_report import NUM_TOKENS
from service.loading.forecast import ModuleForecast, Skeleton
from service.loading.kv_shape import KVLayer, kv_layers
from service.loading.report import WeightBytes
from service.loading.tensors import PIECE_BYTES, TensorHeader
from service.numerics.recipe import Recipe, parse_recipe

_MB = 10**6
MARGIN_BYTES: Final = 100 * _MB
"""Tokenizer, threads, temporaries of encoding and what lies between them on the heap."""
SCRATCH_BYTES: Final = 64 * _MB
"""Of the working set beside the tensor."""
COMPARISON_BYTES: Final = 128 * _MB
"""Of a comparison with the original: blocks of weights and logits; the rest depends on the model."""
LARGE_TENSOR_BYTES: Final = 256 * _MB
"""A tensor of more counts with the pieces of it that are in memory, if it is read in pieces."""
SMALLER_RECIPES: Final = ("w8a16", "w4a16-g32", "w4a16-g64", "w4a16-g128")
"""What is named to who has too little memory, the closest to the original first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a load may take.

    Attributes:
        memory_bytes: of the process in all; None: what the machine and its control group leave to it.
        kv_memory_bytes: for keys and values, if that was asked for.
    """

    memory_bytes: int | None = None
    kv_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkingSet:
    """What a load holds beside its result: bytes, and of which tensor or experts."""

    bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What a load will take. Sizes in bytes.

    Attributes:
        original_bytes: what scheme `none` would hold at the serving dtype, tied tensors once.
        weight_bytes: what the recipe makes of it, by kind.
        base_bytes: resident in this process before the load.
        available_bytes: what the process may hold in all.
        is_limited: `available_bytes` was given, not found.
        kv_memory_bytes: for keys and values, as asked for; 0 if it was not.
        needed_bytes: most of the host that it takes, while it loads or with keys and values of that size.
        device_bytes, device_available_bytes: of the memory of a device, weights and asked-for keys and values; None
            on a CPU.
        kv_layers: what each token will store.
        dtype: of activations and unquantized weights.
        refusal: why it does not fit, and what would; "" if it fits.
        modules: in module order.
    """

    model: str
    recipe: str
    dtype: torch.dtype
    device: str
    original_bytes: int
    num_parameters: int
    weight_bytes: WeightBytes
    base_bytes: int
    working_set: WorkingSet
    available_bytes: int
    is_limited: bool
    kv_memory_bytes: int
    needed_bytes: int
    device_bytes: int | None = None
    device_available_bytes: int | None = None
    kv_layers: tuple[KVLayer, ...]
    refusal: str = ""
    modules: tuple[ModuleForecast, ...] = field(repr=False)

    @property
    def quantized_bytes(self) -> int:
        """All parameters and persistent buffers after the load."""
        return self.weight_bytes.total

    @property
    def peak_bytes(self) -> int:
        """Most that the process holds until it is ready."""
        return self.base_bytes + self.quantized_bytes + self.working_set.bytes + MARGIN_BYTES

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return not self.refusal

    def require_fit(self) -> None:
        """Go no further without enough memory.

        Raises:
            DoesNotFit: there is too little, with the recipe that would fit.
        """
        if self.refusal:
            raise DoesNotFit(self.refusal)


def plan_load(
    name: str,
    served: ServedModel,
    refs: Mapping[str, TensorHeader],
    *,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    compares_first: bool = False,
) -> LoadPlan:
    """Plan a load into this process.

    A head that a tied checkpoint holds beside its embedding is taken for the same weight, which only reading tells.

    Args:
        name: what messages call the model.
        refs: all tensors of the checkpoint.
        compares_first: the model is compared with its original before it is ready.

    Raises:
        ModelError: the model's class fails.
        RecipeError: a pattern matches nothing, or gives a tied pair two schemes.
    """
    skeleton = Skeleton(served, dtype)
    modules = tuple(skeleton.modules(recipe))
    comparison = _comparison_set(skeleton, served, recipe) if compares_first else WorkingSet(bytes=0, source="nothing")
    budget = _find_budget(limits, device, comparison)
    weights = _total(modules)
    working_set = max(_working_set(skeleton, refs, recipe, dtype), comparison, key=lambda each: each.bytes)
    shortage = budget.shortage(weights.total, working_set)
    refusal = ""
    if shortage is not None:
        remedy = _remedy(skeleton, refs, budget, dtype, of_device=shortage.of_device)
        refusal = f"{name} as {recipe.text} {shortage.text}; {remedy}"
    is_on_device = budget.device_available_bytes is not None
    return LoadPlan(
        model=name,
        recipe=recipe.text,
        dtype=dtype,
        device=device.type,
        original_bytes=skeleton.original_bytes,
        num_parameters=skeleton.num_parameters,
        weight_bytes=weights,
        base_bytes=budget.base_bytes,
        working_set=working_set,
        available_bytes=budget.available_bytes,
        is_limited=budget.is_limited,
        kv_memory_bytes=budget.kv_bytes,
        needed_bytes=budget.needed_bytes(weights.total, working_set),
        device_bytes=budget.device_needed_bytes(weights.total) if is_on_device else None,
        device_available_bytes=budget.device_available_bytes,
        kv_layers=kv_layers(served.config),
        refusal=refusal,
        modules=modules,
    )


class _Shortage(NamedTuple):
    """What is needed where there is too little, of the host or of the device, and that in words."""

    needed_bytes: int
    text: str
    of_device: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Budget:
    """What there is, and what of it is spoken for whatever the recipe."""

    base_bytes: int
    kv_bytes: int
    available_bytes: int
    is_limited: bool
    device_available_bytes: int | None
    comparison_bytes: int

    def needed_bytes(self, weight_bytes: int, working_set: WorkingSet) -> int:
        """Of the host, while it loads or when keys and values have come in the place of the working set."""
        kv_bytes = 0 if self.device_available_bytes is not None else self.kv_bytes
        return self.base_bytes + weight_bytes + MARGIN_BYTES + max(working_set.bytes, kv_bytes, self.comparison_bytes)

    def device_needed_bytes(self, weight_bytes: int) -> int:
        """Of the device, with keys and values."""
        return weight_bytes + self.kv_bytes

    def shortage(self, weight_bytes: int, working_set: WorkingSet) -> _Shortage | None:
        """What is too little; None if nothing is."""
        needed = self.needed_bytes(weight_bytes, working_set)
        if needed > self.available_bytes:
            there = "--memory allows" if self.is_limited else "this process can have"
            return _Shortage(needed, f"needs {needed} bytes, {there} {self.available_bytes}", of_device=False)
        needed = self.device_needed_bytes(weight_bytes)
        if self.device_available_bytes is not None and needed > self.device_available_bytes:
            text = f"needs {needed} bytes of the device, {self.device_available_bytes} are free there"
            return _Shortage(needed, text, of_device=True)
        return None


def _find_budget(limits: Limits, device: torch.device, comparison: WorkingSet) -> _Budget:
    base_bytes = memory.resident_bytes()
    return _Budget(
        base_bytes=base_bytes,
        kv_bytes=limits.kv_memory_bytes or 0,
        available_bytes=limits.memory_bytes or memory.available_bytes() + base_bytes,
        is_limited=limits.memory_bytes is not None,
        device_available_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        comparison_bytes=comparison.bytes,
    )


def _remedy(
    skeleton: Skeleton, refs: Mapping[str, TensorHeader], budget: _Budget, dtype: torch.dtype, *, of_device: bool
) -> str:
    """The first of the smaller recipes that would fit, with what it takes where there is too little; else the least."""
    needs = {}
    for text in SMALLER_RECIPES:
        recipe = parse_recipe(text)
        weights = _total(skeleton.modules(recipe)).total
        working_set = _working_set(skeleton, refs, recipe, dtype)
        shortage = budget.shortage(weights, working_set)
        if shortage is None:
            taken = budget.device_needed_bytes(weights) if of_device else budget.needed_bytes(weights, working_set)
            return f"--quantize {text} fits with {taken}"
        needs[text] = shortage.needed_bytes
    least = min(needs, key=needs.__getitem__)
    kv_remedy = ", or lower --kv-memory" if budget.kv_bytes else ""
    return (
        f"none of {', '.join(needs)} fits, {least} would need {needs[least]}: give more memory{kv_remedy}, or a "
        "smaller model"
    )


def _working_set(
    skeleton: Skeleton, refs: Mapping[str, TensorHeader], recipe: Recipe, dtype: torch.dtype
) -> WorkingSet:
    large = [name for name, ref in refs.items() if ref.num_bytes > LARGE_TENSOR_BYTES and not ref.strides]
    in_pieces = skeleton.reads_in_pieces(large, recipe) if large else set()
    best = WorkingSet(bytes=SCRATCH_BYTES, source="no tensor")
    for name, ref in refs.items():
        if name in in_pieces:
            num_bytes, source = 2 * PIECE_BYTES, f"two runs of rows of {ref.name}"
        else:  # elements that do not lie in order are put in order in another place
            num_bytes, source = ref.num_bytes * (2 if ref.strides else 1), f"the tensor {ref.name}"
        if num_bytes + SCRATCH_BYTES > best.bytes:
            best = WorkingSet(bytes=num_bytes + SCRATCH_BYTES, source=source)
    in_file = max((ref.dtype.itemsize for ref in refs.values()), default=0)
    stacked_shapes = {ref.shape for ref in refs.values() if len(ref.shape) == 3}
    for experts in skeleton.experts(recipe):
        if stacked_shapes.issuperset(experts.shapes):
            continue  # the checkpoint has them stacked: tensors like others
        itemsize = max(in_file, dtype.itemsize) if experts.has_unquantized else in_file
        num_bytes = experts.num_weights * itemsize + SCRATCH_BYTES
        if num_bytes > best.bytes:
            best = WorkingSet(bytes=num_bytes, source=f"the experts of {experts.module}")
    return best


def _comparison_set(skeleton: Skeleton, served: ServedModel, recipe: Recipe) -> WorkingSet:
    """What a comparison with the original holds: see `fidelity`."""
    config = served.config.get_text_config()
    hidden_size = getattr(config, "hidden_size", 0)
    states = NUM_TOKENS * hidden_size * getattr(config, "num_hidden_layers", 0)
    activations = 4 * NUM_TOKENS * max(4 * hidden_size, getattr(config, "intermediate_size", None) or 0)
    # Merged in float32, with the experts that they are made of.
    experts = 2 * max((experts.num_weights for experts in skeleton.experts(recipe)), default=0)
    num_bytes = torch.float32.itemsize * (states + activations + experts) + COMPARISON_BYTES
    return WorkingSet(bytes=num_bytes, source="the comparison with the original")


def _total(modules: tuple[ModuleForecast, ...] | list[ModuleForecast]) -> WeightBytes:
    return WeightBytes(
        codes=sum(module.bytes.codes for module in modules),
        scales=sum(module.bytes.scales for module in modules),
        unquantized=sum(module.bytes.unquantized for module in modules),
    )
