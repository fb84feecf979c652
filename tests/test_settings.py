"""Settings from flags, environment and file: precedence, bounds, and errors with name, value and rule."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.errors import RecipeError, SettingError
from service.settings import Settings, as_toml, flag_of, read_invocation

NUMBERS = ["port", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_memory", "max_queue"]
NUMBERS += ["drain_timeout", "max_body_bytes", "failed_linger", "threads"]


def _read(*arguments: str, **environment: str) -> Settings:
    return read_invocation(arguments, environment).settings


def _file(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_are_those_of_the_contract() -> None:
    settings = _read()
    assert (settings.host, settings.port, settings.quantize) == ("127.0.0.1", 8000, "w8a16")
    assert (settings.max_num_seqs, settings.max_queue, settings.drain_timeout) == (64, 256, 30)
    assert (settings.max_body_bytes, settings.failed_linger, settings.log_format) == (4194304, 0, "text")
    assert settings.model is None


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "port = 1\nmax_queue = 1\nmax_num_seqs = 1\n")
    settings = _read("--port", "3", "--config", path, PENNYWEIGHT_PORT="2", PENNYWEIGHT_MAX_QUEUE="2")
    assert (settings.port, settings.max_queue, settings.max_num_seqs) == (3, 2, 1)


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    assert _read(PENNYWEIGHT_CONFIG=_file(tmp_path, "port = 1")).port == 1


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_flag_a_variable_and_a_description(name: str) -> None:
    value = {"model": "a", "quantize": "none", "device": "cpu", "dtype": "float32", "log_format": "json"}.get(
        name, "1024"
    )
    by_flag = _read(flag_of(name), value)
    by_variable = _read(**{f"PENNYWEIGHT_{name.upper()}": value})
    assert by_flag == by_variable != _read()
    assert Settings.model_fields[name].description


def test_the_model_is_given_by_position_or_by_flag_and_not_by_both() -> None:
    assert _read("a/b", "--port", "1").model == _read("--port", "1", "a/b").model == _read("--model", "a/b").model
    with pytest.raises(SettingError, match="a and --model b: two models"):
        _read("a", "--model", "b")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("64MiB", 64 * 2**20),
        ("2GiB", 2**31),
        ("1 KB", 1000),
        ("3MB", 3_000_000),
        ("512B", 512),
        ("1TiB", 2**40),
    ],
)
def test_sizes_have_binary_and_decimal_units(text: str, num_bytes: int) -> None:
    assert _read("--kv-memory", text).kv_memory == num_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "--port 65536: must be less than or equal to 65535"),
        (["--port", "-1"], "--port -1: must be greater than or equal to 0"),
        (["--port", "http"], "--port http: must be a valid integer"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0: must be greater than or equal to 1"),
        (["--device", "tpu"], "--device tpu: must be 'auto', 'cpu' or 'cuda'"),
        (["--threads", "0"], "--threads 0: must be 'auto', or must be greater than or equal to 1"),
        (["--kv-memory", "lots"], "--kv-memory lots: must be a number of bytes"),
        (["--kv-memory", "-1"], "--kv-memory -1: must be a number of bytes"),
        (["--kv-memory", "0"], "--kv-memory 0: must be greater than or equal to 1"),
        (["--drain-timeout", "nan"], "--drain-timeout nan: must be a finite number"),
        (["--drain-timeout", "inf"], "--drain-timeout inf: must be a finite number"),
        (["--model", ""], "--model : must have at least 1 character"),
        (["--port", "x", "--max-queue", "y"], "--port x: .*; --max-queue y: "),
        (["--port"], "--port: expected one argument; `pennyweight serve --help` lists"),
        (["--twin"], "unrecognized arguments: --twin; .* of version 0"),
        (["--max-q", "5"], "unrecognized arguments: --max-q"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--config", "/nowhere/x.toml"], "--config /nowhere/x.toml: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_an_error_with_name_value_and_rule(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        _read(*arguments)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "9" * 30, "9" * 5000, "1e400", "nan", ""])
def test_every_number_has_bounds(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=flag_of(name)):
        _read(f"{flag_of(name)}={value}")


def test_a_wrong_recipe_is_an_error_that_names_its_origin() -> None:
    with pytest.raises(RecipeError, match=r"PENNYWEIGHT_QUANTIZE: .*'?w9a16"):
        _read(PENNYWEIGHT_QUANTIZE="w9a16")


@pytest.mark.parametrize("variable", ["PENNYWEIGHT_TWIN", "PENNYWEIGHT_PROT", "PENNYWEIGHT_", "PENNYWEIGHT_Port"])
def test_an_unknown_variable_is_an_error(variable: str) -> None:
    with pytest.raises(SettingError, match=f"{variable}=5: no setting of version"):
        _read(**{variable: "5"})


def test_a_wrong_variable_is_an_error_that_names_it() -> None:
    with pytest.raises(SettingError, match="PENNYWEIGHT_PORT 99999: must be less"):
        _read(PENNYWEIGHT_PORT="99999")


def test_variables_of_a_kubernetes_service_are_ignored_and_told() -> None:
    links = {
        "PENNYWEIGHT_SERVICE_HOST": "10.0.0.1",
        "PENNYWEIGHT_SERVICE_PORT_HTTP": "8000",
        "PENNYWEIGHT_PORT": "tcp://10.0.0.1:8000",
        "PENNYWEIGHT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PENNYWEIGHT_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    invocation = read_invocation([], links)
    assert invocation.settings == Settings()
    assert set(invocation.ignored_variables) == set(links)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port = ", "not valid TOML"),
        ("twin = 1", "twin: no setting of version"),
        ("port = true", "port: must be a number or a string"),
        ("port = [1]", "port .*: must be a valid integer"),
        ("[serve]\nport = 1", "serve: no setting"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(SettingError, match=f"settings.toml.*{message}"):
        _read("--config", path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": 'a"b\\c', "kv_memory": 5, "cache_dir": "/tmp/é", "threads": 3, "drain_timeout": 0.5}],
    ids=["defaults", "changed"],
)
def test_printed_settings_read_back_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = Settings.model_validate(changes)
    text = as_toml(settings)
    assert set(tomllib.loads(text)) | {line[2:-2] for line in text.splitlines() if line[0] == "#"} == set(
        Settings.model_fields
    )
    assert _read("--config", _file(tmp_path, text)) == settings
