"""Exact bytes of a loaded model, by kind and by layer: sums over tensors, never differences of free memory."""

from __future__ import annotations

import math

from torch import nn

from service.layers.replace import Slot
from service.loading.record import LoadRecord
from service.loading.report import LayerReport, WeightBytes


def weight_bytes(model: nn.Module, record: LoadRecord) -> WeightBytes:
    """Bytes of all parameters and persistent buffers by kind, storages that several names share once."""
    codes = {f"{name}.qweight" for name in record.layers}
    scales = {f"{name}.{leaf}" for name in record.layers for leaf in ("scales", "zero_points")}
    sums = {"codes": 0, "scales": 0, "unquantized": 0}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kind = "codes" if name in codes else "scales" if name in scales else "unquantized"
        sums[kind] += tensor.nbytes
    return WeightBytes(**sums)


def layer_reports(model: nn.Module, record: LoadRecord) -> tuple[LayerReport, ...]:
    """One row per weight that the recipe decided about, in module order."""
    return tuple(_layer_report(model, record, slot) for slot in record.slots)


def _layer_report(model: nn.Module, record: LoadRecord, slot: Slot) -> LayerReport:
    storage = slot.shares or slot.name
    encoded = record.encoded.get(storage)
    num_weights = slot.shape[0] * slot.shape[1]
    if encoded is None:
        num_bytes, scheme, relative_error = model.get_parameter(slot.parameter).nbytes, "none", 0.0
    else:
        num_bytes = _storage_bytes(model.get_submodule(storage))
        scheme, relative_error = slot.scheme.name, math.sqrt(encoded.noise / encoded.signal) if encoded.signal else 0.0
    return LayerReport(
        name=slot.name,
        shape=slot.shape,
        scheme=scheme,
        reason=_reason(slot, is_quantized=encoded is not None),
        bytes=0 if slot.shares else num_bytes,
        bits_per_weight=8 * num_bytes / num_weights,
        relative_error=relative_error,
        sqnr_db=-20 * math.log10(relative_error) if relative_error > 0 else None,
    )


def _storage_bytes(layer: nn.Module) -> int:
    return sum(buffer.nbytes for buffer in layer.buffers())


def _reason(slot: Slot, *, is_quantized: bool) -> str:
    if slot.shares or slot.scheme.is_none or is_quantized:
        return slot.reason
    return slot.obstacle
