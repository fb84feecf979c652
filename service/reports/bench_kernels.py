"""Products with packed weights beside a read of the same bytes and beside bf16 `F.linear`, in turns.

A round has, for one shape and one number of rows, `F.linear` once and, for every scheme, the product, a read of
packed bytes, and the product of one row. Seconds are medians over rounds; a ratio is the median of the ratios of
each round.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from service.errors import SettingError
from service.kernels import dispatch, native
from service.layers.linear import quantized_linear
from service.loading import memory
from service.numerics.schemes import QuantScheme
from service.reports.bench_options import KernelBench, Shape
from service.reports.bench_runs import Copies, Run, calling_run, in_turns, median_ratio, reading_run, seconds_of
from service.reports.hardware import describe_machine, last_level_cache_bytes

MIN_FOOTPRINT_BYTES: Final = 256 << 20
_READ_CHECK_ROUNDS = 7
_ENCODER_SHAPE: Final = Shape(2048, 5632)
"""Of the matrices that are encoded: a projection of TinyLlama-1.1B, as large as a layer of a model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One scheme, shape and number of rows.

    Attributes:
        seconds: of one product.
        bytes_per_s: packed bytes by these seconds.
        read_bytes_per_s: of reading packed bytes of this weight, in the same rounds.
        read_ratio: share of that rate that the product reaches: 1 is as fast as the read.
        linear_ratio: seconds by those of bf16 `F.linear`: below 1 is faster.
        one_row_ratio: seconds by those of one row.
        packed_bytes: codes with padding, scales and zero points.
        footprint_bytes: of all copies of the packed weight.
    """

    scheme: str
    rows: int
    k: int
    n: int
    kernel: str
    seconds: float
    bytes_per_s: float
    read_bytes_per_s: float
    bf16_linear_seconds: float
    read_ratio: float
    linear_ratio: float
    one_row_ratio: float
    packed_bytes: int
    footprint_bytes: int
    bf16_footprint_bytes: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCheck:
    """The read that products are held against, beside the sum that torch takes of the same bytes as int64."""

    scheme: str
    k: int
    n: int
    footprint_bytes: int
    read_bytes_per_s: float
    torch_sum_bytes_per_s: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRow:
    """Quantizing and packing of bf16 matrices of the size of a layer, beside a read of them.

    Every call allocates its buffers anew, as at load. They stay below the 32 MiB up to which the allocator hands out
    freed memory again, and a first pass over all matrices is not counted: page faults are hardly among the seconds.

    Attributes:
        num_parameters: of one matrix.
        source_bytes: of one matrix in bf16.
        footprint_bytes: of all matrices, which take turns.
        seconds: of one matrix.
        bytes_per_s: source bytes by these seconds.
        read_bytes_per_s: of reading the sources, in the same rounds.
        read_ratio: share of that rate that the encoder reaches.
    """

    scheme: str
    num_parameters: int
    source_bytes: int
    footprint_bytes: int
    seconds: float
    bytes_per_s: float
    read_bytes_per_s: float
    read_ratio: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Everything that was measured; `footprint` says how large it was to be, and why."""

    machine: dict[str, Any]
    footprint: dict[str, int | bool]
    read_kernel: str
    read_check: list[ReadCheck]
    rows: list[KernelRow]
    encoders: list[EncoderRow]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


class Reader(NamedTuple):
    """How bytes are read at the speed of memory: `read` takes uint8[a multiple of 8]."""

    name: str
    read: Callable[[Tensor], object]


def find_reader() -> Reader:
    """The read of the kernel library; without it, torch's sum."""
    library = native.load().library
    return Reader("torch.sum", _torch_sum) if library is None else Reader("native", library.read)


def _torch_sum(data: Tensor) -> Tensor:
    return torch.sum(data.view(torch.int64))


class PackedCopies:
    """Copies of one encoded weight, each in a layer of its own, as serving holds them."""

    def __init__(self, weight: Tensor, scheme: QuantScheme, footprint_bytes: int) -> None:
        encoded = dispatch.encode(weight, scheme)
        zero_points = [] if encoded.zero_points is None else [encoded.zero_points]
        self.copies = Copies([encoded.qweight, encoded.scales, *zero_points], footprint_bytes)
        self.layers = []
        out_features, in_features = weight.shape
        for qweight, scales, *rest in self.copies.parts:
            with torch.device("meta"):
                layer = quantized_linear(in_features, out_features, scheme, bias=False, dtype=torch.bfloat16)
            layer.fill(encoded._replace(qweight=qweight, scales=scales, zero_points=rest[0] if rest else None))
            self.layers.append(layer)

    def run(self, x: Tensor) -> Run:
        """A run of products with x."""
        return calling_run(self.copies, [partial(layer.forward, x) for layer in self.layers])


