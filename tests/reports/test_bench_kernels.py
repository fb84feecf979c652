"""A tiny benchmark: the form of its JSON, arithmetic between its fields, and what people see of it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from service.cli import main
from service.commands import bench_kernels
from service.errors import SettingError
from service.kernels import dispatch
from service.numerics.schemes import parse_scheme
from service.numerics.storage import storage_shapes
from service.reports.bench_kernels import KernelReport, PackedCopies, find_reader, measure
from service.reports.bench_options import KernelBench, Shape
from service.reports.bench_table import print_report
from service.settings import Settings

SCHEMES = ("w8a16", "w4a16-g64", "nf4")
NUMBER = {"type": "number", "exclusiveMinimum": 0}
COUNT = {"type": "integer", "minimum": 1}
TEXT = {"type": "string", "minLength": 1}


def _object(**fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


RATES = {"bytes_per_s": NUMBER, "read_bytes_per_s": NUMBER, "read_ratio": NUMBER, "seconds": NUMBER}
SCHEMA = _object(
    machine={"type": "object", "required": ["cpu", "caches", "flags", "threads", "memory_bytes", "torch", "date"]},
    footprint=_object(
        bytes=COUNT, last_level_cache_bytes={"type": "integer"}, is_limited_by_memory={"type": "boolean"}
    ),
    read_kernel={"enum": ["native", "torch.sum"]},
    read_check={
        "type": "array",
        "items": _object(
            scheme=TEXT,
            k=COUNT,
            n=COUNT,
            footprint_bytes=COUNT,
            read_bytes_per_s=NUMBER,
            torch_sum_bytes_per_s=NUMBER,
            ratio=NUMBER,
        ),
    },
    rows={
        "type": "array",
        "items": _object(
            scheme=TEXT,
            rows=COUNT,
            k=COUNT,
            n=COUNT,
            kernel=TEXT,
            bf16_linear_seconds=NUMBER,
            linear_ratio=NUMBER,
            one_row_ratio=NUMBER,
            packed_bytes=COUNT,
            footprint_bytes=COUNT,
            bf16_footprint_bytes=COUNT,
            rounds={"type": "integer", "minimum": 5},
            **RATES,
        ),
    },
    encoders={
        "type": "array",
        "items": _object(
            scheme=TEXT, num_parameters=COUNT, source_bytes=COUNT, footprint_bytes=COUNT, rounds=COUNT, **RATES
        ),
    },
    seconds=NUMBER,
)
BENCH = KernelBench(
    schemes=tuple(map(parse_scheme, SCHEMES)),
    shapes=(Shape(96, 40), Shape(64, 64)),
    rows=(1, 3),
    seconds_per_point=1e-3,
    footprint_bytes=1 << 16,
    encoder_parameters=1 << 17,
)
PROGRESS: list[tuple[str, int, int]] = []


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def report() -> Iterator[KernelReport]:
    num_threads = torch.get_num_threads()
    yield measure(BENCH, num_threads=1, kernel_isa="auto", on_progress=lambda *step: PROGRESS.append(step))
    torch.set_num_threads(num_threads)


def test_the_json_has_the_fields_of_its_schema(report: KernelReport) -> None:
    found = json.loads(json.dumps(report.as_dict()))
    jsonschema.validate(found, SCHEMA)
    del found["rows"][0]["seconds"]
    with pytest.raises(jsonschema.ValidationError, match="seconds"):
        jsonschema.validate(found, SCHEMA)


def test_every_scheme_is_measured_at_every_shape_and_number_of_rows(report: KernelReport) -> None:
    assert [(row.k, row.n, row.rows, row.scheme) for row in report.rows] == [
        (*shape, rows, scheme) for shape in BENCH.shapes for rows in BENCH.rows for scheme in SCHEMES
    ]
    assert [(check.k, check.n, check.scheme) for check in report.read_check] == [
        (*shape, scheme) for shape in BENCH.shapes for scheme in SCHEMES
    ]
    assert [row.scheme for row in report.encoders] == list(SCHEMES)
    assert {row.kernel for row in report.rows} == {dispatch.kernel_name()}
    assert report.machine["threads"] == 1


def test_bytes_are_those_of_all_buffers_and_rates_follow(report: KernelReport) -> None:
    for row in report.rows:
        shapes = storage_shapes(row.n, row.k, parse_scheme(row.scheme))
        assert row.packed_bytes == shapes.codes_bytes + shapes.scales_bytes
        assert row.bytes_per_s == pytest.approx(row.packed_bytes / row.seconds)
        assert min(row.footprint_bytes, row.bf16_footprint_bytes) >= 1 << 16
    for encoder in report.encoders:
        assert encoder.source_bytes == 2 * encoder.num_parameters == 2 * BENCH.encoder_parameters
        assert encoder.footprint_bytes >= 2 * encoder.source_bytes
        assert encoder.bytes_per_s == pytest.approx(encoder.source_bytes / encoder.seconds)
    assert report.footprint["bytes"] == 1 << 16


def test_one_row_is_as_fast_as_itself(report: KernelReport) -> None:
    assert {row.one_row_ratio for row in report.rows if row.rows == 1} == {1.0}
    assert {row.one_row_ratio for row in report.rows if row.rows == 3} != {1.0}


def test_progress_counts_up_to_all_points(report: KernelReport) -> None:
    assert len(report.rows) == 12
    counts = [num_done for _, num_done, _ in PROGRESS]
    assert counts == sorted(counts)
    assert {num_all for _, _, num_all in PROGRESS} == {counts[-1]} == {2 * 2 + 3}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_copy_multiplies_like_the_weight_that_was_encoded(scheme: str) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = PackedCopies(weight, parse_scheme(scheme), 1 << 16)
    x = torch.eye(96).bfloat16()
    for layer in packed.layers:
        # Half a step of 4 bit in a group of normal weights, and a rounding to bfloat16; nf4 has wider steps outside.
        assert torch.allclose(layer(x), functional.linear(x, weight), rtol=0.01, atol=0.5)
    assert not torch.allclose(packed.layers[0](x), functional.linear(x, -weight), rtol=0.01, atol=0.5)


def test_copies_in_layers_share_no_memory() -> None:
    packed = PackedCopies(torch.ones(16, 32, dtype=torch.bfloat16), parse_scheme("w8a16"), 1 << 16)
    pointers: set[int] = {layer.qweight.data_ptr() for layer in packed.layers}
    assert len(pointers) == packed.copies.count
    start, end = packed.copies.memory.data_ptr(), packed.copies.memory.data_ptr() + packed.copies.memory.nbytes
    assert all(start <= pointer < end for pointer in pointers)


def test_the_read_takes_all_bytes() -> None:
    data: Tensor = torch.arange(64, dtype=torch.int64).view(torch.uint8)
    assert int(find_reader().read(data)) == 64 * 63 // 2  # type: ignore[call-overload]


def test_a_shape_that_does_not_fit_is_refused_before_anything_is_measured() -> None:
    bench = KernelBench(schemes=BENCH.schemes, shapes=(Shape(64, 64), Shape(2**20, 2**20)), rows=(1,))
    with pytest.raises(SettingError, match=r"--shapes 1048576x1048576: takes \d+ bytes, and \d+ are available; leave"):
        measure(bench, num_threads=1, kernel_isa="auto", on_progress=lambda *_: pytest.fail("something was measured"))


def test_encoders_that_do_not_fit_are_refused_before_anything_is_measured() -> None:
    available = psutil.virtual_memory().available
    bench = dataclasses.replace(BENCH, encoder_parameters=available)  # two bytes of each
    message = rf"--encoder-parameters {available}: takes \d+ bytes, and \d+ are available; give fewer, or 0 to leave"
    with pytest.raises(SettingError, match=message):
        measure(bench, num_threads=1, kernel_isa="auto", on_progress=lambda *_: pytest.fail("something was measured"))


def test_more_parameters_are_more_matrices_of_a_layers_size() -> None:
    bench = dataclasses.replace(BENCH, schemes=BENCH.schemes[:1], shapes=BENCH.shapes[:1], rows=(1,))
    bench = dataclasses.replace(bench, encoder_parameters=3 * 2048 * 5632 - 1)
    (row,) = measure(bench, num_threads=1, kernel_isa="auto", on_progress=lambda *_: None).encoders
    assert row.num_parameters == 2048 * 5632
    assert row.footprint_bytes == 3 * row.source_bytes


def test_people_see_each_shape_and_scheme(report: KernelReport) -> None:
    screen = io.StringIO()
    print_report(report, Console(file=screen, width=140))
    text = screen.getvalue()
    for words in (*SCHEMES, "96 x 40", "64 x 64", "encoders", "bf16 linear", dispatch.kernel_name()):
        assert words in text


TINY = ["--shapes=64x32", "--rows=1", "--schemes=w8a16", "--seconds-per-point=0.001", "--footprint=64KiB"]


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_the_command_prints_its_figures_and_writes_them(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    arguments = ["bench", "kernels", *TINY, "--threads=1", "--encoder-parameters=0", f"--output={output}"]
    assert main(arguments + ["--json"] * as_json) == 0
    printed = capsys.readouterr()
    written = json.loads(output.read_text(encoding="utf-8"))
    jsonschema.validate(written, SCHEMA)
    if as_json:
        assert json.loads(printed.out) == written
    else:
        assert "64 x 32" in printed.out
    assert printed.err == ""


def test_figures_that_cannot_be_written_are_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "folder"
    bench = dataclasses.replace(BENCH, shapes=BENCH.shapes[:1], rows=(1,), encoder_parameters=0, output=output)
    output.mkdir()  # after the file was found possible
    with pytest.raises(SettingError, match=r"--output .*folder: Is a directory; it must be a file that can be written"):
        bench_kernels(bench, Settings(threads=1), as_json=True)
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
