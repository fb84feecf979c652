"""Which files of a model folder hold its weights."""

from __future__ import annotations

import json
from pathlib import Path

from service.errors import CheckpointError, ModelError, ModelNotFound
from service.loading.artifact import is_artifact

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_SINGLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIX = ".bin"


def shard_paths(folder: Path) -> list[Path]:
    """The weight files of a model folder: safetensors where there are any, else the pickles of torch.

    An artifact has none: its tensors are no weights.

    Raises:
        ModelNotFound: the folder holds no model.
        CheckpointError: a shard that the index names is missing, or the index is damaged.
    """
    if is_artifact(folder):
        return []
    for index_name, single_name in ((INDEX_NAME, SINGLE_NAME), (PICKLE_INDEX_NAME, PICKLE_SINGLE_NAME)):
        if (folder / index_name).is_file():
            return _named_shards(folder, index_name)
        if (folder / single_name).is_file():
            return [folder / single_name]
    raise ModelNotFound(
        f"{folder.name} has neither {SINGLE_NAME} nor {INDEX_NAME}, nor {PICKLE_SINGLE_NAME}; "
        "give the directory of a Hugging Face model"
    )


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds all of its weight files."""
    try:
        shard_paths(folder)
    except ModelError:
        return False
    return True


def _named_shards(folder: Path, index_name: str) -> list[Path]:
    names = index_shards(folder / index_name)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards that {index_name} names are missing, first {missing[0]}; "
            "download the model again"
        )
    return [folder / name for name in names]


def index_shards(index: Path) -> list[str]:
    """The file names that a shard index names, sorted.

    Raises:
        CheckpointError: the index cannot be read, is damaged, or names nothing, or something outside of its folder.
    """
    try:
        names = sorted(
            {str(Path(name)) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except OSError as error:
        raise CheckpointError(f"{index.name} cannot be read ({error.strerror}); make it readable") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index.name} is damaged ({error}); download the file again") from error
    if not names:
        raise CheckpointError(f"{index.name} is damaged (it names no shards); download the file again")
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index.name} names a shard outside of its folder; use a trusted checkpoint")
    return names