class ShapeUnderTest:
    """Weights of one shape, in bf16 and in all schemes, with copies of each."""

    def __init__(self, shape: Shape, schemes: Sequence[QuantScheme], footprint_bytes: int, reader: Reader) -> None:
        self._shape, self._reader = shape, reader
        weight = _random_weight(shape.n, shape.k)
        self._bf16 = Copies([weight], footprint_bytes)
        self._packed = {scheme.name: PackedCopies(weight, scheme, footprint_bytes) for scheme in schemes}

    def read_checks(self) -> Iterator[ReadCheck]:
        """The read beside torch's, over all copies of each scheme."""
        for scheme, packed in self._packed.items():
            data = packed.copies.memory
            calls = partial(self._reader.read, data), partial(_torch_sum, data)
            rounds = [[seconds_of([call]) for call in calls] for _ in range(_READ_CHECK_ROUNDS)]
            read_s, sum_s = zip(*rounds, strict=True)
            yield ReadCheck(
                scheme=scheme,
                **self._shape._asdict(),
                footprint_bytes=data.nbytes,
                read_bytes_per_s=data.nbytes / median(read_s),
                torch_sum_bytes_per_s=data.nbytes / median(sum_s),
                ratio=median_ratio(sum_s, read_s),
            )

    @torch.inference_mode()
    def measure(self, num_rows: int, wanted_s: float) -> list[KernelRow]:
        """All schemes at one number of rows, in the same rounds."""
        x = torch.randn(num_rows, self._shape.k).bfloat16()
        linears = [partial(functional.linear, x, weight) for (weight,) in self._bf16.parts]
        runs = {"linear": calling_run(self._bf16, linears)}
        for scheme, packed in self._packed.items():
            runs[f"{scheme} product"] = packed.run(x)
            runs[f"{scheme} read"] = reading_run(packed.copies, self._reader.read)
            if num_rows > 1:
                runs[f"{scheme} one row"] = packed.run(x[:1])
        times = in_turns(runs, wanted_s)
        return [self._row(scheme, num_rows, times) for scheme in self._packed]

    def _row(self, scheme: str, num_rows: int, times: Mapping[str, Sequence[float]]) -> KernelRow:
        linear_s, product_s, read_s = times["linear"], times[f"{scheme} product"], times[f"{scheme} read"]
        one_row_s = times.get(f"{scheme} one row", product_s)
        copies = self._packed[scheme].copies
        return KernelRow(
            scheme=scheme,
            rows=num_rows,
            **self._shape._asdict(),
            kernel=dispatch.kernel_name(),
            seconds=median(product_s),
            bytes_per_s=copies.num_bytes / median(product_s),
            read_bytes_per_s=copies.num_bytes / median(read_s),
            bf16_linear_seconds=median(linear_s),
            read_ratio=median_ratio(read_s, product_s),
            linear_ratio=median_ratio(product_s, linear_s),
            one_row_ratio=median_ratio(product_s, one_row_s),
            packed_bytes=copies.num_bytes,
            footprint_bytes=copies.memory.nbytes,
            bf16_footprint_bytes=self._bf16.memory.nbytes,
            rounds=len(product_s),
        )


