"""Headers of safetensors files that stay on the hub: some kilobytes of each are read, no weight is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

from service.errors import CheckpointError, ModelNotFound
from service.loading.shards import INDEX_NAME, SINGLE_NAME, index_shards
from service.loading.source import ModelSource, hub_errors
from service.loading.tensors import DTYPES

_NUM_CONNECTIONS = 8


class HubTensor(NamedTuple):
    """A tensor of a file on the hub. A `TensorHeader`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    strides: tuple[int, ...] = ()


def read_hub_headers(source: ModelSource, cache_dir: Path | None) -> dict[str, HubTensor] | None:
    """All tensors of a hub repository; None if it has no safetensors files.

    Args:
        source: a repository whose small files are there.

    Raises:
        ModelNotFound: the hub cannot be reached, or refuses.
        CheckpointError: a header or the index is damaged, or two files have a tensor of one name.
    """
    index = source.folder / INDEX_NAME
    names = index_shards(index) if index.is_file() else [SINGLE_NAME]
    hub = HfApi()

    def read(name: str) -> list[tuple[str, str, tuple[int, ...], int]]:
        header = hub.parse_safetensors_file_metadata(source.name, name, revision=source.revision)
        return [
            (tensor_name, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
            for tensor_name, info in header.tensors.items()
        ]

    with hub_errors(source.name, source.revision, cache_dir):
        try:
            with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
                headers = list(pool.map(read, names))
        except EntryNotFoundError:
            return None
        except SafetensorsParsingError as error:
            text = f"{source.name}: a header on the hub is damaged ({error}); give another model"
            raise CheckpointError(text) from error
        except HTTPError as error:
            raise ModelNotFound(
                f"{source.name}: its weights are not in the local cache and the hub cannot be reached ({error}); "
                "connect, or give a local directory"
            ) from error
    tensors: dict[str, HubTensor] = {}
    for file_name, header in zip(names, headers, strict=True):
        for name, tag, shape, num_bytes in header:
            if name in tensors or tag not in DTYPES:
                what = "is in two files" if name in tensors else f"is of dtype {tag}, which torch has not"
                raise CheckpointError(f"{source.name}: {file_name}: tensor {name!r} {what}; give another model")
            tensors[name] = HubTensor(name, shape, DTYPES[tag], num_bytes)
    return tensors
