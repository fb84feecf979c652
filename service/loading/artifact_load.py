"""What a load has to do with artifacts: one to start from instead of the checkpoint, and one to leave for the next."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from service.errors import ArtifactError
from service.loading.artifact import is_artifact
from service.loading.artifact_cache import CacheTicket, look_up
from service.loading.artifact_read import OpenArtifact, restore_model
from service.loading.artifact_write import ModelContents, places_of
from service.loading.config import ServedModel
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress, Phase
from service.loading.record import LoadRecord
from service.loading.shards import shard_paths
from service.loading.source import ModelSource


class LoadArtifact:
    """The artifact that a load starts from, if there is one: the model itself, or in the cache.

    A context manager; to be entered before checkpoint files are opened, of which it notes how they were.

    Attributes:
        ticket: what the cache has to do with this load; None where nothing is cached.
    """

    def __init__(self, options: LoadOptions, source: ModelSource, served: ServedModel, dtype: torch.dtype) -> None:
        """Find and open it.

        Raises:
            ModelNotFound, CheckpointError: there are no weights; or the model is an artifact, and damaged.
        """
        self.ticket: CacheTicket | None = None
        self._opened: OpenArtifact | None = None
        self._is_model = is_artifact(source.folder)
        self._verify_full = options.verify == "full"
        if self._is_model:
            self._opened = OpenArtifact(source.folder)
        elif options.artifacts is not None and not options.recipe.is_none:
            paths = shard_paths(source.folder)
            self.ticket = look_up(options.artifacts, source, served, recipe=options.recipe, dtype=dtype, paths=paths)
            self._opened = self.ticket.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            self._opened.close()

    def settles_vocabulary(self, served: ServedModel) -> bool:
        """Say in the config whether head and embedding are tied, as they were; False if that is still to be found."""
        if self._opened is None:
            return False
        if not self._opened.manifest.is_tied:
            served.config.get_text_config().tie_word_embeddings = False
        return True

    def restore(
        self, options: LoadOptions, served: ServedModel, dtype: torch.dtype, progress: LoadProgress
    ) -> tuple[PreTrainedModel, LoadRecord] | None:
        """The model from the artifact; None if there is none that can be used.

        Raises:
            ArtifactError: the model is an artifact, and damaged.
            ModelError: the model's class fails.
        """
        if self._opened is None:
            return None
        progress.enter(Phase.LOAD, self._opened.manifest.num_bytes)
        try:
            return restore_model(
                self._opened,
                served,
                options.recipe,
                dtype,
                on_bytes=progress.advance,
                verify_full=self._verify_full,
            )
        except ArtifactError as error:
            if self.ticket is None:
                raise
            self.ticket.reject(error)
            return None

    def left_for_the_cache(self, contents: ModelContents) -> UncachedModel | None:
        """What the next start would find, once it is written; None where nothing is cached."""
        return None if self.ticket is None else UncachedModel(ticket=self.ticket, contents=contents)


@dataclass(frozen=True, slots=True, kw_only=True)
class UncachedModel:
    """A model that was loaded from its checkpoint, for the cache to hold once it serves."""

    ticket: CacheTicket
    contents: ModelContents

    def save(self, stop: threading.Event | None = None) -> float | None:
        """See `CacheTicket.save`."""
        return self.ticket.save(self.contents, stop)


def contents_of(
    model: nn.Module, record: LoadRecord, served: ServedModel, *, recipe: str, dtype: torch.dtype
) -> ModelContents:
    """What an artifact holds of a model that was just loaded."""
    return ModelContents(
        places=places_of(model),
        recipe=recipe,
        dtype=str(dtype).removeprefix("torch."),
        is_tied=bool(getattr(served.config.get_text_config(), "tie_word_embeddings", False)),
        layers={name: (error.signal, error.noise) for name, error in record.encoded.items()},
    )
