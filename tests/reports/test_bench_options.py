"""What `bench kernels` is asked to measure, and the refusal of what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import SettingError
from service.invocation import read_kernel_bench
from service.numerics.schemes import parse_scheme
from service.reports.bench_options import KernelBench, Shape


def _read(*arguments: str, **environment: str) -> KernelBench:
    return read_kernel_bench(arguments, environment)[0]


def test_the_defaults_are_the_fixed_list() -> None:
    bench = _read()
    assert [scheme.name for scheme in bench.schemes] == ["w8a16", "w4a16-g64", "nf4"]
    assert [f"{k}x{n}" for k, n in bench.shapes] == [
        *("576x576", "576x1536", "1536x576", "2048x2048", "2048x5632", "5632x2048", "2048x32000", "4096x14336"),
    ]
    assert bench.rows == (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
    assert (bench.footprint_bytes, bench.output) == (None, None)


def test_everything_can_be_chosen(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments: dict[str, Any] = {
        "--schemes": "w8a16-g128; w4a16",
        "--shapes": "96x4095,1x1",
        "--rows": "3, 1",
        "--footprint": "2MiB",
        "--seconds-per-point": "0.5",
        "--encoder-parameters": 0,
        "--output": output,
    }
    bench, invocation = read_kernel_bench(
        [f"{flag}={value}" for flag, value in arguments.items()] + ["--json", "--threads=3", "--kernel-isa=torch"], {}
    )
    assert bench == KernelBench(
        schemes=(parse_scheme("w8a16-g128"), parse_scheme("w4a16-g64")),
        shapes=(Shape(96, 4095), Shape(1, 1)),
        rows=(3, 1),
        seconds_per_point=0.5,
        footprint_bytes=2 << 20,
        encoder_parameters=0,
        output=output,
    )
    assert invocation.as_json
    assert (invocation.settings.threads, invocation.settings.kernel_isa) == (3, "torch")


def test_settings_come_from_the_environment_and_from_a_file_too(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("threads = 5", encoding="utf-8")
    assert read_kernel_bench([], {"PENNYWEIGHT_THREADS": "7"})[1].settings.threads == 7
    assert read_kernel_bench(["--config", str(path)], {})[1].settings.threads == 5
    assert read_kernel_bench(["--config", str(path), "--threads", "2"], {})[1].settings.threads == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--schemes=w9a16", r"--schemes: 'w9a16' is not a quantization scheme; use one of: "),
        ("--schemes=w8a16;none", "--schemes w8a16;none: none has no packed weight.*; leave it out"),
        ("--schemes=", "--schemes: '' is not a quantization scheme"),
        ("--schemes=w4a16;w4a16-g64", "--schemes .*: an entry stands there twice; give each once"),
        ("--shapes=576", r"--shapes 576: '576' must be KxN with both in 1\.\.1048576; write 576x1536"),
        ("--shapes=0x4", "--shapes 0x4: '0x4' must be KxN"),
        ("--shapes=4x1048577", "must be KxN with both in 1..1048576"),
        ("--rows=1,0", r"--rows 1,0: '0' must be a whole number in 1\.\.65536; write 1,16,512"),
        ("--rows=65537", "--rows 65537: '65537' must be a whole number"),
        ("--rows=1.5", "--rows 1.5: '1.5' must be a whole number"),
        ("--rows=1,2,1", "--rows 1,2,1: an entry stands there twice"),
        (f"--rows={','.join(map(str, range(1, 66)))}", "--rows: 65 entries, it must be at most 64; run it in parts"),
        ("--seconds-per-point=0", "--seconds-per-point 0: must be a number over 0 and up to 3600; the default is 3"),
        ("--seconds-per-point=nan", "--seconds-per-point nan: must be a number"),
        ("--footprint=much", "--footprint much: must be a number of bytes.*; write 256MiB"),
        ("--footprint=0", "--footprint 0: must be greater than or equal to 1; write 256MiB"),
        ("--encoder-parameters=1e6", "--encoder-parameters 1e6: must be a whole number up to 4294967296; 0 leaves"),
        ("--encoder-parameters=4294967297", "--encoder-parameters 4294967297: must be"),
        ("--output=/nowhere/figures.json", "--output /nowhere/figures.json: must be a file in a folder that exists"),
        ("--output=/", "--output /: must be a file"),
        ("--output=/proc/1/x.json", "--output /proc/1/x.json: .*; it must be a file that can be written: name one in"),
        ("--output=~nobody-of-this-name/x.json", "--output ~nobody-of-this-name/x.json: .*; it must be a file"),
        ("--threads=0", "--threads 0: must be"),
        ("--kernel-isa=mmx", "--kernel-isa mmx: must be 'auto'"),
        ("--port=1", "unrecognized arguments: --port=1; `pennyweight bench kernels --help`"),
        ("model", "unrecognized arguments: model; "),
    ],
)
def test_what_cannot_be_measured_is_refused_with_value_rule_and_remedy(arguments: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        _read(arguments)


def test_a_file_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("figures", encoding="utf-8")
    assert [_read(f"--output={path}").output for path in (new, old)] == [new, old]
    assert not new.exists()
    assert old.read_text(encoding="utf-8") == "figures"


def test_a_value_in_a_message_is_short_and_printable() -> None:
    with pytest.raises(SettingError) as refused:
        _read(f"--rows=\x1b[2J{'9' * 1000}")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400
