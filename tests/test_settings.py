"""The list of settings by itself: sizes, the name of the model, the printed form, the file with the token."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import SettingError
from service.invocation import read_invocation
from service.settings import Settings, as_toml, model_name, read_hub_token


def test_defaults_are_those_of_the_documentation() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.quantize) == ("127.0.0.1", 8000, "w8a16")
    assert (settings.max_num_seqs, settings.max_queue, settings.drain_timeout) == (64, 256, 30)
    assert (settings.max_body_bytes, settings.failed_linger, settings.log_format) == (4194304, 0, "text")
    assert settings.model is None
    assert not settings.trust_remote_code


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_description(name: str) -> None:
    assert Settings.model_fields[name].description


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
    assert Settings.model_validate({"kv_memory": text}).kv_memory == num_bytes


@pytest.mark.parametrize("text", ["", "MiB", "1.5GiB", "1 gib", "-1", "1 G", "0x10", "\u0661", "1" * 19])
def test_another_size_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="must be a number of bytes"):
        Settings.model_validate({"kv_memory": text})


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "pennyweight-demo"),
        ({"model": "org/name"}, "org/name"),
        ({"model": "org/name", "served_model_name": "mine"}, "mine"),
    ],
    ids=["demo", "hub", "chosen"],
)
def test_the_name_for_clients_is_known_before_the_load(changes: dict[str, str], name: str) -> None:
    assert model_name(Settings.model_validate(changes)) == name


def test_a_directory_is_called_by_its_last_part(tmp_path: Path) -> None:
    assert model_name(Settings(model=f"{tmp_path}/.")) == tmp_path.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": 'a"b\\c', "kv_memory": 5, "cache_dir": "/tmp/é", "threads": 3, "drain_timeout": 0.5},
        {"trust_remote_code": True, "hf_token_file": "/run/secrets/token"},
    ],
    ids=["defaults", "changed", "flag and path"],
)
def test_printed_settings_read_back_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = Settings.model_validate(changes)
    text = as_toml(settings)
    assert set(tomllib.loads(text)) | {line[2:-2] for line in text.splitlines() if line[0] == "#"} == set(
        Settings.model_fields
    )
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    assert read_invocation(["--config", str(path)], {}).settings == settings


@pytest.mark.parametrize("text", ["hf_abc", "hf_abc\n", "  hf_abc\r\n"])
def test_a_token_is_read_without_what_surrounds_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(text.encode())
    assert read_hub_token(path) == "hf_abc"


@pytest.mark.parametrize("text", ["", "\n", "hf_abc hf_def", "hf_é"], ids=["empty", "blank", "two", "not ASCII"])
def test_another_token_is_an_error_that_does_not_show_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=f"--hf-token-file {path}: must hold one token") as caught:
        read_hub_token(path)
    assert "hf_" not in str(caught.value)


def test_a_missing_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--hf-token-file .*: cannot be read .No such file"):
        read_hub_token(tmp_path / "nowhere")
