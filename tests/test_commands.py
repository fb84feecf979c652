"""The commands that measure a model and end, `inspect` and `evaluate`: what they print where, and exit codes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.cli import main


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENNYWEIGHT_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--quantize", "w9a16"], "--quantize: .*w9a16"),
        (["inspect", "--quantize", "w8a16;nf4"], "--quantize: .*w8a16;nf4"),
        (
            ["inspect", "--quantize", "none", "--plot", "."],
            r"--plot \.: no weight was encoded as none, so there is nothing to draw",
        ),
        (["inspect", "--plot", "/dev/null"], "--plot /dev/null: File exists; it must be a folder"),
        (["inspect", "--text", "story.txt"], "--text: no setting of version"),
        (["evaluate", "--quantize", "w8a16;w9a16"], "--quantize: .*w9a16"),
        (["evaluate", "--quantize", "w8a16;w8a16"], "--quantize: 'w8a16' stands twice"),
        (["evaluate", "--quantize", "w8a16;nf4,nothing=none"], "pattern 'nothing' matches no layer of this model"),
        (["evaluate", "--text", "/nowhere"], "--text /nowhere: cannot be read"),
        (["evaluate", "--text", "/dev/null"], "--text /dev/null: is empty; give a text of some pages"),
        (["evaluate", "--windows", "0"], "--windows 0: must be a whole number from 1 to 1000000"),
        (["evaluate", "--plot", "figure.pdf"], "--plot figure.pdf: must end in .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_2_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.search(f"^pennyweight: .*{message}", line)


@pytest.mark.parametrize(
    ("command", "names"),
    [("inspect", ("plot", "json", "quantize")), ("evaluate", ("text", "windows", "plot", "json", "quantize"))],
)
def test_help_names_the_flags(command: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in names)


INSPECT_FIELDS = {
    "name": str,
    "shape": list,
    "scheme": str,
    "reason": str,
    "bytes": int,
    "bits_per_weight": float,
    "relative_error": float,
}
EVALUATE_FIELDS = {
    "recipe": str,
    "perplexity": float,
    "kl_mean_nats": float,
    "kl_p99_nats": float,
    "top1_ratio": float,
    "weight_bytes": int,
    "bits_per_parameter": float,
}


ONE_THREAD = ["--dtype", "bfloat16", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A command that computes in this process sets them."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def write_story(folder: Path) -> str:
    path = folder / "story.txt"
    path.write_text("The captain looked at the sea, and the sea at the captain.", encoding="utf-8")
    return str(path)


def test_an_inspection_is_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", "--quantize", "w4a16", "--plot", str(tmp_path), "--json", *ONE_THREAD]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert (found["model"], found["recipe"]) == ("pennyweight-demo", "w4a16-g64")
    for layer in found["layers"]:
        assert {name: type(layer[name]) for name in INSPECT_FIELDS} == INSPECT_FIELDS
        assert layer["sqnr_db"] == pytest.approx(-20 * math.log10(layer["relative_error"]))
    assert found["totals"]["weight_bytes"]["total"] < found["totals"]["original_bytes"]
    assert len([path for path in tmp_path.iterdir() if path.read_bytes().startswith(b"\x89PNG")]) == 3


def test_an_evaluation_is_json_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "quality.png"
    words = ["--text", write_story(tmp_path), "--plot", str(plot), "--json", *ONE_THREAD]
    assert main(["evaluate", "--quantize", "w8a16;w4a16", *words]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert [row["recipe"] for row in found["rows"]] == ["none", "w8a16", "w4a16-g64"]
    assert all({name: type(row[name]) for name in EVALUATE_FIELDS} == EVALUATE_FIELDS for row in found["rows"])
    assert found["num_tokens"] == 15
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_people_are_told_the_same(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = ["--text", write_story(tmp_path)] if command == "evaluate" else []
    assert main([command, "--quantize", "nf4", *more, *ONE_THREAD]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"\bnf4\b", printed.out)
    assert "3.726" in printed.out  # MB


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_model_that_does_not_fit_is_3_before_it_is_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--memory", "10MB"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "pennyweight-demo as w8a16 needs " in printed.err
