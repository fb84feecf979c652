"""The command line: what is printed where, and exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service import __version__
from service.cli import main
from service.invocation import COMMANDS, flag_of
from service.numerics.recipe import parse_recipe
from service.settings import Settings
from tests.floors import ROOT


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENNYWEIGHT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What a service of one test logs to is not there for the next."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers = handlers
    root.setLevel(level)


def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pennyweight {__version__}\n"
    assert main(["--help"]) == 0
    assert "usage: pennyweight serve" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "plan", "quantize", "inspect", "evaluate", "doctor"])
def test_help_of_a_command_names_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag_of(name) in text for name in Settings.model_fields)
    assert text.isascii()
    assert "\0" not in text


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("kernels", ("schemes", "shapes", "rows", "threads", "footprint", "output", "json")),
        ("serve", ("url", "clients", "rate", "requests", "duration", "text", "api-key-file", "output", "plot", "json")),
    ],
)
def test_help_of_a_benchmark_names_its_options(
    subject: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", subject, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in names)


def test_help_of_the_benchmarks_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert "pennyweight bench kernels" in text
    assert "pennyweight bench serve" in text


@pytest.mark.parametrize("command", ["train", "server"])
def test_a_command_that_is_not_built_is_2_and_says_what_there_is(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "model"]) == 2
    assert capsys.readouterr().err == (
        f"pennyweight: {command} is not part of version {__version__}; available: {', '.join(COMMANDS)}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given; available: serve, plan, quantize, inspect, evaluate, doctor, bench"),
        (["bench"], "bench: nothing to measure was named; write `pennyweight bench kernels` or"),
        (["bench", "disk"], "bench disk: version .* has no such benchmark; write `pennyweight bench kernels` or"),
        (["bench", "serve"], "--url: given 0 times; name one server, or two to compare"),
        (["bench", "kernels", "--rows", "x"], "--rows x: 'x' must be a whole number"),
        (["serve", "--port", "99999"], "--port 99999: must be less than or equal to 65535"),
        (["serve", "--quantize", "w9a16"], "--quantize: .*w9a16"),
        (["serve", "--cache-limit", "lots"], "--cache-limit lots: must be a number of bytes"),
        (["serve", "--verify", "half"], "--verify half: must be 'block' or 'full'"),
        (["serve", "--twin", "5"], "--twin 5: must be an origin such as http://127.0.0.1:8001"),
        (["serve", "--json"], "--json: serve prints nothing but its settings; give --print-config"),
        (["serve", "--hf-token-file", "/nowhere"], "--hf-token-file /nowhere: cannot be read"),
        (["serve", "--api-keys-file", "/nowhere"], "--api-keys-file /nowhere: cannot be read"),
        (["serve", "--metrics-key-file", "/"], "--metrics-key-file /: cannot be read"),
        (["serve", "--rate-limit", "often"], "--rate-limit often: must be rates of 1 to 100000 requests"),
        (["serve", "--cors-origin", "*"], r"--cors-origin \*: without API keys every web page"),
        (["doctor", "--port", "99999"], "--port 99999: must be less than or equal to 65535"),
        (["plan", "--quantize", "w9a16"], "--quantize: .*w9a16"),
        (["plan", "--memory", "lots"], "--memory lots: must be a number of bytes"),
        (["plan", "--quantize", "w8a16,nothing=none"], "pattern 'nothing' matches no layer of this model"),
        (["plan", "--memory", "1GB", "--kv-memory", "2GB"], "--kv-memory 2000000000 and --memory 1000000000: keys"),
        (["doctor", "--print-config"], "--print-config: no setting of version"),
        (["serve", "--host", "nowhere.invalid"], "--host nowhere.invalid: no such address"),
        (["serve", "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: cannot listen there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_2_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("pennyweight: ")]
    assert re.search(message, line)


def test_an_unknown_variable_is_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENNYWEIGHT_PROT", "5")
    assert main(["serve", "--print-config"]) == 2
    assert "PENNYWEIGHT_PROT=5: no setting" in capsys.readouterr().err


def test_the_settings_in_force_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "1234", "--print-config"]) == 0
    assert "port = 1234\n" in capsys.readouterr().out


def test_the_settings_in_force_are_printed_as_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "1234", "--print-config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == Settings(port=1234).model_dump(mode="json")


def test_no_secret_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PENNYWEIGHT_API_KEYS", "alice:hf_secret-0123456789")
    monkeypatch.setenv("PENNYWEIGHT_METRICS_KEY", "hf_secret-metrics")
    path = tmp_path / "token"
    path.write_text("hf_secret", encoding="utf-8")
    assert main(["serve", "--hf-token-file", str(path), "--print-config"]) == 0
    assert main(["doctor", "--hf-token-file", str(path), "--json"]) == 0
    printed = capsys.readouterr()
    assert str(path) in printed.out
    assert "hf_secret" not in printed.out + printed.err


def test_a_weak_key_in_the_environment_is_2_and_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENNYWEIGHT_API_KEYS", "hunter2")
    assert main(["serve"]) == 2
    assert main(["doctor", "--json"]) == 1
    printed = capsys.readouterr()
    assert "PENNYWEIGHT_API_KEYS: key 1: 7 characters; it must have 16 to 256" in printed.err
    assert "PENNYWEIGHT_API_KEYS: key 1: 7 characters" in printed.out
    assert "hunter2" not in printed.out + printed.err


def test_a_port_in_use_is_1_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"--port {port}: it is in use on 127.0.0.1; stop the program" in capsys.readouterr().err


def test_with_a_json_log_a_start_that_fails_is_a_line_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port), "--log-format", "json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port}: it is in use" in json.loads(line)["message"]


def _diagnosis(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_doctor_finds_wrong_variables_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENNYWEIGHT_PROT", "5")
    assert main(["doctor", "--json"]) == 1
    found = _diagnosis(capsys)
    assert found["settings"] == {}
    assert "PENNYWEIGHT_PROT=5: no setting" in found["problems"][0]["message"]


def test_a_doctor_reads_the_token_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--hf-token-file", "/nowhere"]) == 1
    assert "--hf-token-file /nowhere: cannot be read" in _diagnosis(capsys)["problems"][0]["message"]


def test_a_doctor_tells_people_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(rf"^version +{re.escape(__version__)} *$", printed.out, re.MULTILINE)
    assert re.search(r"^settings +model +- *$", printed.out, re.MULTILINE)


PLAN_FIELDS = {
    "original_bytes": int,
    "quantized_bytes": int,
    "peak_bytes": int,
    "kv_bytes_per_token": int,
    "available_bytes": int,
    "fits": bool,
    "modules": list,
}


def test_a_plan_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--quantize", "w4a16", "--dtype", "bfloat16", "--json"]) == 0
    printed = capsys.readouterr()
    planned = json.loads(printed.out)
    assert printed.err == ""
    assert {name: type(planned[name]) for name in PLAN_FIELDS} == PLAN_FIELDS
    assert planned["model"] == "pennyweight-demo"
    assert planned["fits"] is True
    assert all(row.keys() == {"pattern", "count", "scheme", "bytes"} for row in planned["modules"])
    assert sum(row["bytes"] for row in planned["modules"]) == planned["quantized_bytes"] < planned["original_bytes"]
    assert {row["scheme"] for row in planned["modules"]} == {"none", "w8a16", "w4a16-g64"}
    assert parse_recipe(planned["recipe"]).text == "w4a16-g64"


def test_a_plan_that_does_not_fit_is_3_and_prints_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "10MB", "--json"]) == 3
    printed = capsys.readouterr()
    planned = json.loads(printed.out)
    assert (planned["fits"], planned["available_bytes"]) == (False, 10_000_000)
    assert planned["refusal"].startswith("pennyweight-demo as w8a16 needs ")
    assert printed.err == f"pennyweight: {planned['refusal']}\n"
    assert "--memory allows 10000000; none of w8a16, " in planned["refusal"]


def test_a_plan_tells_people_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--kv-cache", "int8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +. +6 . w8a16 ", printed.out)
    assert re.search(r"^fits +yes *$", printed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "message"),
    [("/nowhere/model", "/nowhere/model: no such directory"), ("tests", "tests has no config.json")],
)
def test_a_model_that_is_not_there_is_not_planned(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


@pytest.mark.parametrize("words", [("plan", "--json"), ("serve", "--print-config"), ("--help",)])
def test_a_reader_who_has_enough_ends_a_command_quietly(words: tuple[str, ...]) -> None:
    """As `pennyweight plan | head -1` does, whose pipe is closed before everything is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "service", *words]
    result = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_an_interrupted_command_ends_without_a_traceback(tmp_path: Path) -> None:
    pipe = tmp_path / "settings.toml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "service", "quantize", "--config", str(pipe), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process, pipe.open("w"):
        process.send_signal(signal.SIGINT)  # while it waits for what is in the pipe
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "pennyweight: interrupted\n")
