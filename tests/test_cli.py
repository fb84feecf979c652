"""The command line: what is printed where, and exit codes."""

from __future__ import annotations

import os
import re
import socket

import pytest

from service import __version__
from service.cli import main
from service.settings import Settings, flag_of


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PENNYWEIGHT_")]:
        monkeypatch.delenv(name)


def test_version_and_help_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pennyweight {__version__}\n"
    assert main(["--help"]) == 0
    assert "usage: pennyweight serve" in capsys.readouterr().out


def test_help_of_serve_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag_of(name) in text for name in Settings.model_fields)


@pytest.mark.parametrize("command", ["plan", "quantize", "inspect", "evaluate", "bench", "doctor", "server"])
def test_a_command_that_is_not_built_is_2_and_says_what_there_is(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "model"]) == 2
    assert capsys.readouterr().err == (
        f"pennyweight: {command} is not part of version {__version__}; available: serve\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command given; available: serve"),
        (["serve", "--port", "99999"], "--port 99999: must be less than or equal to 65535"),
        (["serve", "--quantize", "w9a16"], "--quantize: .*w9a16"),
        (["serve", "--kv-cache", "int8"], "unrecognized arguments: --kv-cache"),
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


def test_a_port_in_use_is_1_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"--port {port}: it is in use on 127.0.0.1; stop the program" in capsys.readouterr().err
