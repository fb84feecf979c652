"""Where models come from: directories, a hub on the loopback interface, the cache, and every way to miss."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from service.errors import ModelNotFound, PennyweightError, SettingError
from service.loading.progress import LoadProgress, Phase
from service.loading.source import ModelSource, resolve_source
from tests.hub import COMMIT, Hub, serve_hub, use

WEIGHT = torch.zeros(1000, dtype=torch.float32)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("not needed to serve")
    (folder / "pytorch_model.bin").write_bytes(b"not needed to serve")
    for number in (1, 2):
        save_file({f"w{number}": WEIGHT}, folder / f"model-{number}.safetensors")
    save_file({"w": WEIGHT}, folder / "other.safetensors")
    weight_map = {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def resolve(model: str, cache: Path, revision: str | None = None, progress: LoadProgress | None = None) -> ModelSource:
    return resolve_source(model, revision=revision, cache_dir=cache, progress=progress or LoadProgress())


def test_a_directory_is_taken_as_it_is(repository: Path, tmp_path: Path) -> None:
    source = resolve(str(repository), tmp_path / "cache")
    assert source == ModelSource(folder=repository, name="repository", revision="local")
    assert not (tmp_path / "cache").exists()


def test_only_what_serving_needs_is_downloaded_and_counted(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = LoadProgress()
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        source = resolve("org/name", tmp_path / "cache", progress=progress)
        assert sorted(hub.fetched) == [
            "config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"
        ]  # fmt: skip
    assert (source.name, source.revision) == ("org/name", COMMIT)
    assert (source.folder / "model-2.safetensors").read_bytes() == (repository / "model-2.safetensors").read_bytes()
    fetched_bytes = sum((repository / name).stat().st_size for name in hub.fetched)
    assert progress.snapshot()[:3] == (Phase.DOWNLOAD, fetched_bytes, fetched_bytes)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["single", "sharded"])
def test_bin_files_are_downloaded_where_there_are_no_safetensors(
    is_sharded: bool, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in repository.glob("*.safetensors*"):
        path.unlink()
    expected = {"config.json", "pytorch_model.bin"}
    if is_sharded:
        (repository / "pytorch_model-1.bin").write_bytes(b"a shard")
        (repository / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "pytorch_model-1.bin"}}')
        expected = {"config.json", "pytorch_model-1.bin", "pytorch_model.bin.index.json"}
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        resolve("org/name", tmp_path / "cache")
        assert set(hub.fetched) == expected


@pytest.mark.parametrize("with_code", [False, True])
def test_code_is_downloaded_only_if_asked_for(
    with_code: bool, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "modeling_own.py").write_text("raise AssertionError")
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        progress = LoadProgress()
        resolve_source("org/name", revision=None, cache_dir=tmp_path / "cache", progress=progress, with_code=with_code)
        assert ("modeling_own.py" in hub.fetched) == with_code


def test_offline_takes_the_cached_copy(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        online = resolve("org/name", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("org/name", tmp_path / "cache") == online


def test_a_hub_out_of_reach_leaves_the_cached_copy(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        online = resolve("org/name", tmp_path / "cache")
    use(Hub("http://127.0.0.1:9"), monkeypatch)  # where nothing listens
    assert resolve("org/name", tmp_path / "cache") == online
    with pytest.raises(ModelNotFound, match="org/name is not in the local cache and the hub cannot be reached"):
        resolve("org/name", tmp_path / "another cache")


def test_a_commit_can_be_asked_for(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        assert resolve("org/name", tmp_path / "cache", revision=COMMIT).revision == COMMIT


def test_an_unknown_revision_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        with pytest.raises(ModelNotFound, match="org/name has no revision 'nope'; check --revision"):
            resolve("org/name", tmp_path / "cache", revision="nope")


def test_an_unknown_repository_is_named(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        with pytest.raises(ModelNotFound, match="org/other: no such hub repository"):
            resolve("org/other", tmp_path / "cache")


def test_a_gated_repository_says_what_to_do(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub("org/name", repository, gated=True) as hub:
        use(hub, monkeypatch)
        with pytest.raises(ModelNotFound, match=r"org/name is gated: .*HF_TOKEN"):
            resolve("org/name", tmp_path / "cache")


def test_offline_without_a_copy_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"org/name is not in the local cache .* HF_HUB_OFFLINE"):
        resolve("org/name", tmp_path / "cache")


def test_a_cache_directory_that_cannot_be_written_is_a_setting_error(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    with serve_hub("org/name", repository) as hub:
        use(hub, monkeypatch)
        with pytest.raises(SettingError, match="a file/cache: the cache directory cannot be written; give a writable"):
            resolve("org/name", blocked / "cache")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("/nowhere/at/all", ModelNotFound, "/nowhere/at/all: no such directory"),
        ("./nowhere", ModelNotFound, r"\./nowhere: no such directory"),
        ("a/b/c", ModelNotFound, "a/b/c: no such directory"),
        ("two words", ModelNotFound, "two words is neither a local directory nor a hub id"),
    ],
)
def test_a_model_that_cannot_be_found_is_named(
    model: str, error: type[PennyweightError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        resolve(model, tmp_path / "cache")


def test_a_directory_has_no_revisions(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"--revision v1: .* is a local directory"):
        resolve(str(repository), tmp_path / "cache", revision="v1")
