"""From options to a model that has been found, opened and planned; no weight is read here.

A model of the hub is planned from its headers there, so that one that does not fit is refused before it is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from transformers.utils import logging as transformers_logging

from service.errors import ModelNotFound, SettingError, UnsupportedModel
from service.kernels.dispatch import select_isa
from service.loading.artifact import is_artifact, read_manifest
from service.loading.artifact_cache import CacheOptions
from service.loading.checkpoint import Checkpoint
from service.loading.config import ServedModel, pick_device, pick_dtype, read_model
from service.loading.hub_headers import read_hub_headers
from service.loading.plan import Limits, LoadPlan, WorkingSet, plan_load
from service.loading.progress import LoadProgress, Phase
from service.loading.record import Watch
from service.loading.shards import has_weights
from service.loading.source import LOCAL, ModelSource, resolve_source
from service.loading.tensors import TensorHeader
from service.loading.text_part import keep_text_part
from service.numerics.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to load and how.

    Attributes:
        model: local directory or hub id.
        folder_name: what messages call a model in a local directory; None: as the directory is called.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`; of activations and unquantized weights.
        cache_dir: where hub files are kept; None for huggingface_hub's own place.
        trust_remote_code: whether code that the model brings along may run, where transformers has none for it.
        kernel_isa: as `dispatch.select_isa` takes it.
        limits: more is refused before weights are read.
        compares_first: the model is to be compared with its original before it is ready.
        watch: sees each piece of a weight once it is encoded.
        artifacts: where quantized models are kept for the next start; None: nowhere.
        verify: of an artifact: `block` compares the checksums of its blocks, `full` the sha256 of all of it too.
    """

    model: str
    recipe: Recipe
    folder_name: str | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    cache_dir: Path | None = None
    trust_remote_code: bool = False
    kernel_isa: str = "auto"
    limits: Limits = field(default_factory=Limits)
    compares_first: bool = False
    watch: Watch | None = None
    artifacts: CacheOptions | None = None
    verify: Literal["block", "full"] = "block"


def plan_model(options: LoadOptions, progress: LoadProgress) -> LoadPlan:
    """Say what loading a model into this process would take; no weight is read or downloaded.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    prepare_process(options)
    options = as_quantized(options)
    plan = None if _is_local(options) else _plan_on_hub(options, progress)
    if plan is not None:
        return plan
    source, served = _find(options, progress, with_weights=False)
    if not has_weights(source.folder) and source.revision != LOCAL:
        raise UnsupportedModel(
            f"{source.name} has no safetensors files, and other files say what they hold only when they are there; "
            "serve it or download it first, or give a model with safetensors files"
        )
    with open_weights(source, served, progress) as checkpoint:
        return plan_found(options, source, served, checkpoint.refs)


def prepare_process(options: LoadOptions) -> None:
    """Load the kernels, so that a plan counts the process with them, and have transformers write nothing."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    select_isa(options.kernel_isa)


def as_quantized(options: LoadOptions) -> LoadOptions:
    """The options, with those that an artifact decides where the model is one.

    Raises:
        SettingError: others were asked for.
        ArtifactError: it is damaged.
    """
    folder = Path(os.path.expanduser(options.model))
    if not is_artifact(folder):
        return options
    manifest = read_manifest(folder)
    for flag, asked, made in (
        ("--quantize", options.recipe.text, manifest.recipe),
        ("--dtype", options.dtype, manifest.dtype),
    ):
        if asked not in (made, "auto"):
            raise SettingError(f"{flag} {asked}: {options.model} was quantized with {made}; leave {flag} out")
    return replace(options, dtype=manifest.dtype)


def find_model(options: LoadOptions, progress: LoadProgress) -> tuple[ModelSource, ServedModel]:
    """Find a model with its weights, and read its config; one of the hub is downloaded only if it fits.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError, DoesNotFit: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    plan = None if _is_local(options) else _plan_on_hub(options, progress)
    if plan is not None:
        plan.require_fit()
    return _find(options, progress, with_weights=True)


def open_checkpoint(source: ModelSource, served: ServedModel, progress: LoadProgress) -> Checkpoint:
    """The weights of a model at full precision, of which nothing but headers has been read.

    Raises:
        ModelNotFound: it is an artifact, which has none.
        CheckpointError, UnsupportedModel: see `service.errors`.
    """
    if is_artifact(source.folder):
        raise ModelNotFound(f"{source.name} is quantized, and the weights that it was made from are not there")
    return open_weights(source, served, progress)


def open_weights(source: ModelSource, served: ServedModel, progress: LoadProgress) -> Checkpoint:
    """The checkpoint, of which nothing but headers has been read, with the tensors that will be; none of an artifact.

    Raises:
        ModelNotFound, CheckpointError, UnsupportedModel: see `service.errors`.
    """
    checkpoint = Checkpoint(source.folder, progress.advance)
    if served.is_text_part and not is_artifact(source.folder):
        try:
            keep_text_part(checkpoint.refs, source.name)
        except UnsupportedModel:
            checkpoint.close()
            raise
    return checkpoint


def plan_found(
    options: LoadOptions, source: ModelSource, served: ServedModel, refs: Mapping[str, TensorHeader]
) -> LoadPlan:
    """Plan the load of a model that has been found; see `plan_load`."""
    device = pick_device(options.device)
    plan = plan_load(
        source.name,
        served,
        refs,
        recipe=options.recipe,
        dtype=pick_dtype(options.dtype, device, served.dtype),
        device=device,
        limits=options.limits,
        compares_first=options.compares_first,
    )
    return _plan_of_artifact(plan) if is_artifact(source.folder) else plan


def _plan_of_artifact(plan: LoadPlan) -> LoadPlan:
    """A plan without weights to read, for what is quantized already."""
    refusal = plan.refusal and (
        f"{plan.model} needs {plan.needed_bytes} bytes, this process can have {plan.available_bytes}; give more "
        "memory, or quantize the model with fewer bits"
    )
    working_set = WorkingSet(bytes=plan.working_set.bytes, source="the blocks of the artifact")
    return replace(plan, working_set=working_set, refusal=refusal)


def _plan_on_hub(options: LoadOptions, progress: LoadProgress) -> LoadPlan | None:
    """The plan of a hub repository whose weights are still there; None if they are here, or in other formats."""
    source = _resolve(options, progress, with_weights=False)
    if has_weights(source.folder):
        return None
    served = read_model(source, trust_remote_code=options.trust_remote_code)
    tensors = read_hub_headers(source, options.cache_dir)
    if tensors is None:
        return None
    if served.is_text_part:
        keep_text_part(tensors, source.name)
    return plan_found(options, source, served, tensors)


def _is_local(options: LoadOptions) -> bool:
    return os.path.isdir(os.path.expanduser(options.model))


def _find(options: LoadOptions, progress: LoadProgress, *, with_weights: bool) -> tuple[ModelSource, ServedModel]:
    source = _resolve(options, progress, with_weights=with_weights)
    progress.enter(Phase.PLAN)
    return source, read_model(source, trust_remote_code=options.trust_remote_code)


def _resolve(options: LoadOptions, progress: LoadProgress, *, with_weights: bool) -> ModelSource:
    source = resolve_source(
        options.model,
        revision=options.revision,
        cache_dir=options.cache_dir,
        progress=progress,
        with_code=options.trust_remote_code,
        with_weights=with_weights,
    )
    return source if options.folder_name is None else replace(source, name=options.folder_name)
