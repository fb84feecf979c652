"""The kernel library of `native/`: loaded through ctypes, run on torch's thread pool.

A call passes its arguments as packed bytes, which Python makes in a third of the time that ctypes takes to convert
eight of them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from itertools import chain
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

import torch
from torch import Tensor

from service.errors import QuantizationError
from service.numerics.affine import NOT_FINITE
from service.numerics.codebook import levels
from service.numerics.packing import K_TILE, num_tiles
from service.numerics.schemes import QuantScheme
from service.numerics.storage import storage_shapes

PATH: Final = Path(__file__).with_name("libpennyweight_kernels.so")
"""Where pip puts the library."""

_VERSION: Final = 5  # PW_VERSION of native/kernels.h
_INT8, _TABLE4, _BF16 = range(3)  # enum pw_format
_SCALE_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum pw_scale_type
_NO_MEMORY, _NOT_FINITE = 2, 4  # enum pw_status
_DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}  # enum pw_dtype
_ROWS_OF_ONE_READ: Final = 4  # up to which a product takes about as long as reading the weight
_SHORT_BYTES: Final = 2 << 20  # to read, about 100 us on a desktop


class _Weight(ctypes.Structure):
    """`pw_weight` of native/kernels.h."""

    _fields_ = (
        ("qweight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("levels", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("has_offsets", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


TASKS: Final = ("pw_find_peaks", "pw_draw_tokens", "pw_read_logprobs", "pw_attend")
"""Functions of native/kernels.h that take one struct."""

_call_bytes = Struct("9q").pack  # `pw_linear_call` of native/kernels.h


class NativeWeight:
    """One weight as the library sees it; good for as long as its buffers stay where they are.

    Attributes:
        address: of its `pw_weight`.
        scheme: kept so that its identity, by which it is looked up, goes to no other.
        short_rows: rows up to which a product is short.
    """

    __slots__ = ("_described", "address", "out_features", "scheme", "short_rows")

    def __init__(self, described: _Weight, num_bytes: int, scheme: QuantScheme | None = None) -> None:
        self._described = described
        self.address = ctypes.addressof(described)
        self.scheme = scheme
        self.out_features: int = described.out_features
        self.short_rows = _ROWS_OF_ONE_READ * _SHORT_BYTES // num_bytes if num_bytes <= _SHORT_BYTES else 0


@cache
def takes(scheme: QuantScheme) -> bool:
    """Whether the library has a kernel for a scheme; torch multiplies with others."""
    if scheme.named and not scheme.is_block:
        return scheme.named in ("nf4", "fp4")
    return scheme.bits == 4 or (scheme.bits == 8 and scheme.offset == "sym")


def packed_weight(
    qweight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    scheme: QuantScheme,
    out_features: int,
    in_features: int,
) -> NativeWeight:
    """Describe the buffers that `numerics.encode` made, on the CPU."""
    shapes = storage_shapes(out_features, in_features, scheme)
    for buffer, spec in zip((qweight, scales, zero_points), shapes, strict=True):
        assert (buffer is None) == (spec is None)
        if buffer is not None and spec is not None:
            assert (tuple(buffer.shape), buffer.dtype, buffer.is_cpu) == (*spec, True)
            assert buffer.is_contiguous()
    described = _Weight(
        qweight=qweight.data_ptr(),
        scales=scales.data_ptr(),
        zero_points=None if zero_points is None else zero_points.data_ptr(),
        levels=None if scheme.bits == 8 else ctypes.addressof(_levels(scheme)),
        out_features=out_features,
        in_features=in_features,
        # Whole rows have nothing but scales; what has more is one group.
        group_size=scheme.group_size or (0 if scheme.offset == "sym" else num_tiles(in_features) * K_TILE),
        format=_INT8 if scheme.bits == 8 else _TABLE4,
        scale_type=_SCALE_TYPES[scales.dtype],
        has_offsets=scheme.offset == "float",
    )
    return NativeWeight(described, shapes.codes_bytes, scheme)


def unquantized_weight(weight: Tensor) -> NativeWeight:
    """Describe bfloat16[out, in], contiguous, on the CPU."""
    out_features, in_features = weight.shape
    described = _Weight(qweight=weight.data_ptr(), out_features=out_features, in_features=in_features, format=_BF16)
    return NativeWeight(described, weight.nbytes)


class Library:
    """The loaded library.

    Attributes:
        isas: instruction sets that are built in, best first.
    """

    def __init__(self, path: Path) -> None:
        # A short call holds on to Python's lock: to get it back from a busy thread can take 5 ms, the switch interval.
        # A long one lets other threads run.
        short, long = ctypes.PyDLL(str(path)), ctypes.CDLL(str(path))
        version = short.pw_version()
        if version != _VERSION:
            raise OSError(f"it is of version {version} and not {_VERSION}: install again, so that it is built anew")
        self._short_linear, self._long_linear = short.pw_linear_packed, long.pw_linear_packed
        for function in (self._short_linear, self._long_linear):
            function.argtypes = [ctypes.c_char_p]
        self._encode = long.pw_encode
        self._encode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_double)] * 2]
        self._read = long.pw_read
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_uint64)]
        self._tasks = {name: (getattr(short, name), getattr(long, name)) for name in TASKS}
        for function in chain.from_iterable(self._tasks.values()):
            function.argtypes = [ctypes.c_char_p]
        self._select = short.pw_select
        self._obstacle = short.pw_isa_obstacle
        self._obstacle.restype = short.pw_isas.restype = ctypes.c_char_p
        self.isas = tuple(short.pw_isas().decode().split())
        self._run_on_torch_threads(short)

    @staticmethod
    def _run_on_torch_threads(library: ctypes.CDLL) -> None:
        """Hand over torch's pool by address, so that the library needs no part of torch."""
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        functions = (torch_library.torch_parallel_for, torch_library.torch_get_num_threads)
        library.pw_init.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.pw_init.restype = None
        library.pw_init(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))

    def obstacle(self, isa: str) -> str:
        """Why this machine cannot run an instruction set; "" if it can."""
        found: bytes | None = self._obstacle(isa.encode())
        return "it is not built in" if found is None else found.decode()

    def select(self, isa: str) -> None:
        """Compute with an instruction set from now on, in all threads; one without an obstacle."""
        status = self._select(isa.encode())
        assert status == 0

    def linear(self, x: Tensor, weight: NativeWeight, bias: Tensor | None) -> Tensor:
        """Compute x @ W.T + bias.

        Args:
            x: bfloat16[..., in] or, with a packed weight, float32[..., in], on the CPU.
            bias: [out] of x's dtype and contiguous, or None.

        Returns:
            [..., out] of x's dtype, the same for any number of threads.
        """
        *leading, row_stride = x.shape
        rows = x.numel() // row_stride
        y = x.new_empty(*leading, weight.out_features)
        if not x.is_contiguous():
            x = x.reshape(rows, row_stride)
            x = x if x.stride(1) == 1 and x.stride(0) >= row_stride else x.contiguous()
            row_stride = x.stride(0)
        call = _call_bytes(
            weight.address,
            x.data_ptr(),
            rows,
            row_stride,
            y.data_ptr(),
            weight.out_features,
            0 if bias is None else bias.data_ptr(),
            0,
            _DTYPES[x.dtype],
        )
        status = (self._short_linear if rows <= weight.short_rows else self._long_linear)(call)
        if status:
            _raise(status)
        return y

    def encode(self, weight: NativeWeight, source: ctypes.Structure) -> tuple[float, float]:
        """Fill the buffers of a weight.

        Args:
            source: a `pw_source` of native/kernels.h.

        Returns:
            Sums of the squares of the weights and of their errors.

        Raises:
            QuantizationError: the source holds NaN or infinity.
        """
        signal, noise = ctypes.c_double(), ctypes.c_double()
        status = self._encode(weight.address, ctypes.addressof(source), ctypes.byref(signal), ctypes.byref(noise))
        if status:
            _raise(status)
        return signal.value, noise.value

    def run(self, name: str, task: bytes, num_bytes: int) -> None:
        """Call one of `TASKS`.

        Args:
            task: the struct that it takes, packed.
            num_bytes: that it reads.
        """
        status = self._tasks[name][num_bytes > _SHORT_BYTES](task)
        if status:
            _raise(status)

    def read(self, data: Tensor) -> int:
        """Sum the 64-bit words of a contiguous tensor on the CPU, modulo 2**64, as quickly as memory allows."""
        total = ctypes.c_uint64()
        status = self._read(data.data_ptr(), data.nbytes, ctypes.byref(total))
        if status:
            _raise(status)
        return total.value


class Loaded(NamedTuple):
    """The library, or why there is none."""

    library: Library | None
    obstacle: str


@cache
def load() -> Loaded:
    """Load the library, once."""
    if not PATH.is_file():
        return Loaded(None, "the kernel library is not installed; pip builds it where it finds a C++ compiler")
    try:
        return Loaded(Library(PATH), "")
    except (OSError, AttributeError) as error:  # of another machine, another version, or another torch
        return Loaded(None, f"the kernel library cannot be loaded: {error}")


@cache
def _levels(scheme: QuantScheme) -> ctypes.Array[ctypes.c_float]:
    """What 4-bit codes stand for: float32[16]."""
    return (ctypes.c_float * 16)(*levels(scheme).tolist())


def _raise(status: int) -> None:
    if status == _NOT_FINITE:
        raise QuantizationError(NOT_FINITE)
    if status == _NO_MEMORY:
        raise MemoryError("the kernel library found no memory to work in")
    raise RuntimeError(
        f"the kernel library ended a call with status {status} of pw_status; --kernel-isa torch does without it"
    )