def measure(
    bench: KernelBench, *, num_threads: int, kernel_isa: str, on_progress: Callable[[str, int, int], None]
) -> KernelReport:
    """Run a benchmark on torch's threads.

    Args:
        on_progress: told what comes next, how many points are done, and of how many.

    Raises:
        SettingError: a weight does not fit into memory, or the machine has no such kernels.
    """
    started = time.perf_counter()
    dispatch.select_isa(kernel_isa)
    reader = find_reader()
    torch.set_num_threads(num_threads)
    footprint = _footprint(bench)
    footprint_bytes = int(footprint["bytes"])
    encoded_schemes = bench.schemes if bench.encoder_parameters else ()
    steps = len(bench.shapes) * len(bench.rows) + len(encoded_schemes)
    machine = describe_machine(num_threads) | {"onednn": _onednn_version()}
    checks: list[ReadCheck] = []
    rows: list[KernelRow] = []
    for shape in bench.shapes:
        on_progress(f"{shape.k}x{shape.n}: packing", len(rows) // len(bench.schemes), steps)
        weights = ShapeUnderTest(shape, bench.schemes, footprint_bytes, reader)
        checks += weights.read_checks()
        for num_rows in bench.rows:
            on_progress(f"{shape.k}x{shape.n}: {num_rows} rows", len(rows) // len(bench.schemes), steps)
            rows += weights.measure(num_rows, bench.seconds_per_point)
        del weights  # before the next ones are made
    encoders = []
    for index, scheme in enumerate(encoded_schemes):
        on_progress(f"{scheme.name}: encoding", steps - len(encoded_schemes) + index, steps)
        encoders.append(_measure_encoder(scheme, bench, footprint_bytes, reader))
    on_progress("done", steps, steps)
    return KernelReport(
        machine=machine,
        footprint=footprint,
        read_kernel=reader.name,
        read_check=checks,
        rows=rows,
        encoders=encoders,
        seconds=time.perf_counter() - started,
    )


def _footprint(bench: KernelBench) -> dict[str, int | bool]:
    """Bytes of copies to go through, of each scheme and of bf16: by default all in a quarter of what is available.

    Raises:
        SettingError: what is to be measured does not fit into memory.
    """
    available, cache = memory.available_bytes(), last_level_cache_bytes()
    num_sets = len(bench.schemes) + 1
    wanted = bench.footprint_bytes or max(2 * cache, MIN_FOOTPRINT_BYTES)
    footprint = wanted if bench.footprint_bytes else min(wanted, available // 4 // num_sets)
    for shape in bench.shapes:
        # Up to two copies and the weight they are made of, in bf16 or smaller, and a float32 draft of it.
        needed = num_sets * (footprint + 6 * shape.num_weights) + 4 * shape.num_weights
        if needed > available:
            raise SettingError(
                f"--shapes {shape.k}x{shape.n}: takes {needed} bytes, and {available} are available; "
                "leave it out, or give a smaller --footprint"
            )
    needed = _encoder_bytes(bench, footprint)
    if needed > available:
        raise SettingError(
            f"--encoder-parameters {bench.encoder_parameters}: takes {needed} bytes, and {available} are available; "
            "give fewer, or 0 to leave the encoders out"
        )
    return {"bytes": footprint, "last_level_cache_bytes": cache, "is_limited_by_memory": footprint < wanted}


def _encoder_shape(bench: KernelBench) -> Shape:
    """Of each matrix to encode; a smaller one if fewer parameters are wanted."""
    wanted = bench.encoder_parameters // _ENCODER_SHAPE.k
    return _ENCODER_SHAPE._replace(n=max(1, min(wanted, _ENCODER_SHAPE.n)))


def _encoder_bytes(bench: KernelBench, footprint_bytes: int) -> int:
    """Memory that timing an encoder takes."""
    if bench.encoder_parameters == 0:
        return 0
    # The copies, up to two more, the weight they are made of, and its codes, or in torch's encoder float32 drafts.
    return max(footprint_bytes, 2 * bench.encoder_parameters) + 24 * _encoder_shape(bench).num_weights


def _measure_encoder(scheme: QuantScheme, bench: KernelBench, footprint_bytes: int, reader: Reader) -> EncoderRow:
    """Encode matrices in turns with reading them."""
    shape = _encoder_shape(bench)
    weight = _random_weight(shape.n, shape.k)
    copies = Copies([weight], max(footprint_bytes, 2 * bench.encoder_parameters))
    calls = [partial(dispatch.encode, source, scheme) for (source,) in copies.parts]
    seconds_of(calls)  # leaves the allocator with memory that it hands out again
    runs = {"encode": calling_run(copies, calls), "read": reading_run(copies, reader.read)}
    times = in_turns(runs, bench.seconds_per_point)
    seconds = median(times["encode"])
    return EncoderRow(
        scheme=scheme.name,
        num_parameters=weight.numel(),
        source_bytes=weight.nbytes,
        footprint_bytes=copies.memory.nbytes,
        seconds=seconds,
        bytes_per_s=weight.nbytes / seconds,
        read_bytes_per_s=weight.nbytes / median(times["read"]),
        read_ratio=median_ratio(times["read"], times["encode"]),
        rounds=len(times["encode"]),
    )


def _random_weight(out_features: int, in_features: int) -> Tensor:
    """bfloat16[out, in], the same for every scheme and every benchmark."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(out_features, in_features, dtype=torch.bfloat16)
    return weight.normal_(std=in_features**-0.5, generator=generator)


def _onednn_version() -> str | None:
    """Version of the library that multiplies bf16 matrices for torch."""
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return None if found is None else found[1]
