"""The C++ tests of the kernel library, `tests/native`, find no error and no race under the compiler's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.deploy.support import REQUIRE_TOOLS
from tests.floors import ROOT

KERNELS = ROOT / "service" / "kernels" / "native"
TESTS = ROOT / "tests" / "native"
# As the library is compiled, but for -O1: sanitizers make better code take several times as long to compile.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vbmi", "vnni", "bf16"))]
ISAS = {"amx": [*AVX512, "-mamx-tile", "-mamx-bf16"], "avx512": AVX512, "avx2": AVX2}
EMULATED_AMX = [*AVX512, "-DPW_EMULATE_TILES", "-Dpw_kernels_amx=pw_kernels_amx_emulated"]
RUN_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, input="", capture_output=True, text=True, timeout=300, check=False, env=os.environ | RUN_OPTIONS
    )


def skip(reason: str) -> None:
    if os.environ.get(REQUIRE_TOOLS) == "1":
        pytest.fail(f"{reason}, and {REQUIRE_TOOLS}=1")
    pytest.skip(reason)


def find_compiler(sanitize: str, folder: Path) -> str:
    """A compiler whose sanitizers work here; the test is skipped where there is none."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        skip("there is no C++ compiler")
    assert compiler is not None
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    for command in ([compiler, sanitize, probe, "-o", folder / "probe"], [folder / "probe"]):
        result = run(*command)
        if result.returncode != 0:
            skip(f"{compiler} {sanitize} makes no program that runs here: {result.stderr}")
    return compiler


def knows(compiler: str, flags: list[str]) -> bool:
    return run(compiler, *flags, "-fsyntax-only", "-x", "c++", "-").returncode == 0


def build(compiler: str, sanitize: str, folder: Path) -> Path:
    """The program with all instruction sets that the compiler knows."""
    isas = {name: flags for name, flags in ISAS.items() if knows(compiler, flags)}
    units = [(KERNELS / f"{name}.cpp", flags) for name, flags in isas.items()]  # these take longest, so they come first
    if "avx512" in isas:
        units.insert(0, (KERNELS / "amx.cpp", EMULATED_AMX))
    units += [(source, []) for source in (KERNELS / "baseline.cpp", KERNELS / "library.cpp", *TESTS.glob("*.cpp"))]
    common = [
        sanitize,
        "-fno-sanitize-recover=all",
        *FLAGS,
        f"-I{KERNELS}",
        *(f"-DPW_HAS_{isa.upper()}" for isa in isas),
    ]

    def compiled(index: int) -> Path:
        source, flags = units[index]
        unit = folder / f"{index}.o"
        result = run(compiler, *common, *flags, "-c", source, "-o", unit)
        assert result.returncode == 0, result.stderr
        return unit

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, range(len(units))))
    program = folder / "native_tests"
    linked = run(compiler, sanitize, *objects, "-pthread", "-o", program)
    assert linked.returncode == 0, linked.stderr
    return program


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("sanitize", "subjects"),
    [("-fsanitize=address,undefined", []), ("-fsanitize=thread", ["threads", "encode", "sampling", "attention"])],
    ids=["address-and-undefined", "thread"],
)
def test_the_kernels_pass_their_native_tests_under_sanitizers(
    sanitize: str, subjects: list[str], tmp_path: Path
) -> None:
    program = build(find_compiler(sanitize, tmp_path), sanitize, tmp_path)
    result = run(program, *subjects)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "baseline: runs" in result.stdout
