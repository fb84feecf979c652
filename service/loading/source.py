"""Where a model comes from: a local directory, or a hub repository that is downloaded into the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from service.errors import ModelNotFound, SettingError
from service.loading.progress import LoadProgress, Phase
from service.loading.shards import INDEX_NAME, PICKLE_INDEX_NAME, PICKLE_SINGLE_NAME, SINGLE_NAME, index_shards

LOCAL = "local"
"""The revision of what is no hub repository."""

SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
"""Of a model folder: what there is beside the weights."""
_CODE_FILES = ["*.py"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on disk.

    Attributes:
        folder: config, tokenizer and weight files.
        name: what `/v1/models` calls it: the hub id, or the directory's own name.
        revision: hub commit, or "local".
    """

    folder: Path
    name: str
    revision: str


def resolve_source(
    model: str,
    *,
    revision: str | None,
    cache_dir: Path | None,
    progress: LoadProgress,
    with_code: bool = False,
    with_weights: bool = True,
) -> ModelSource:
    """Find a local directory, or download a hub repository (or take it from the cache).

    Only config, tokenizer and weight files are downloaded, and code if asked for. `HF_HUB_OFFLINE=1` forbids the
    network.

    Args:
        with_weights: without it the weights of a hub repository are there only if they have been before.

    Raises:
        ModelNotFound: no such directory, repository or revision; gated; or offline without a local copy.
        SettingError: the cache directory cannot be written; or a revision of a local directory.
    """
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):  # of a name that is no path too
        if revision is not None:
            raise SettingError(f"--revision {revision}: {model} is a local directory; revisions exist on the hub only")
        return ModelSource(folder=folder, name=folder.resolve().name, revision=LOCAL)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"{model}: no such directory; give a local directory or a hub id such as org/name")
    if with_weights:
        progress.enter(Phase.DOWNLOAD)
    small_files = SMALL_FILES + (_CODE_FILES if with_code else [])
    snapshot = _download(
        model, revision, cache_dir, small_files=small_files, with_weights=with_weights, progress=progress
    )
    return ModelSource(folder=snapshot, name=model, revision=snapshot.name)


def _download(
    model: str,
    revision: str | None,
    cache_dir: Path | None,
    *,
    small_files: list[str],
    with_weights: bool,
    progress: LoadProgress,
) -> Path:
    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                tqdm_class=_progress_bar(progress),
            )
        )

    with hub_errors(model, revision, cache_dir):
        folder = fetch(small_files)
        if not with_weights:
            return folder
        for index_name, single_name in ((INDEX_NAME, SINGLE_NAME), (PICKLE_INDEX_NAME, PICKLE_SINGLE_NAME)):
            index = folder / index_name
            shards = index_shards(index) if index.is_file() else [single_name]
            folder = fetch([*small_files, *shards])
            if any((folder / shard).is_file() for shard in shards):
                break
        return folder


@contextmanager
def hub_errors(model: str, revision: str | None, cache_dir: Path | None) -> Iterator[None]:
    """Within it, errors of huggingface_hub become ours.

    Raises:
        ModelNotFound: no such repository or revision; gated; out of reach, or the hub answers with an error.
        SettingError: the cache directory cannot be written.
    """
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{model} is gated: ask for access on its hub page, then set HF_TOKEN to a token that has it"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{model} has no revision {revision!r}; check --revision") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{model}: no such hub repository, or it is private and HF_TOKEN is not set; there is also no local "
            "directory of that name"
        ) from error
    except HFValidationError as error:
        raise ModelNotFound(f"{model} is neither a local directory nor a hub id such as org/name") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelNotFound(
            f"{model} is not in the local cache and the hub cannot be reached; connect, unset HF_HUB_OFFLINE, or "
            "give a local directory"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"{model}: the hub answered with an error ({error}); try again later") from error
    except OSError as error:
        raise SettingError(
            f"{cache_dir or error.filename}: the cache directory cannot be written; "
            f"give a writable --cache-dir ({error.strerror})"
        ) from error


def _progress_bar(progress: LoadProgress) -> type[tqdm]:
    class DownloadBar(tqdm):
        """The usual bar; bytes that reach the disk, and those that will, are also told to `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: received, and written. A bar that is not shown keeps none of its options.
            self._counts = kwargs.get("unit") == "B" and str(kwargs.get("desc", "")).startswith("Reconstructing")
            self._num_expected = 0
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            """Advance by n."""
            if self._counts and n:
                total = int(self.total or 0)  # grows as files begin
                progress.expect(total - self._num_expected)
                self._num_expected = total
                progress.advance(int(n))
            return super().update(n)

    return DownloadBar
