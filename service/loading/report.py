"""The load report: what quantization did to each layer, and what the load cost. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One linear or embedding weight.

    Attributes:
        name: full module name.
        shape: (out_features, in_features) of the weight.
        scheme: canonical scheme, `none` if it stayed as it was.
        reason: why it has this scheme, in words, where that is not simply the recipe's; else "".
        bytes: codes, scales and zero points, or the unquantized weight; 0 if it shares another layer's storage.
        bits_per_weight: 8 * bytes of its storage / number of weights.
        relative_error: ||w - w'|| / ||w||, Frobenius; 0 for `none`.
        sqnr_db: -20 log10(relative_error); None where the error is 0.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    reason: str
    bytes: int
    bits_per_weight: float
    relative_error: float
    sqnr_db: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Bytes of all parameters and persistent buffers, tied tensors once.

    Attributes:
        codes: packed codes, padding included.
        scales: scales, zero points and offsets.
        unquantized: everything else.
    """

    codes: int
    scales: int
    unquantized: int

    @property
    def total(self) -> int:
        """All three kinds."""
        return self.codes + self.scales + self.unquantized


@dataclass(frozen=True, slots=True, kw_only=True)
class HonestyReport:
    """What was looked at before the model served; all of it passed: a check that fails ends the load.

    Attributes:
        num_tensors: parameters and buffers; all are in memory, and hold neither NaN nor infinity.
        num_assigned: weights for which the recipe has a scheme, those that share another's storage left out.
        num_quantized: of these, those that carry it and are not zero; the report of each other layer has its reason.
        planned_bytes: of weights, before any was read; the model holds as many.
        num_probed_tokens: of a forward by the model's own code and by the service's, all logits of which were finite.
    """

    num_tensors: int
    num_assigned: int
    num_quantized: int
    planned_bytes: int
    num_probed_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `GET /v1/quantization` shows and the weight metrics export.

    Attributes:
        recipe: canonical text of the whole recipe.
        scheme: the `scheme` metric label: the canonical scheme, or `mixed-` and 8 hex digits.
        dtype: serving dtype, such as `bfloat16`.
        device: `cpu` or `cuda`.
        kernel: name of the kernels in use: `torch`, or `native-` and an instruction set.
        revision: hub commit, or "local".
        weight_hash: see `fingerprint.weight_hash`.
        weight_bytes: by kind.
        original_bytes: what scheme `none` would hold at the serving dtype, tied tensors once.
        num_parameters: number of weights of the original model, tied tensors once.
        phase_seconds: wall seconds by phase (`read`, `quantize`, `pack`, `install`, `cache_write`, `probe`); `read` is
            what the load waited for files, without what was read while it encoded; `cache_write` is 0 until the model
            has been written into the cache, beside the first requests.
        total_seconds: first byte read to last buffer filled.
        peak_bytes: peak resident bytes of the process until ready by place (`host`, `device`).
        resident_before_bytes: resident bytes of the process when the load began.
        honesty: what was checked.
        layers: one row per linear or embedding weight.
    """

    recipe: str
    scheme: str
    dtype: str
    device: str
    kernel: str
    revision: str
    weight_hash: str
    weight_bytes: WeightBytes
    original_bytes: int
    num_parameters: int
    phase_seconds: dict[str, float]
    total_seconds: float
    peak_bytes: dict[str, int]
    resident_before_bytes: int
    honesty: HonestyReport
    layers: tuple[LayerReport, ...]

    @property
    def fingerprint(self) -> str:
        """Scheme and weights in one short word, for answers."""
        return f"{self.scheme}-{self.weight_hash[:12]}"

    @property
    def saving_ratio(self) -> float:
        """1 - weight bytes / original bytes; negative if quantization cost memory."""
        return 1 - self.weight_bytes.total / self.original_bytes

    @property
    def bits_per_parameter(self) -> float:
        """8 * weight bytes / number of parameters."""
        return 8 * self.weight_bytes.total / self.num_parameters
