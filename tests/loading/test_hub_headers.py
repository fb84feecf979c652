"""Models of the hub, planned from the headers of files that stay there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from service.errors import CheckpointError, DoesNotFit, ModelNotFound, UnsupportedModel
from service.loading.loader import load_model
from service.loading.plan import Limits, LoadPlan
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.hub import Hub, serve_hub, use
from tests.models import write_checkpoint

OPTIONS = LoadOptions(model="org/name", recipe=parse_recipe("w8a16"), device="cpu", dtype="float32")


def plan(cache: Path) -> LoadPlan:
    return plan_model(replace(OPTIONS, cache_dir=cache), LoadProgress())


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_model_of_the_hub_is_planned_from_its_headers(
    num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint("llama", tmp_path / "model", num_shards=num_shards)
    with serve_hub("org/name", folder) as hub:
        use(hub, monkeypatch)
        planned = plan(tmp_path / "cache")
        assert not any(name.endswith(".safetensors") for name in hub.fetched)
        assert len(hub.ranges) == num_shards
        assert all(num_bytes <= 100_001 for _, num_bytes in hub.ranges)
    local = plan_model(replace(OPTIONS, model=str(folder)), LoadProgress())
    assert planned.model == "org/name"
    assert planned.weight_bytes == local.weight_bytes
    assert planned.working_set == local.working_set
    assert planned.modules == local.modules


def test_a_model_of_the_hub_that_does_not_fit_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_checkpoint("llama", tmp_path / "model"), tmp_path / "cache"
    options = replace(OPTIONS, cache_dir=cache, limits=Limits(memory_bytes=10**6))
    with serve_hub("org/name", folder) as hub:
        use(hub, monkeypatch)
        with pytest.raises(DoesNotFit, match=r"org/name as w8a16 needs \d+ bytes, --memory allows 1000000; none of"):
            load_model(options, LoadProgress())
        assert "model.safetensors" not in hub.fetched
        # The opposite: what fits is downloaded, and then planned from what is here.
        loaded = load_model(replace(options, limits=Limits()), LoadProgress())
        assert hub.fetched.count("model.safetensors") == 1
        num_ranges = len(hub.ranges)
        assert plan(cache).weight_bytes == loaded.report.weight_bytes
        assert len(hub.ranges) == num_ranges


def test_bin_files_on_the_hub_are_planned_only_when_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = write_checkpoint("llama", tmp_path / "model"), tmp_path / "cache"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with serve_hub("org/name", folder) as hub:
        use(hub, monkeypatch)
        with pytest.raises(UnsupportedModel, match=r"org/name has no safetensors files, .* serve it or download it"):
            plan(cache)
        assert "pytorch_model.bin" not in hub.fetched
        loaded = load_model(replace(OPTIONS, cache_dir=cache), LoadProgress())
        assert plan(cache).weight_bytes == loaded.report.weight_bytes


def test_a_hub_that_goes_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    with serve_hub("org/name", folder) as hub:
        use(hub, monkeypatch)
        plan(tmp_path / "cache")
    use(Hub("http://127.0.0.1:9"), monkeypatch)  # nobody listens there
    with pytest.raises(ModelNotFound, match="org/name: its weights are not in the local cache and the hub cannot be"):
        plan(tmp_path / "cache")


@pytest.mark.parametrize("num_bytes", [4, 100], ids=["no length", "torn"])
def test_a_damaged_header_on_the_hub_is_named(num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with serve_hub("org/name", folder) as hub:
        use(hub, monkeypatch)
        with pytest.raises(CheckpointError, match="org/name: a header on the hub is damaged"):
            plan(tmp_path / "cache")
