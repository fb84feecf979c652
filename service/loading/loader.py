"""From a model's name to a quantized model in memory, one tensor at a time.

source -> checkpoint (lazy refs) -> plan -> transformers' loader -> conversion hook -> buffers -> integrity -> report
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from service.errors import ModelError, UnsupportedModel
from service.kernels.dispatch import kernel_name, select_isa
from service.loading import integrity, memory
from service.loading.checkpoint import Checkpoint, TensorHeader, TensorRef
from service.loading.config import ServedModel, class_errors, pick_device, pick_dtype, read_model
from service.loading.fingerprint import weight_hash
from service.loading.hub_headers import read_hub_headers
from service.loading.plan import Limits, LoadPlan, plan_load
from service.loading.progress import LoadProgress, Phase
from service.loading.quantizer import LoadQuantizationConfig, LoadRecord, find_vocabulary
from service.loading.report import LoadReport
from service.loading.shards import has_weights
from service.loading.sizes import layer_reports, weight_bytes
from service.loading.source import LOCAL, ModelSource, resolve_source
from service.numerics.recipe import Recipe

_Tensor = TypeVar("_Tensor", bound=TensorHeader)

_TEXT_PREFIXES = {
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.": "",
    "text_model.": "",
    "lm_head.": "lm_head.",
}
"""How models with parts name the weights of their text part, and what it calls them by itself."""
_PLAIN_TEXT_PREFIXES = ("model.", "lm_head.")
"""Of those whose other parts stand beside the text part and leave it its own names."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready for the engine.

    Attributes:
        folder: config and tokenizer files.
        context_length: positions that the model was made for.
        eos_token_ids: ids after which generation ends.
        plan: what was said before weights were read.
    """

    model: nn.Module
    report: LoadReport
    plan: LoadPlan
    folder: Path
    name: str
    revision: str
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]


def load_model(options: LoadOptions, progress: LoadProgress) -> LoadedModel:
    """Find, check, plan, read and quantize a model.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError, DoesNotFit, QuantizationError: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    _silence_transformers()
    select_isa(options.kernel_isa)
    _refuse_before_download(options, progress)
    source, served = _find(options, progress)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device, served.dtype)
    with memory.tight_heap(), _open(source, served, progress) as checkpoint:
        head = _settle_vocabulary(served, checkpoint.refs)
        plan = _plan(options, source, served, checkpoint.refs)
        plan.require_fit()
        resident_before = memory.resident_bytes()
        progress.enter(Phase.LOAD, checkpoint.num_bytes)
        started = time.monotonic()
        model, record = _stream(served, checkpoint.refs, head=head, recipe=options.recipe, dtype=dtype)
        loaded_at = time.monotonic()
        nn.Module.to(model, device)  # buffer by buffer: the host copy of each goes at once
        installed_at = time.monotonic()
        integrity.check_tensors(model)
        integrity.check_coverage(record)
        held = weight_bytes(model, record)
        integrity.check_plan(held, plan.weight_bytes)
        read_s = checkpoint.meter.seconds
    install_s = installed_at - started - read_s - record.quantize_s - record.pack_s
    phases = {"read": read_s, "quantize": record.quantize_s, "pack": record.pack_s, "install": install_s}
    report = LoadReport(
        recipe=options.recipe.text,
        scheme=options.recipe.label,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        kernel="torch" if options.recipe.is_none else kernel_name(device.type, dtype),
        revision=source.revision,
        weight_hash=weight_hash(model),
        weight_bytes=held,
        original_bytes=record.original_bytes,
        num_parameters=record.num_parameters,
        phase_seconds=phases | {"probe": time.monotonic() - installed_at},
        total_seconds=loaded_at - started,
        peak_bytes=peak_bytes(device),
        resident_before_bytes=resident_before,
        layers=layer_reports(model, record),
    )
    return LoadedModel(
        model=model,
        report=report,
        plan=plan,
        folder=source.folder,
        name=source.name,
        revision=source.revision,
        vocab_size=served.config.get_text_config().vocab_size,
        context_length=served.context_length,
        eos_token_ids=served.eos_token_ids,
    )


def _refuse_before_download(options: LoadOptions, progress: LoadProgress) -> None:
    """Raise DoesNotFit for a model of the hub that can be planned from there, and does not fit."""
    plan = None if _is_local(options) else _plan_on_hub(options, progress)
    if plan is not None:
        plan.require_fit()


