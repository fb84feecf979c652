"""Flags, environment and file: precedence, and an error with name, value and rule for whatever is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.errors import RecipeError, SettingError
from service.invocation import Invocation, flag_of, read_invocation, variable_of
from service.settings import SECRETS, Settings

NUMBERS = ["port", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_memory", "max_queue"]
NUMBERS += ["drain_timeout", "max_body_bytes", "failed_linger", "threads"]
SPECIAL_VALUES = {
    "kernel_isa": "torch",
    "model": "a",
    "quantize": "none",
    "device": "cpu",
    "dtype": "float32",
    "log_format": "json",
    "kv_cache": "int8",
    "prefix_cache": "off",
    "rate_limit": "60/minute",
    "cors_origin": "http://localhost:3000",
    "twin": "http://localhost:3000",
    "docs": "on",
    "verify": "full",
    "fidelity": "before-ready",
    "max_kl": "0.5",
    "log_prompts": "true",
    "deterministic": "true",
    "trust_remote_code": "true",
}


def _read(*arguments: str, **environment: str) -> Settings:
    return read_invocation(arguments, environment).settings


def _file(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "port = 1\nmax_queue = 1\nmax_num_seqs = 1\n")
    settings = _read("--port", "3", "--config", path, PENNYWEIGHT_PORT="2", PENNYWEIGHT_MAX_QUEUE="2")
    assert (settings.port, settings.max_queue, settings.max_num_seqs) == (3, 2, 1)


def test_a_switch_that_is_off_wins_too(tmp_path: Path) -> None:
    path = _file(tmp_path, "trust_remote_code = true\n")
    assert _read("--config", path).trust_remote_code
    assert not _read("--config", path, PENNYWEIGHT_TRUST_REMOTE_CODE="false").trust_remote_code
    assert not _read("--no-trust-remote-code", PENNYWEIGHT_TRUST_REMOTE_CODE="1").trust_remote_code


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    first, second = _file(tmp_path, "port = 1"), tmp_path / "second.toml"
    second.write_text("port = 2", encoding="utf-8")
    assert _read(PENNYWEIGHT_CONFIG=first).port == 1
    assert _read("--config", str(second), PENNYWEIGHT_CONFIG=first).port == 2


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_flag_and_a_variable(name: str) -> None:
    value = SPECIAL_VALUES.get(name, "1024")
    by_flag = _read(flag_of(name)) if value == "true" else _read(flag_of(name), value)
    by_variable = _read(**{variable_of(name): value})
    assert by_flag == by_variable != _read()


@pytest.mark.parametrize(
    "value", ['"a"', "[a]", '{"a": 1}', "null", "None", " a ", "a,b", "0012", "1e5", 'a"b\\c', "-"]
)
def test_a_text_is_taken_as_it_is(value: str) -> None:
    assert _read("--model", value).model == _read(PENNYWEIGHT_MODEL=value).model == value


def test_of_one_flag_twice_the_last_counts() -> None:
    assert _read("--quantize", "none", "--quantize", "w8a16,[ab]*=none").quantize == "w8a16,[ab]*=none"


def test_the_model_is_given_by_position_or_by_flag_and_not_by_both() -> None:
    assert _read("a/b", "--port", "1").model == _read("--port", "1", "a/b").model == _read("--model", "a/b").model
    assert _read("a", PENNYWEIGHT_MODEL="b").model == "a"
    with pytest.raises(SettingError, match="a and --model b: two models"):
        _read("a", "--model", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "--port 65536: must be less than or equal to 65535"),
        (["--port", "-1"], "--port -1: must be greater than or equal to 0"),
        (["--port", "http"], "--port http: must be a valid integer"),
        (["--port", "\x1b[2J\n"], r"--port '\\x1b\[2J\\n': must be a valid integer"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0: must be greater than or equal to 1"),
        (["--device", "tpu"], "--device tpu: must be 'auto', 'cpu' or 'cuda'"),
        (["--threads", "0"], "--threads 0: must be 'auto', or must be greater than or equal to 1"),
        (["--kv-memory", "lots"], "--kv-memory lots: must be a number of bytes"),
        (["--kv-memory", "0"], "--kv-memory 0: must be greater than or equal to 1"),
        (["--drain-timeout", "nan"], "--drain-timeout nan: must be a finite number"),
        (["--drain-timeout", "inf"], "--drain-timeout inf: must be a finite number"),
        (["--model", ""], "--model : must have at least 1 character"),
        (["--port", "x", "--max-queue", "y"], "--port x: .*; --max-queue y: "),
        (["--port"], "^--port: expected one argument; `pennyweight serve --help` lists"),
        (["--trust-remote-code=yes"], "--no-trust-remote-code: ignored explicit argument 'yes'"),
        (["--max-queu", "5"], r"--max-queu: no setting of version 0\..*; did you mean --max-queue\?"),
        (["--max_queue", "5"], r"--max_queue: no setting of .*; did you mean --max-queue\?"),
        (["--temperature=5"], "--temperature: no setting of .*; `pennyweight serve --help` lists them"),
        (["-p", "5"], "-p: no setting of version"),
        (["a", "b"], "b: one word too many; give one MODEL"),
        (["--config", "/nowhere/x.toml"], "--config /nowhere/x.toml: cannot be read .No such file"),
        (["--config", "/"], "--config /: cannot be read .Is a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_an_error_with_name_value_and_rule(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        _read(*arguments)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["-1", "9" * 30, "9" * 5000, "1e400", "nan", ""])
def test_every_number_has_bounds(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=flag_of(name)) as caught:
        _read(f"{flag_of(name)}={value}")
    assert len(str(caught.value)) < 500


def test_a_wrong_recipe_is_an_error_that_names_its_origin() -> None:
    with pytest.raises(RecipeError, match=r"PENNYWEIGHT_QUANTIZE: .*'?w9a16"):
        _read(PENNYWEIGHT_QUANTIZE="w9a16")


@pytest.mark.parametrize("variable", ["PENNYWEIGHT_PROT", "PENNYWEIGHT_", "PENNYWEIGHT_Port", "PENNYWEIGHT_JSON"])
def test_an_unknown_variable_is_an_error(variable: str) -> None:
    with pytest.raises(SettingError, match=f"{variable}=5: no setting of version"):
        _read(**{variable: "5"})


def test_an_unknown_variable_is_told_with_the_nearest_name() -> None:
    with pytest.raises(SettingError, match=r"did you mean PENNYWEIGHT_PORT\?$"):
        _read(PENNYWEIGHT_PROT="5")


@pytest.mark.parametrize("variable", ["PENNYWEIGHT_API_KEY", "PENNYWEIGHT_HF_TOKEN", "PENNYWEIGHT_PASSWORD"])
def test_no_secret_gets_into_a_message(variable: str) -> None:
    with pytest.raises(SettingError, match=variable) as caught:
        _read(**{variable: "hunter2"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingError, match="--") as caught:
        _read(f"{flag_of(variable.removeprefix('PENNYWEIGHT_').lower())}=hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_has_a_variable_and_no_flag_and_no_place_in_a_file(name: str, tmp_path: Path) -> None:
    invocation = read_invocation([], {variable_of(name): "hunter2"})
    assert invocation.settings == Settings()
    assert "hunter2" not in repr(invocation)
    remedy = f"did you mean {flag_of(name)}-file"
    with pytest.raises(SettingError, match=f"^{flag_of(name)}: no setting of .*; {remedy}") as caught:
        _read(flag_of(name), "hunter2")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(SettingError, match=f"{name}: no setting of .*; did you mean {name}_file") as caught:
        _read("--config", _file(tmp_path, f'{name} = "hunter2"'))
    assert "hunter2" not in str(caught.value)


def test_a_wrong_variable_is_an_error_that_names_it() -> None:
    with pytest.raises(SettingError, match="PENNYWEIGHT_PORT 99999: must be less"):
        _read(PENNYWEIGHT_PORT="99999")
    with pytest.raises(SettingError, match="PENNYWEIGHT_TRUST_REMOTE_CODE perhaps: must be a valid boolean"):
        _read(PENNYWEIGHT_TRUST_REMOTE_CODE="perhaps")


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
        ("port = 1\nport = 2", "not valid TOML"),
        ("prot = 1", r"prot: no setting of version .*; did you mean port\?"),
        ("port = true", "port: must be a number or a string"),
        ("port = [1]", "port .*: must be a valid integer"),
        ("port = 1979-05-27", "port .*: must be a valid integer"),
        ("trust_remote_code = 2", "trust_remote_code 2: must be a valid boolean"),
        ("[serve]\nport = 1", "serve: no setting"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(SettingError, match=f"settings.toml.*{message}"):
        _read("--config", path)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match=f"PENNYWEIGHT_CONFIG {re.escape(str(path))}: not valid TOML"):
        _read(PENNYWEIGHT_CONFIG=str(path))


def test_only_serve_prints_its_settings() -> None:
    def read(command: str) -> Invocation:
        return read_invocation(["--print-config", "--json"], {}, command)

    assert read("serve").print_config
    assert read("serve").as_json
    with pytest.raises(SettingError, match="--print-config: no setting"):
        read("doctor")


@pytest.mark.parametrize("environment", [{}, {"PENNYWEIGHT_FIDELITY": "off"}], ids=["flag", "variable"])
def test_a_limit_on_what_is_not_compared_is_an_error(environment: dict[str, str]) -> None:
    flags = ["--max-kl", "0.5"] + ([] if environment else ["--fidelity", "off"])
    name = "PENNYWEIGHT_FIDELITY" if environment else "--fidelity"
    with pytest.raises(SettingError, match=rf"^{name} off and --max-kl 0\.5: a limit needs the comparison; leave one"):
        _read(*flags, **environment)
