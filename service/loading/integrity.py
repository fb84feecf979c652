"""The honesty check: the last act of a load, which names whatever is not what it should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from service.errors import CheckpointError, ModelError, UnsupportedModel
from service.layers.replace import Slot
from service.loading.record import LoadRecord
from service.loading.report import HonestyReport, WeightBytes

MIN_COVERAGE = 0.9  # share of the weights with an assigned scheme that must carry it
_CHUNK = 1 << 22  # elements looked at together, so that the check needs no memory to speak of


def check_names(info: Mapping[str, Any], record: LoadRecord, shared_heads: Iterable[str]) -> None:
    """Every parameter was in the checkpoint, every checkpoint tensor was used, all shapes fit.

    Args:
        info: the loading info of `from_pretrained`.
        shared_heads: weights that a checkpoint may hold a second time because they are tied.

    Raises:
        CheckpointError: with the names.
    """
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{name} has shape {list(found)} in the checkpoint, the config asks for {list(expected)} "
            f"({len(mismatched)} such tensors); config and weights belong to different models"
        )
    missing = set(info["missing_keys"]) - record.buffer_names  # a layer's `weight` stands for them
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_listed(missing)}; config and weights belong to different models, or "
            "a shard is incomplete"
        )
    unfilled = record.layers.keys() - record.encoded.keys() - record.unread.keys()
    if unfilled:
        raise CheckpointError(
            f"the checkpoint holds no weight of its own for {_listed(unfilled)}, which the model shares in a way that "
            "this version does not know; serve this model with --quantize none"
        )
    unexpected = set(info["unexpected_keys"]) - set(shared_heads)
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {_listed(unexpected)}, which the model of its config has not; config and weights "
            "belong to different models"
        )


def check_tensors(model: nn.Module) -> None:
    """Nothing is left on meta, and no float tensor holds NaN or infinity.

    Raises:
        CheckpointError: with the names.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    on_meta = [name for name, tensor in tensors if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"nothing filled {_listed(on_meta)}; the checkpoint does not hold the whole model")
    nonfinite = [name for name, tensor in tensors if tensor.is_floating_point() and not _finite(tensor)]
    if nonfinite:
        raise CheckpointError(
            f"NaN or infinite values in {_listed(nonfinite)}; the checkpoint is damaged, download it again"
        )


def check_coverage(record: LoadRecord) -> None:
    """At least 90 % of the weights that the recipe quantizes are quantized, and none became zero.

    Raises:
        UnsupportedModel: too few weights are in layers that this version quantizes.
        ModelError: a layer's codes are all zero although its weight is not.
    """
    assigned = _assigned(record)
    total = sum(slot.shape[0] * slot.shape[1] for slot in assigned)
    carried = sum(slot.shape[0] * slot.shape[1] for slot in assigned if slot.name in record.encoded)
    if carried < MIN_COVERAGE * total:
        left = [slot.name for slot in assigned if slot.name not in record.encoded]
        raise UnsupportedModel(
            f"only {carried / total:.0%} of the weights that the recipe quantizes can be quantized, at least "
            f"{MIN_COVERAGE:.0%} must; not quantized: {_listed(left)}; serve this model with --quantize none"
        )
    zeroed = [name for name, error in record.encoded.items() if error.signal > 0 and error.noise >= error.signal]
    if zeroed:
        raise ModelError(f"quantization left nothing of {_listed(zeroed)}; use a recipe with more bits there")


def check_plan(held: WeightBytes, planned: WeightBytes) -> None:
    """The model holds what was planned, to the byte.

    Raises:
        ModelError: with both figures.
    """
    if held != planned:
        raise ModelError(
            f"the loaded model holds {held.total} bytes ({held}), {planned.total} were planned ({planned}); this "
            "version counts this kind of model wrongly: please report it"
        )


def findings(model: nn.Module, record: LoadRecord, planned: WeightBytes) -> HonestyReport:
    """What the checks above looked at, of a model that has passed them."""
    assigned = _assigned(record)
    return HonestyReport(
        num_tensors=sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers()),
        num_assigned=len(assigned),
        num_quantized=sum(slot.name in record.encoded for slot in assigned),
        planned_bytes=planned.total,
    )


def _assigned(record: LoadRecord) -> list[Slot]:
    """Weights that the recipe quantizes, those that share another's storage left out."""
    return [slot for slot in record.slots if not slot.scheme.is_none and not slot.shares]


def _finite(tensor: Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    # A sum is finite only if all terms are, and is several times faster; one that overflows is looked at again.
    return all(
        math.isfinite(chunk.sum().item()) or bool(torch.isfinite(chunk).all()) for chunk in torch.split(flat, _CHUNK)
    )


def _listed(names: Iterable[str]) -> str:
    """The first three names and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - 3
    return ", ".join(ordered[:3]) + (f" and {more} more" if more > 0 else "")
