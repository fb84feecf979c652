"""The one place that picks a kernel: native where the library, the CPU and the activations allow it, else torch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.errors import SettingError
from service.kernels import native, native_attention, native_encode, native_sampling, reference, self_check
from service.kernels.native import Library, NativeWeight
from service.kernels.native_attention import Attention, Rows, Stored
from service.numerics import encode as torch_encode
from service.numerics.encode import EncodedWeight
from service.numerics.schemes import NF4_DQ, QuantScheme
from service.numerics.storage import Buffers

logger = logging.getLogger(__name__)

FEW_ROWS: Final = 4
ISAS: Final = ("torch", "baseline", "avx2", "avx512", "amx")
"""What `select_isa` knows besides `auto`: no kernels of our own, then instruction sets, best last."""

_TORCH: Final = "torch"
_BFLOAT16: Final = torch.bfloat16
_DTYPES: Final = (_BFLOAT16, torch.float32)  # of activations that the library takes
_FLOAT32_ISAS: Final = ("baseline", "avx2")  # of its kernels for float32, best last
_wrong: set[str] = set()  # instruction sets whose results were seen to be wrong
_MAX_WEIGHTS: Final = 1 << 16  # that are kept described, some 300 bytes each


class Choice(NamedTuple):
    """Kernels, and why these."""

    isa: str
    why: str

    @property
    def kernel(self) -> str:
        """Name for reports: `torch`, or `native-` and the instruction set."""
        return _TORCH if self.isa == _TORCH else f"native-{self.isa}"


class _Kernels:
    """What is in use.

    Attributes:
        library: None for torch's operators.
        weights: those that were multiplied so far, by everything that describes one, so that a weight which moves, or
            another in its place, is described anew.
    """

    def __init__(self) -> None:
        self.weights: dict[tuple[object, ...], NativeWeight] = {}
        self.library: Library | None = None
        self.use(choose("auto"))

    def use(self, choice: Choice) -> None:
        library = None if choice.isa == _TORCH else native.load().library
        if library is not None:
            library.select(choice.isa)
        self.choice, self.library = choice, library

    def keep(self, key: tuple[object, ...], weight: NativeWeight) -> NativeWeight:
        if len(self.weights) >= _MAX_WEIGHTS:
            self.weights.clear()
        self.weights[key] = weight
        return weight


def obstacle(isa: str) -> str:
    """Why this machine cannot run the kernels of an instruction set; "" if it can."""
    if isa == _TORCH:
        return ""
    if isa in _wrong:
        return "its results were wrong on this machine"
    library, reason = native.load()
    return reason if library is None else library.obstacle(isa)


def choose(name: str) -> Choice:
    """What `--kernel-isa` of this value means here; `auto` is the best there is.

    Raises:
        SettingError: no such instruction set, or not on this machine.
    """
    usable = [isa for isa in ISAS if not obstacle(isa)]
    if name == "auto":
        best = usable[-1]
        if best == _TORCH:
            return Choice(best, native.load().obstacle)
        better = ISAS[ISAS.index(best) + 1 :]
        return Choice(best, "; ".join(["the best for this machine", *(f"{isa}: {obstacle(isa)}" for isa in better)]))
    if name not in ISAS:
        raise SettingError(f"--kernel-isa {name}: no instruction set of the kernels; use {_listed(usable)}")
    if name not in usable:
        raise SettingError(f"--kernel-isa {name}: {obstacle(name)}; use {_listed(usable)}")
    return Choice(name, "--kernel-isa says so")


def _listed(usable: list[str]) -> str:
    return f"{', '.join(['auto', *usable[:-1]])} or {usable[-1]}"


_kernels = _Kernels()


def select_isa(name: str, *, is_right: Callable[[Library], bool] = self_check.is_right) -> None:
    """Compute with these kernels from now on, in all threads, once their results are seen to be right.

    Raises:
        SettingError: as `choose`.
    """
    _kernels.use(choose(name))
    while _kernels.library is not None and not is_right(_kernels.library):
        logger.error("the kernels %s give wrong results on this machine; please report it", _kernels.choice.kernel)
        _wrong.add(_kernels.choice.isa)
        _kernels.use(choose(name))
    logger.info("kernels: %s (%s)", _kernels.choice.kernel, _kernels.choice.why)


def kernel_name(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> str:
    """Name of the kernels that activations on such a device and of such a dtype meet."""
    choice = _kernels.choice
    if choice.isa == _TORCH or device != "cpu" or dtype not in _DTYPES:
        return _TORCH
    if dtype == torch.float32 and choice.isa not in _FLOAT32_ISAS:
        choice = Choice([isa for isa in _FLOAT32_ISAS if not obstacle(isa)][-1], choice.why)
    return choice.kernel


def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """Compute x @ W.T + bias with the buffers of `numerics.encode`; no gradients.

    Args:
        x: float[..., in].
        bias: float[out] or None.

    Returns:
        float[..., out] of x's dtype.
    """
    library = _kernels.library
    if (
        library is None
        or x.dtype not in _DTYPES
        or not x.is_cpu
        or not native.takes(scheme)
        or (bias is not None and not _is_bias_for(x, bias, out_features))
    ):
        return _torch_linear(x, qweight, scales, zero_points, scheme=scheme, out_features=out_features, bias=bias)
    in_features = x.shape[-1]
    offsets = 0 if zero_points is None else zero_points.data_ptr()
    key = (qweight.data_ptr(), scales.data_ptr(), offsets, out_features, in_features, id(scheme))
    weight = _kernels.weights.get(key) or _kernels.keep(
        key,
        native.packed_weight(
            qweight, scales, zero_points, scheme=scheme, out_features=out_features, in_features=in_features
        ),
    )
    return library.linear(x, weight, bias)


def linear_unquantized(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ W.T + bias, natively for a few bfloat16 rows on the CPU; no gradients there.

    Args:
        x: float[..., in].
        weight: float[out, in] of x's dtype.
        bias: float[out] of x's dtype, or None.
    """
    library = _kernels.library
    if (
        library is None
        or x.dtype is not _BFLOAT16
        or not (x.is_cpu and weight.is_cpu)
        or x.numel() > FEW_ROWS * x.shape[-1]
        or weight.dtype is not _BFLOAT16
        or not weight.is_contiguous()
        or not weight.numel()
        or weight.shape[1] != x.shape[-1]
        or (bias is not None and not _is_bias_for(x, bias, len(weight)))
    ):
        return functional.linear(x, weight, bias)
    key = (weight.data_ptr(), *weight.shape)
    described = _kernels.weights.get(key) or _kernels.keep(key, native.unquantized_weight(weight))
    return library.linear(x, described, bias)


