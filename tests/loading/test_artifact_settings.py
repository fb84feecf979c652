"""What settings make of artifacts: where the cache is, and what a quantized model decides."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from service.assembly import load_options
from service.errors import ArtifactError
from service.invocation import read_invocation
from service.loading.artifact import MANIFEST_NAME
from service.loading.artifact_cache import CacheOptions
from service.settings import Settings
from tests.loading.artifacts import load_and_save, the_entry


def cache_of(**settings: object) -> CacheOptions | None:
    return load_options(Settings.model_validate(settings)).artifacts


def test_the_cache_lies_below_the_folder_of_the_hub_that_was_given(tmp_path: Path) -> None:
    cache = cache_of(cache_dir=str(tmp_path), cache_limit="20GiB")
    assert cache == CacheOptions(folder=tmp_path / "pennyweight", limit_bytes=20 * 2**30)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/ada"}, "/xdg"), ({"HOME": "/home/ada"}, "/home/ada/.cache")],
    ids=["XDG", "home"],
)
def test_else_in_the_cache_of_the_user(variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_of() == CacheOptions(folder=Path(folder, "pennyweight"), limit_bytes=32 * 2**30)


def test_a_limit_of_0_turns_it_off() -> None:
    assert cache_of(cache_limit=0) is None


def test_what_is_verified_does_not_depend_on_the_cache() -> None:
    assert load_options(Settings(verify="full", cache_limit=0)).verify == "full"
    assert load_options(Settings(cache_limit=0)).verify == "block"


def test_a_user_without_a_home_has_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with caplog.at_level(logging.WARNING, "service.assembly"):
        assert load_options(Settings(model="org/name")).artifacts is None
    assert "this user has no home; set --cache-dir" in caplog.text


def test_a_quantized_model_decides_on_recipe_and_dtype_unless_they_are_given(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    load_and_save(tmp_path, checkpoint("llama"), "w4a16-g64")
    entry = the_entry(tmp_path)
    settings = read_invocation([str(entry)], {}).settings
    assert (settings.quantize, settings.dtype) == ("w4a16-g64", "float32")
    settings = read_invocation([str(entry)], {"PENNYWEIGHT_QUANTIZE": "w8a16", "PENNYWEIGHT_DTYPE": "auto"}).settings
    assert (settings.quantize, settings.dtype) == ("w8a16", "auto")
    (entry / MANIFEST_NAME).write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        read_invocation([str(entry)], {})
