"""From a model's name to a quantized model in memory, one tensor at a time.

source -> checkpoint (lazy refs) -> transformers' loader -> conversion hook -> buffers -> integrity -> report
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from service.errors import CheckpointError, ModelError, ModelNotFound, SettingError, UnsupportedModel
from service.kernels.dispatch import KERNEL
from service.loading import integrity, memory
from service.loading.checkpoint import Checkpoint, TensorRef
from service.loading.progress import LoadProgress, Phase
from service.loading.quantizer import LoadQuantizationConfig, LoadRecord, find_vocabulary
from service.loading.report import LoadReport
from service.loading.sizes import layer_reports, weight_bytes
from service.loading.source import ModelSource, resolve_source
from service.numerics.recipe import Recipe

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What to load and how.

    Attributes:
        model: local directory or hub id.
        device: `auto`, `cpu` or `cuda`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`; of activations and unquantized weights.
        cache_dir: where hub files are kept; None for huggingface_hub's own place.
    """

    model: str
    recipe: Recipe
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    cache_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready for the engine.

    Attributes:
        folder: config and tokenizer files.
        context_length: positions that the model was made for.
        eos_token_ids: ids after which generation ends.
    """

    model: nn.Module
    report: LoadReport
    folder: Path
    name: str
    revision: str
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]


def load_model(options: LoadOptions, progress: LoadProgress) -> LoadedModel:
    """Find, check, read and quantize a model.

    Raises:
        ModelNotFound, UnsupportedModel, CheckpointError, QuantizationError: see `service.errors`.
        SettingError, RecipeError: a setting does not fit the model or the machine.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = resolve_source(options.model, revision=options.revision, cache_dir=options.cache_dir, progress=progress)
    progress.enter(Phase.PLAN)
    config = read_config(source)
    model_class = causal_lm_class(config, source.name)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device, config)
    resident_before = memory.resident_bytes()
    with memory.tight_heap(), Checkpoint(source.folder, progress.advance) as checkpoint:
        progress.enter(Phase.LOAD, checkpoint.num_bytes)
        started = time.monotonic()
        model, record = _stream(model_class, config, checkpoint, recipe=options.recipe, dtype=dtype)
        loaded_at = time.monotonic()
        nn.Module.to(model, device)  # buffer by buffer: the host copy of each goes at once
        installed_at = time.monotonic()
        integrity.check_tensors(model)
        integrity.check_coverage(record)
        read_s = checkpoint.meter.seconds
    install_s = installed_at - started - read_s - record.quantize_s - record.pack_s
    phases = {"read": read_s, "quantize": record.quantize_s, "pack": record.pack_s, "install": install_s}
    report = LoadReport(
        recipe=options.recipe.text,
        scheme=options.recipe.label,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        kernel=KERNEL,
        revision=source.revision,
        weight_bytes=weight_bytes(model, record),
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
        folder=source.folder,
        name=source.name,
        revision=source.revision,
        vocab_size=config.get_text_config().vocab_size,
        context_length=_context_length(config, source.name),
        eos_token_ids=_eos_token_ids(source.folder, config),
    )


def read_config(source: ModelSource) -> PreTrainedConfig:
    """The model's config.

    Raises:
        ModelNotFound: there is no config.json.
        CheckpointError: it does not parse.
        UnsupportedModel: unknown to transformers, or already quantized.
    """
    if not (source.folder / "config.json").is_file():
        raise ModelNotFound(f"{source.name} has no config.json; give the directory of a Hugging Face model")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(
            f"{source.name}: transformers has no model of this type ({_first_line(error)}); code that a model brings "
            "along is not run"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{source.name}: config.json does not parse ({_first_line(error)})") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{source.name} is already quantized ({method}); this version quantizes by itself: give the "
            "full-precision model"
        )
    return config


def causal_lm_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The transformers class that generates text for a config.

    Raises:
        UnsupportedModel: an encoder, an encoder-decoder, or a model with more than text.
    """
    architectures = list(getattr(config, "architectures", None) or ())
    described = architectures[0] if architectures else config.model_type
    is_causal = not architectures or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(config, "is_encoder_decoder", False) or not is_causal or model_class is None:
        raise UnsupportedModel(
            f"{name} is a {described}, which does not continue text; give a decoder-only causal language model"
        )
    chosen: type[PreTrainedModel] = model_class[0] if isinstance(model_class, tuple | list) else model_class
    return chosen


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        SettingError: CUDA asked for, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SettingError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu")


def pick_dtype(dtype: str, device: torch.device, config: PreTrainedConfig) -> torch.dtype:
    """`auto` is the checkpoint's on CUDA; on a CPU bfloat16 where the CPU multiplies it, else float32."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        checkpoint_dtype: torch.dtype | None = getattr(config, "dtype", None)
        return checkpoint_dtype or torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_bf16 else torch.float32


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak bytes until now: resident memory of the process, and allocated memory of the device."""
    peaks = {"host": memory.peak_resident_bytes()}
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks


def _stream(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    checkpoint: Checkpoint,
    *,
    recipe: Recipe,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, LoadRecord]:
    with torch.device("meta"):
        vocabulary = find_vocabulary(skeleton := model_class(config))
    if vocabulary.is_tied:
        _settle_tied_pair(skeleton, config, checkpoint.refs)
    record = LoadRecord()
    try:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=checkpoint.refs,
            quantization_config=LoadQuantizationConfig(recipe, record),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are collected, and refused below with their names
            output_loading_info=True,
        )
    except RuntimeError as error:
        if record.failure is not None:
            raise record.failure from error
        raise ModelError(f"transformers could not load this model: {_first_line(error)}") from error
    model: PreTrainedModel
    model, info = loaded
    shared_heads = {f"{vocabulary.head}.weight"} if config.get_text_config().tie_word_embeddings else set[str]()
    integrity.check_names(info, record, shared_heads)
    model.requires_grad_(False)
    return model, record


def _settle_tied_pair(skeleton: PreTrainedModel, config: PreTrainedConfig, refs: dict[str, TensorRef]) -> None:
    """Bring a tied checkpoint into one form: only the embedding's name, or an honestly untied pair.

    Checkpoints of tied models hold the weight under either name, or twice. Two different weights mean that
    the config is wrong; then the pair is served untied, as transformers does.
    """
    for head, embedding in skeleton.all_tied_weights_keys.items():
        if head in refs and embedding not in refs:
            refs[embedding] = refs.pop(head)
        elif head in refs and not refs[head].same_bytes(refs[embedding]):
            config.get_text_config().tie_word_embeddings = False


def _context_length(config: PreTrainedConfig, name: str) -> int:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise UnsupportedModel(f"{name}: its config states no max_position_embeddings, so its context is unknown")
    return length


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> frozenset[int]:
    """From the generation config where there is one; it may list several."""
    has_generation_config = (folder / "generation_config.json").is_file()
    source: Any = GenerationConfig.from_pretrained(folder) if has_generation_config else config.get_text_config()
    eos = source.eos_token_id
    return frozenset(() if eos is None else [eos] if isinstance(eos, int) else eos)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