def encode(weight: Tensor, scheme: QuantScheme, *, into: Buffers | None = None) -> EncodedWeight:
    """Quantize and pack a weight: as `numerics.encode.encode`, natively where there is a kernel for it.

    Args:
        weight: float[out, in] on the CPU, finite, of any strides.
        into: buffers to fill; None makes new ones.

    Raises:
        QuantizationError: the weight is not 2-D, is empty, or holds NaN or infinity.
    """
    library = _kernels.library
    if scheme == NF4_DQ:
        return torch_encode.double_quantize(weight, encode, into=into)
    if library is None or not native_encode.takes(scheme) or not native_encode.is_encodable(weight):
        return torch_encode.encode(weight, scheme, into=into)
    return native_encode.encode(library, weight, scheme, into=into)


def sampling_library(logits: Tensor) -> Library | None:
    """The library, if it chooses tokens from such logits; None where torch has to."""
    library = _kernels.library
    return library if library is not None and native_sampling.takes(logits) else None


def attend(queries: Tensor, keys: Stored, values: Stored, rows: Rows, *, how: Attention) -> Tensor | None:
    """As `native_attention.attend` where the library can; None where torch has to."""
    library = _kernels.library
    if library is None or not native_attention.takes(queries, keys, values):
        return None
    return native_attention.attend(library, queries, keys, values, rows, how=how)


def _is_bias_for(x: Tensor, bias: Tensor, out_features: int) -> bool:
    """Whether the library can add it; torch takes all else, or says what is wrong."""
    return bias.dtype is x.dtype and bias.is_cpu and bias.is_contiguous() and bias.shape == (out_features,)


def _torch_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = reference.linear(rows, qweight, scales, zero_points, scheme=scheme, out_features=out_features, bias=bias)
    return y.view(*x.shape[:-1], out_features)
