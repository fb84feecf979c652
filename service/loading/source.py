"""Where a model comes from: a local directory, or a hub repository that is downloaded into the cache."""

from __future__ import annotations

from collections.abc import Callable
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
from service.loading.checkpoint import INDEX_NAME, SINGLE_NAME, index_shards
from service.loading.progress import LoadProgress, Phase

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on disk.

    Attributes:
        folder: config, tokenizer and safetensors files.
        name: what `/v1/models` calls it: the hub id, or the directory's own name.
        revision: hub commit, or "local".
    """

    folder: Path
    name: str
    revision: str


def resolve_source(model: str, *, revision: str | None, cache_dir: Path | None, progress: LoadProgress) -> ModelSource:
    """Find a local directory, or download a hub repository (or take it from the cache).

    Only config, tokenizer and safetensors files are downloaded. `HF_HUB_OFFLINE=1` forbids the network.

    Raises:
        ModelNotFound: no such directory, repository or revision; gated; or offline without a local copy.
        SettingError: the cache directory cannot be written; or a revision of a local directory.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise SettingError(f"--revision {revision}: {model} is a local directory; revisions exist on the hub only")
        return ModelSource(folder=folder, name=folder.resolve().name, revision="local")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelNotFound(f"{model}: no such directory; give a local directory or a hub id such as org/name")
    progress.enter(Phase.DOWNLOAD)
    snapshot = _download(model, revision, cache_dir, progress)
    return ModelSource(folder=snapshot, name=model, revision=snapshot.name)


def _download(model: str, revision: str | None, cache_dir: Path | None, progress: LoadProgress) -> Path:
    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                tqdm_class=_progress_bar(progress.advance),
            )
        )

    try:
        folder = fetch(_SMALL_FILES)
        index = folder / INDEX_NAME
        shards = index_shards(index) if index.is_file() else [SINGLE_NAME]
        return fetch([*_SMALL_FILES, *shards])
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


def _progress_bar(on_bytes: Callable[[int], None]) -> type[tqdm]:
    class DownloadBar(tqdm):
        """The usual bar; bytes that reach the disk also go to `on_bytes`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: received, and written. A bar that is not shown keeps none of its options.
            self._counts = kwargs.get("unit") == "B" and str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            """Advance by n."""
            if self._counts and n:
                on_bytes(int(n))
            return super().update(n)

    return DownloadBar
