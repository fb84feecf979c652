"""Loads through a cache of artifacts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

from service.loading.artifact_cache import CacheOptions
from service.loading.loader import LoadedModel, load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.loading.report import LoadReport
from service.numerics.recipe import parse_recipe

LIMIT_BYTES = 2**30
MEASURED = ("phase_seconds", "total_seconds", "peak_bytes", "resident_before_bytes")
"""Fields of a load report that differ from one load to the next."""


def load_through(
    cache: Path,
    folder: Path,
    recipe: str = "w8a16",
    dtype: str = "float32",
    *,
    verify: Literal["block", "full"] = "block",
    limit_bytes: int = LIMIT_BYTES,
) -> LoadedModel:
    """Load with a cache, which nothing is written into yet."""
    options = load_options(folder, cache, recipe, dtype, verify=verify, limit_bytes=limit_bytes)
    return load_model(options, LoadProgress())


def load_options(
    folder: Path,
    cache: Path,
    recipe: str = "w8a16",
    dtype: str = "float32",
    *,
    verify: Literal["block", "full"] = "block",
    limit_bytes: int = LIMIT_BYTES,
) -> LoadOptions:
    """What such a load takes."""
    return LoadOptions(
        model=str(folder),
        recipe=parse_recipe(recipe),
        device="cpu",
        dtype=dtype,
        artifacts=CacheOptions(folder=cache, limit_bytes=limit_bytes),
        verify=verify,
    )


def load_and_save(cache: Path, folder: Path, recipe: str = "w8a16", **options: Any) -> LoadedModel:
    """Load from the checkpoint, and leave an artifact."""
    loaded = load_through(cache, folder, recipe, **options)
    assert loaded.uncached is not None
    assert loaded.uncached.save() is not None
    return loaded


def is_from_cache(loaded: LoadedModel) -> bool:
    return loaded.uncached is None


def lasting(report: LoadReport) -> dict[str, Any]:
    """What every load of the same weights reports."""
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    return {name: value for name, value in fields.items() if name not in MEASURED}


def entries(cache: Path) -> list[Path]:
    """All artifacts and leftovers of a cache."""
    return sorted(path for path in cache.iterdir() if path.is_dir())


def the_entry(cache: Path) -> Path:
    """The one artifact of a cache, with nothing beside it."""
    (entry,) = entries(cache)
    assert len(entry.name) == 64
    return entry


def copied(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint, to be changed."""
    shutil.copytree(folder, to)
    return to
