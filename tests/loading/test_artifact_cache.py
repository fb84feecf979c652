from __future__ import annotations

import gc
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from service.layers.fusion import fuse, watch_siblings
from service.loading.artifact import DATA_NAME, MANIFEST_NAME
from service.loading.artifact_load import LoadArtifact
from service.loading.artifact_read import OpenArtifact
from service.loading.artifact_writer import CacheWriter
from service.loading.planning import find_model
from service.loading.progress import LoadProgress
from tests.loading.artifacts import (
    copied,
    entries,
    is_from_cache,
    lasting,
    load_and_save,
    load_options,
    load_through,
    the_entry,
)
from tests.loading.support import logits
from tests.loading.test_artifact import sign
from tests.models import MORE_FAMILIES

LOGGER = "service.loading.artifact_cache"


@pytest.fixture
def tiny(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return copied(checkpoint("llama"), tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "pennyweight"


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g64,lm_head=none"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen3_moe", "gemma3", "gpt_oss", "phi3"])
def test_a_start_from_the_cache_is_the_start_from_the_checkpoint(
    family: str, recipe: str, checkpoint: Callable[[str], Path], cache: Path
) -> None:
    first = load_and_save(cache, checkpoint(family), recipe)
    second = load_through(cache, checkpoint(family), recipe)
    assert is_from_cache(second)
    assert lasting(second.report) == lasting(first.report)
    assert torch.equal(logits(second.model), logits(first.model))
    assert second.model.training is False


@pytest.mark.nightly
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_every_family_starts_from_the_cache(family: str, checkpoint: Callable[[str], Path], cache: Path) -> None:
    first = load_and_save(cache, checkpoint(family), "w4a16-g32", dtype="bfloat16")
    second = load_through(cache, checkpoint(family), "w4a16-g32", dtype="bfloat16")
    assert is_from_cache(second)
    assert lasting(second.report) == lasting(first.report)
    assert torch.equal(logits(second.model), logits(first.model))


def test_an_unquantized_model_is_not_cached(tiny: Path, cache: Path) -> None:
    assert load_through(cache, tiny, "none").uncached is None
    assert not cache.exists()


@pytest.mark.parametrize("change", ["recipe", "dtype", "config", "name of a shard"])
def test_what_decides_about_the_tensors_decides_about_the_artifact(tiny: Path, cache: Path, change: str) -> None:
    load_and_save(cache, tiny)
    if change == "config":
        path = tiny / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    recipe = "w8a16-g64" if change == "recipe" else "w8a16"
    other = load_through(cache, tiny, recipe, "bfloat16" if change == "dtype" else "float32")
    assert is_from_cache(other) == (change == "name of a shard")


def test_changed_weights_with_the_old_time_of_the_file_are_noticed(tiny: Path, cache: Path) -> None:
    before = load_and_save(cache, tiny)
    path = tiny / "model.safetensors"
    status = path.stat()
    tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = load_through(cache, tiny)
    assert not is_from_cache(after)
    assert not torch.equal(logits(after.model), logits(before.model))