def plan_model(options: LoadOptions, progress: LoadProgress) -> LoadPlan:
    """Say what loading a model into this process would take; no weight is read or downloaded.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    _silence_transformers()
    select_isa(options.kernel_isa)  # loads the kernels, as a load does first: the plan counts the process with them
    plan = None if _is_local(options) else _plan_on_hub(options, progress)
    if plan is not None:
        return plan
    source, served = _find(options, progress, with_weights=False)
    if not has_weights(source.folder) and source.revision != LOCAL:
        raise UnsupportedModel(
            f"{source.name} has no safetensors files, and other files say what they hold only when they are there; "
            "serve it or download it first, or give a model with safetensors files"
        )
    with _open(source, served, progress) as checkpoint:
        return _plan(options, source, served, checkpoint.refs)


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
        _keep_text_part(tensors, source.name)
    return _plan(options, source, served, tensors)


def _is_local(options: LoadOptions) -> bool:
    return Path(options.model).expanduser().is_dir()


def _silence_transformers() -> None:
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _open(source: ModelSource, served: ServedModel, progress: LoadProgress) -> Checkpoint:
    """The checkpoint, of which nothing but headers has been read, with the tensors that will be."""
    checkpoint = Checkpoint(source.folder, progress.advance)
    if served.is_text_part:
        try:
            _keep_text_part(checkpoint.refs, source.name)
        except UnsupportedModel:
            checkpoint.close()
            raise
    return checkpoint


def _plan(options: LoadOptions, source: ModelSource, served: ServedModel, refs: Mapping[str, TensorHeader]) -> LoadPlan:
    device = pick_device(options.device)
    return plan_load(
        source.name,
        served,
        refs,
        recipe=options.recipe,
        dtype=pick_dtype(options.dtype, device, served.dtype),
        device=device,
        limits=options.limits,
    )


def _resolve(options: LoadOptions, progress: LoadProgress, *, with_weights: bool = True) -> ModelSource:
    source = resolve_source(
        options.model,
        revision=options.revision,
        cache_dir=options.cache_dir,
        progress=progress,
        with_code=options.trust_remote_code,
        with_weights=with_weights,
    )
    return source if options.folder_name is None else replace(source, name=options.folder_name)


def _find(
    options: LoadOptions, progress: LoadProgress, *, with_weights: bool = True
) -> tuple[ModelSource, ServedModel]:
    source = _resolve(options, progress, with_weights=with_weights)
    progress.enter(Phase.PLAN)
    return source, read_model(source, trust_remote_code=options.trust_remote_code)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak bytes until now: resident memory of the process, and allocated memory of the device."""
    peaks = {"host": memory.peak_resident_bytes()}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _stream(
    served: ServedModel, refs: dict[str, TensorRef], *, head: str, recipe: Recipe, dtype: torch.dtype
) -> tuple[PreTrainedModel, LoadRecord]:
    config, record = served.config, LoadRecord()
    try:
        with class_errors():
            loaded: Any = served.model_class.from_pretrained(
                None,
                config=config,
                state_dict=refs,
                quantization_config=LoadQuantizationConfig(recipe, record),
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are collected, and refused below with their names
                output_loading_info=True,
            )
    except ModelError as error:
        if record.failure in (None, error):
            raise
        raise record.failure from error
    model: PreTrainedModel
    model, info = loaded
    is_tied = getattr(config.get_text_config(), "tie_word_embeddings", False)
    shared_heads = {f"{head}.weight"} if is_tied else set[str]()
    integrity.check_names(info, record, shared_heads)
    model.requires_grad_(False)
    return model, record


def _keep_text_part(refs: dict[str, _Tensor], name: str) -> None:
    """Of a checkpoint with parts for several kinds of input, keep the text part, under the names that it has alone.

    What else there is, such as an image encoder, is not read; what lacks in the text part will be missed by name.

    Raises:
        UnsupportedModel: no weight is named like one of a text part.
    """
    text: dict[str, _Tensor] = {}
    for full_name, ref in refs.items():
        for prefix, own_prefix in _TEXT_PREFIXES.items():
            if full_name.startswith(prefix):
                text[own_prefix + full_name.removeprefix(prefix)] = ref
                break
    if not text.keys() - {"lm_head.weight"}:
        text = {full_name: ref for full_name, ref in refs.items() if full_name.startswith(_PLAIN_TEXT_PREFIXES)}
    if not text.keys() - {"lm_head.weight"}:
        raise UnsupportedModel(
            f"{name} takes more than text, and its text part is none that this version finds: no weight begins with "
            f"{' or '.join([*_TEXT_PREFIXES, 'model.'])}; give a text model"
        )
    refs.clear()
    refs.update(text)


def _settle_vocabulary(served: ServedModel, refs: dict[str, TensorRef]) -> str:
    """Bring a tied checkpoint into one form: only the embedding's name, or an honestly untied pair.

    Checkpoints of tied models hold the weight under either name, or twice. Two different weights mean that
    the config is wrong; then the pair is served untied, as transformers does.

    Returns:
        The name of the head's module.
    """
    with class_errors(), torch.device("meta"):
        skeleton = served.model_class(served.config)
        vocabulary = find_vocabulary(skeleton)
    if vocabulary.is_tied:
        for head, embedding in skeleton.all_tied_weights_keys.items():
            if head in refs and embedding not in refs:
                refs[embedding] = refs.pop(head)
            elif head in refs and not refs[head].same_bytes(refs[embedding]):
                served.config.get_text_config().tie_word_embeddings = False
    return vocabulary.head
