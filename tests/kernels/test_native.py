"""The kernel library: what it exports and needs, how it is found, threads, and wrong arguments."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.kernels import dispatch, native
from service.kernels.native import Library
from service.layers.linear import QuantizedLinear, quantized_linear
from service.numerics.encode import encode
from service.numerics.schemes import parse_scheme
from tests.floors import ROOT
from tests.kernels.support import computing_with

SCHEMES = ["w8a16", "w8a16-g32", "w4a16-g64", "nf4"]
LIBRARY = native.load().library
ISAS = [] if LIBRARY is None else [isa for isa in LIBRARY.isas if not LIBRARY.obstacle(isa)]
HEADER = (ROOT / "service" / "kernels" / "native" / "kernels.h").read_text(encoding="utf-8")
needs_library = pytest.mark.skipif(LIBRARY is None, reason=native.load().obstacle)


@pytest.fixture
def library() -> Library:
    assert LIBRARY is not None
    return LIBRARY


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, one after another."""
    name: str = request.param
    with computing_with(name):
        yield name


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads in torch's pool, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def make_layer(name: str, out_features: int, in_features: int) -> QuantizedLinear:
    scheme = parse_scheme(name)
    layer = quantized_linear(in_features, out_features, scheme, bias=False, dtype=torch.bfloat16)
    layer.fill(encode(normal(out_features, in_features), scheme))
    return layer


def test_a_compiler_here_means_that_there_is_a_library() -> None:
    assert LIBRARY is not None or shutil.which("c++") is None, native.load().obstacle


@needs_library
def test_the_header_and_this_package_are_of_one_version() -> None:
    (version,) = re.findall(r"#define PW_VERSION (\d+)", HEADER)
    assert int(version) == native._VERSION


@needs_library
def test_the_baseline_is_always_there_and_the_best_comes_first(library: Library) -> None:
    assert library.isas[-1] == "baseline"
    assert library.obstacle("baseline") == ""
    assert list(library.isas) == [isa for isa in reversed(dispatch.ISAS) if isa in library.isas]


@needs_library
def test_instruction_sets_are_those_that_linux_tells_of(library: Library) -> None:
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16"},
    }
    needs["avx512"] |= needs["avx2"]
    needs["amx"] = needs["avx512"] | {"amx_tile", "amx_bf16"}
    for isa in needs.keys() & set(library.isas):
        refused = "refuses" in library.obstacle(isa)  # amx alone: tiles are asked for, and a system may say no
        assert refused or (library.obstacle(isa) == "") == (needs[isa] <= words)