def test_weights_that_change_after_the_load_are_not_cached_under_its_name(
    tiny: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_through(cache, tiny)
    path = tiny / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    assert loaded.uncached is not None
    with caplog.at_level(logging.INFO, LOGGER):
        assert loaded.uncached.save() is None
    assert "model.safetensors was changed while the model was loaded" in caplog.text
    assert not cache.exists()


def _flip(entry: Path) -> None:
    content = bytearray((entry / DATA_NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / DATA_NAME).write_bytes(content)


def _cut(entry: Path) -> None:
    os.truncate(entry / DATA_NAME, 1000)


def _age(entry: Path) -> None:
    sign(entry, layout=0)


def _leave_unfinished(entry: Path) -> None:
    (entry / MANIFEST_NAME).unlink()


def _exchange(entry: Path) -> None:
    sign(entry, facts={"recipe": "w4a16-g64"})


@pytest.mark.parametrize("harm", [_flip, _cut, _age, _leave_unfinished, _exchange])
def test_what_cannot_be_used_is_told_and_made_anew(
    harm: Callable[[Path], None], tiny: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_and_save(cache, tiny)
    harm(the_entry(cache))
    with caplog.at_level(logging.WARNING, LOGGER):
        second = load_through(cache, tiny)
    assert "an artifact is not used: " in caplog.text
    assert second.uncached is not None
    assert torch.equal(logits(second.model), logits(first.model))
    assert second.uncached.save() is not None
    the_entry(cache)
    assert is_from_cache(load_through(cache, tiny, verify="full"))


def test_what_was_read_of_a_damaged_artifact_is_not_held_while_it_is_made_anew(tiny: Path, cache: Path) -> None:
    load_and_save(cache, tiny)
    _flip(the_entry(cache))
    options = load_options(tiny, cache)
    source, served = find_model(options, LoadProgress())
    gc.collect()
    gc.disable()  # else it depends on when it runs
    try:
        before = _bytes_of_tensors()
        with LoadArtifact(options, source, served, torch.float32) as artifact:
            assert artifact.restore(options, served, torch.float32, LoadProgress()) is None
        assert _bytes_of_tensors() == before
    finally:
        gc.enable()


def _bytes_of_tensors() -> int:
    """Of all that tensors of bytes look at."""
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype is torch.uint8 and not tensor.is_meta)


def test_a_damaged_artifact_that_another_process_reads_stays(tiny: Path, cache: Path) -> None:
    load_and_save(cache, tiny)
    entry = the_entry(cache)
    _flip(entry)
    loaded = load_through(cache, tiny)
    assert loaded.uncached is not None
    with OpenArtifact(entry):
        assert loaded.uncached.save() is None
    assert entries(cache) == [entry]
    assert loaded.uncached.save() is not None
    assert is_from_cache(load_through(cache, tiny))


def test_the_whole_file_is_compared_if_asked_for(tiny: Path, cache: Path) -> None:
    load_and_save(cache, tiny)
    sign(the_entry(cache), sha256="0" * 64)
    assert is_from_cache(load_through(cache, tiny))
    assert not is_from_cache(load_through(cache, tiny, verify="full"))


def test_a_second_save_finds_the_first(tiny: Path, cache: Path) -> None:
    loads = [load_through(cache, tiny) for _ in range(2)]
    results = []

    def save(index: int) -> None:
        uncached = loads[index].uncached
        assert uncached is not None
        results.append(uncached.save())

    threads = [threading.Thread(target=save, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result is None for result in results) == [False, True]
    assert is_from_cache(load_through(cache, tiny))


def test_a_writer_waits_for_another_until_it_is_stopped(tiny: Path, cache: Path) -> None:
    loaded = load_through(cache, tiny)
    assert loaded.uncached is not None
    cache.mkdir(parents=True)
    seconds = {"cache_write": 0.0}
    with FileLock(cache / "lock"):
        writer = CacheWriter(loaded.uncached, seconds)
        writer.start()
        writer.stop()
        writer.join()
        assert not entries(cache)
    assert seconds == {"cache_write": 0.0}
    writer = CacheWriter(loaded.uncached, seconds)
    writer.start()
    writer.join()
    assert seconds["cache_write"] > 0
    the_entry(cache)


def test_what_was_fused_when_it_was_saved_needs_no_copy_to_be_fused_again(tiny: Path, cache: Path) -> None:
    loaded = load_through(cache, tiny, "w4a16-g64")
    expected = logits(loaded.model)
    with watch_siblings(loaded.model) as groups:
        logits(loaded.model)
    for group in groups:
        fuse(group)
    assert loaded.uncached is not None
    assert loaded.uncached.save() is not None
    model = load_through(cache, tiny, "w4a16-g64", verify="full").model
    assert torch.equal(logits(model), expected)
    addresses = [tensor.data_ptr() for tensor in model.state_dict().values()]
    with watch_siblings(model) as groups:
        logits(model)
    assert groups
    for group in groups:
        fuse(group)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == addresses


def test_what_a_forward_changes_is_cached_as_it_was_loaded(tiny: Path, cache: Path) -> None:
    loaded = load_through(cache, tiny)
    before = logits(loaded.model)
    rotary = loaded.model.get_submodule("model.rotary_emb")
    assert isinstance(rotary.inv_freq, torch.Tensor)
    rotary.inv_freq.mul_(2)
    assert loaded.uncached is not None
    assert loaded.uncached.save() is not None
    assert torch.equal(logits(load_through(cache, tiny).model), before)
