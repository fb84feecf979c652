"""From a model's name to a quantized model in memory, one tensor at a time.

source -> checkpoint (lazy refs) -> plan -> transformers' loader -> conversion hook -> buffers -> integrity -> report

or, where it was quantized before, source -> plan -> artifact -> buffers -> integrity -> report
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from service.errors import ModelError
from service.kernels.dispatch import kernel_name
from service.loading import integrity, memory
from service.loading.artifact_load import LoadArtifact, UncachedModel, contents_of
from service.loading.artifact_write import ModelContents
from service.loading.checkpoint import Checkpoint
from service.loading.config import ServedModel, class_errors, pick_device, pick_dtype
from service.loading.filling import fill_unread
from service.loading.fingerprint import weight_hash
from service.loading.plan import LoadPlan
from service.loading.planning import LoadOptions, as_quantized, find_model, open_weights, plan_found, prepare_process
from service.loading.progress import LoadProgress, Phase
from service.loading.quantizer import LoadQuantizationConfig, find_vocabulary
from service.loading.record import LoadRecord
from service.loading.report import LoadReport, WeightBytes
from service.loading.sizes import layer_reports, weight_bytes
from service.loading.source import ModelSource
from service.loading.tensors import TensorRef


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready for the engine.

    Attributes:
        source, served: where it is from, and its config and class; whoever reads its weights again needs them.
        plan: what was said before weights were read.
        contents: what an artifact of it holds.
        uncached: to be written into the cache once the model serves; None if there is nothing to write.
        folder: config and tokenizer files.
        context_length: positions that the model was made for.
        eos_token_ids: ids after which generation ends.
    """

    model: nn.Module
    report: LoadReport
    plan: LoadPlan
    contents: ModelContents
    uncached: UncachedModel | None
    source: ModelSource
    served: ServedModel
    folder: Path
    name: str
    revision: str
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stood:
    """A model whose weights are in memory, on its device.

    Attributes:
        device, dtype: where it is, and of activations and unquantized weights.
        phase_seconds: what each phase took.
        total_seconds: first byte read to last buffer filled.
        is_restored: from an artifact.
    """

    model: PreTrainedModel
    record: LoadRecord
    device: torch.device
    dtype: torch.dtype
    phase_seconds: dict[str, float]
    total_seconds: float
    is_restored: bool = False


def load_model(options: LoadOptions, progress: LoadProgress) -> LoadedModel:
    """Find, check, plan, read and quantize a model.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError, DoesNotFit, QuantizationError: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    prepare_process(options)
    options = as_quantized(options)
    source, served = find_model(options, progress)
    dtype = pick_dtype(options.dtype, pick_device(options.device), served.dtype)
    with (
        memory.tight_heap(),
        LoadArtifact(options, source, served, dtype) as artifact,
        open_weights(source, served, progress) as checkpoint,
    ):
        head = None if artifact.settles_vocabulary(served) else settle_vocabulary(served, checkpoint.refs)
        plan = plan_found(options, source, served, checkpoint.refs)
        plan.require_fit()
        resident_before = memory.resident_bytes()
        stood = _restore(options, served, artifact, dtype, progress=progress)
        if stood is None:
            head = settle_vocabulary(served, checkpoint.refs) if head is None else head
            stood = _read(options, served, checkpoint, head=head, progress=progress)
        checked_at = time.monotonic()
        held = _check(stood, plan)
    contents = contents_of(stood.model, stood.record, served, recipe=options.recipe.text, dtype=dtype)
    return LoadedModel(
        model=stood.model,
        contents=contents,
        uncached=None if stood.is_restored else artifact.left_for_the_cache(contents),
        report=_report(options, source, stood, held=held, resident_before=resident_before, checked_at=checked_at),
        plan=plan,
        source=source,
        served=served,
        folder=source.folder,
        name=source.name,
        revision=source.revision,
        vocab_size=served.config.get_text_config().vocab_size,
        context_length=served.context_length,
        eos_token_ids=served.eos_token_ids,
    )


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak bytes until now: resident memory of the process, and allocated memory of the device."""
    peaks = {"host": memory.peak_resident_bytes()}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _restore(
    options: LoadOptions,
    served: ServedModel,
    artifact: LoadArtifact,
    dtype: torch.dtype,
    *,
    progress: LoadProgress,
) -> _Stood | None:
    """Take the model from its artifact, if there is one that can be used."""
    started = time.monotonic()
    restored = artifact.restore(options, served, dtype, progress)
    if restored is None:
        return None
    model, record = restored
    loaded_at = time.monotonic()
    device = pick_device(options.device)
    nn.Module.to(model, device)
    phases = {"read": loaded_at - started, "quantize": 0.0, "pack": 0.0, "install": time.monotonic() - loaded_at}
    return _Stood(
        model=model,
        record=record,
        device=device,
        dtype=dtype,
        phase_seconds=phases,
        total_seconds=loaded_at - started,
        is_restored=True,
    )