@needs_library
def test_an_instruction_set_that_is_not_built_in_has_an_obstacle(library: Library) -> None:
    assert library.obstacle("avx1024") == "it is not built in"


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_library_needs_nothing_but_the_c_library_and_exports_its_interface() -> None:
    dynamic = subprocess.run(["readelf", "-dW", native.PATH], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    assert needed <= {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", native.PATH], capture_output=True, text=True, check=True)
    exported = set(re.findall(r"GLOBAL DEFAULT +\d+ (\w+)", symbols.stdout))
    assert exported == set(re.findall(r"^PW_EXPORT .*?(pw_\w+)\(", HEADER, re.MULTILINE))


@needs_library
@pytest.mark.parametrize("rows", [1, 3, 7, 40])
@pytest.mark.parametrize("size", [(640, 576), (1000, 1111)], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.usefixtures("two_threads", "isa")
def test_results_are_the_same_for_any_number_of_threads(name: str, size: tuple[int, int], rows: int) -> None:
    layer, x = make_layer(name, *size), normal(rows, size[1]).bfloat16()
    by_two = layer(x)
    torch.set_num_threads(1)
    assert torch.equal(layer(x), by_two)


@needs_library
@pytest.mark.usefixtures("two_threads", "isa")
def test_threads_of_python_may_multiply_at_once() -> None:
    layers = [make_layer(name, 640, 576) for name in SCHEMES]
    inputs = [normal(rows, 576).bfloat16() for rows in (1, 6, 30)]
    expected = [[layer(x) for x in inputs] for layer in layers]
    failures: list[str] = []

    def multiply() -> None:
        for _ in range(20):
            for layer, results in zip(layers, expected, strict=True):
                for x, y in zip(inputs, results, strict=True):
                    if not torch.equal(layer(x), y):
                        failures.append(f"{layer} with {len(x)} rows")

    threads = [threading.Thread(target=multiply) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@needs_library
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.usefixtures("isa")
def test_rows_with_space_between_them_need_no_copy_to_be_right(rows: int) -> None:
    layer, wide = make_layer("w4a16-g64", 48, 100), normal(rows, 131).bfloat16()
    for x in (wide[:, :100], wide[:, 31:], wide[:, ::1][:, 1:101], normal(100, rows).bfloat16().t()):
        assert torch.equal(layer(x), layer(x.contiguous()))
    repeated = wide[:1, :100].expand(rows, 100)
    assert torch.equal(layer(repeated), layer(repeated.contiguous()))


@needs_library
def test_a_module_whose_buffers_are_replaced_computes_with_the_new_ones() -> None:
    layer, x = make_layer("w8a16", 64, 96), normal(2, 96).bfloat16()
    before = layer(x)
    other = encode(normal(64, 96).neg_(), layer.scheme)
    layer.fill(other)
    assert torch.equal(layer(x), -before)
    layer.to("meta").to_empty(device="cpu")
    layer.fill(other)
    assert torch.equal(layer(x), -before)


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("num_words", [0, 1, 7, 1000, (1 << 17) + 3])
def test_read_sums_every_word_once(library: Library, isa: str, num_words: int) -> None:
    words = torch.randint(-(2**62), 2**62, (num_words,), generator=torch.Generator().manual_seed(num_words))
    assert library.read(words) == int(words.sum()) % 2**64, isa


@needs_library
def test_bytes_that_are_no_words_are_refused(library: Library) -> None:
    with pytest.raises(RuntimeError, match="ended a call with status 1"):
        library.read(torch.zeros(9, dtype=torch.uint8))


WRONG_CALLS: dict[str, dict[str, int]] = {
    "no weight": {"weight": 0},
    "no x": {"x": 0},
    "no y": {"y": 0},
    "rows below 0": {"rows": -1},
    "rows that overlap": {"x_stride": 95},
    "results that overlap": {"y_stride": 63},
    "regime": {"regime": 3},
}
WRONG_WEIGHTS: dict[str, dict[str, int | None]] = {
    "no codes": {"qweight": None},
    "no scales": {"scales": None},
    "no outputs": {"out_features": 0},
    "inputs below 0": {"in_features": -1},
    "huge": {"in_features": 1 << 62},
    "format": {"format": 3},
    "scale type": {"scale_type": 3},
    "group size": {"group_size": 8},
    "group size below 0": {"group_size": -16},
    "no levels": {"format": 1},
    "unquantized with scales": {"format": 2},
}


def _call_library(changes: dict[str, int], weight_changes: dict[str, int | None]) -> int:
    """Status of a product of 2 rows with a weight [64, 96], some arguments replaced."""
    layer = make_layer("w8a16", 64, 96)
    described = native._Weight(
        qweight=layer.qweight.data_ptr(), scales=layer.scales.data_ptr(), out_features=64, in_features=96
    )
    for name, value in weight_changes.items():
        setattr(described, name, value)
    x, y = normal(2, 96).bfloat16(), torch.empty(2, 64, dtype=torch.bfloat16)
    arguments = {"weight": ctypes.addressof(described), "x": x.data_ptr(), "rows": 2, "x_stride": 96}
    arguments |= {"y": y.data_ptr(), "y_stride": 64, "bias": 0, "regime": 0, "dtype": 1}
    assert changes.keys() <= arguments.keys()
    function = ctypes.CDLL(str(native.PATH)).pw_linear_packed
    function.argtypes = [ctypes.c_char_p]
    status: int = function(native._call_bytes(*(arguments | changes).values()))
    return status


@needs_library
def test_right_arguments_are_taken() -> None:
    assert _call_library({}, {}) == 0
    assert _call_library({"rows": 0, "x": 0, "y": 0}, {}) == 0


@needs_library
@pytest.mark.parametrize("changes", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_arguments_are_refused(changes: dict[str, int]) -> None:
    assert _call_library(changes, {}) == 1


@needs_library
@pytest.mark.parametrize("changes", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_a_wrong_weight_is_refused(changes: dict[str, int | None]) -> None:
    assert _call_library({}, changes) == 1


PROGRAM = """
import sys
from pathlib import Path
from service.kernels import native
native.PATH = Path(sys.argv[1])
from service.errors import SettingError
from service.kernels import dispatch
print(dispatch.kernel_name(), dispatch.choose("auto").why, sep="; ")
try:
    dispatch.select_isa("baseline")
except SettingError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "the kernel library is not installed; pip builds it"),
        (b"no library", "the kernel library cannot be loaded"),
    ],
    ids=["missing", "damaged"],
)
def test_without_the_library_torch_computes_and_says_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "library.so"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    chosen, refused = result.stdout.splitlines()
    assert chosen.startswith(f"torch; {reason}")
    assert refused.startswith(f"--kernel-isa baseline: {reason}")
    assert refused.endswith("; use auto or torch")