def _read(
    options: LoadOptions, served: ServedModel, checkpoint: Checkpoint, *, head: str, progress: LoadProgress
) -> _Stood:
    """Stream the checkpoint through transformers' loader and the conversion hook, then move the result."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device, served.dtype)
    progress.enter(Phase.LOAD, checkpoint.num_bytes)
    started = time.monotonic()
    model, record = _stream(options, served, checkpoint.refs, head=head, dtype=dtype)
    loaded_at = time.monotonic()
    nn.Module.to(model, device)  # buffer by buffer: the host copy of each goes at once
    read_s = checkpoint.meter.seconds
    install_s = time.monotonic() - started - read_s - record.quantize_s - record.pack_s
    phases = {"read": read_s, "quantize": record.quantize_s, "pack": record.pack_s, "install": install_s}
    return _Stood(
        model=model,
        record=record,
        device=device,
        dtype=dtype,
        phase_seconds=phases,
        total_seconds=loaded_at - started,
    )


def _check(stood: _Stood, plan: LoadPlan) -> WeightBytes:
    """The honesty check; the bytes that the model holds."""
    integrity.check_tensors(stood.model)
    integrity.check_coverage(stood.record)
    held = weight_bytes(stood.model, stood.record)
    integrity.check_plan(held, plan.weight_bytes)
    return held


def _report(
    options: LoadOptions,
    source: ModelSource,
    stood: _Stood,
    *,
    held: WeightBytes,
    resident_before: int,
    checked_at: float,
) -> LoadReport:
    model, record, device = stood.model, stood.record, stood.device
    return LoadReport(
        recipe=options.recipe.text,
        scheme=options.recipe.label,
        dtype=str(stood.dtype).removeprefix("torch."),
        device=device.type,
        kernel="torch" if options.recipe.is_none else kernel_name(device.type, stood.dtype),
        revision=source.revision,
        weight_hash=weight_hash(model),
        weight_bytes=held,
        original_bytes=record.original_bytes,
        num_parameters=record.num_parameters,
        phase_seconds=stood.phase_seconds | {"cache_write": 0.0, "probe": time.monotonic() - checked_at},
        total_seconds=stood.total_seconds,
        peak_bytes=peak_bytes(device),
        resident_before_bytes=resident_before,
        honesty=integrity.findings(model, record, held),
        layers=layer_reports(model, record),
    )


def _stream(
    options: LoadOptions, served: ServedModel, refs: dict[str, TensorRef], *, head: str, dtype: torch.dtype
) -> tuple[PreTrainedModel, LoadRecord]:
    config, record = served.config, LoadRecord(watch=options.watch)
    try:
        with class_errors():
            loaded: Any = served.model_class.from_pretrained(
                None,
                config=config,
                state_dict=refs,
                quantization_config=LoadQuantizationConfig(options.recipe, record),
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
    fill_unread(record)
    model.requires_grad_(False)
    return model, record


def settle_vocabulary(served: ServedModel, refs: dict[str, TensorRef]) -> str:
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
