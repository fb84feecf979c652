"""From a model's config.json to the class that generates its text, and what the config says about serving it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from service.errors import CheckpointError, ModelError, ModelNotFound, PennyweightError, SettingError, UnsupportedModel
from service.loading.artifact import is_artifact, own_config
from service.loading.source import ModelSource

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CODE_KEY = "AutoModelForCausalLM"
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_COUNTS_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Their first position lies behind the padding id, and none before it is used."""
_UNSTATED_CONTEXT = 2048
"""Tokens, of ALiBi and recurrent families, whose configs state no limit: what BLOOM and Mamba were trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind a config.json.

    Attributes:
        model_class: generates text.
        config: of that class.
        dtype: of the checkpoint, if it says so.
        eos_token_ids: ids after which generation ends.
        context_length: positions that the model was made for.
        is_text_part: the checkpoint holds more than this model, for other kinds of input.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype | None
    eos_token_ids: frozenset[int]
    context_length: int
    is_text_part: bool


def read_model(source: ModelSource, *, trust_remote_code: bool) -> ServedModel:
    """Find the class that generates text; of a model with parts for several kinds of input, that of its text part.

    Code that the model brings along runs only if it is trusted and transformers has no class of the model's name.

    Raises:
        ModelNotFound: there is no config.json.
        CheckpointError: it does not parse.
        UnsupportedModel: not a causal language model, already quantized, or in need of code that is not trusted.
    """
    fields = _read_json(source)
    needs_code = _needs_code(fields)
    if needs_code and not trust_remote_code:
        raise UnsupportedModel(
            f"{source.name} brings its own code, which is not run unless you trust it; read the code, then give "
            "--trust-remote-code"
        )
    if not needs_code and not _is_known(fields.get("model_type")):
        raise UnsupportedModel(
            f"{source.name}: transformers has no model of this type ({fields.get('model_type')}); give a model that "
            "it has, or one that brings its own code"
        )
    config = _read_config(source, fields, with_code=needs_code)
    text_config: PreTrainedConfig = config.get_text_config()
    for part in (config, text_config):
        _refuse_quantized(part, source.name)
    if needs_code:
        model_class, text_config = _own_class(config, source), config
    else:
        model_class = _known_class(config, text_config, source.name)
    if text_config is not config and getattr(config, "tie_word_embeddings", False):
        text_config.tie_word_embeddings = True
    return ServedModel(
        model_class=model_class,
        config=text_config,
        dtype=getattr(config, "dtype", None) or getattr(text_config, "dtype", None),
        eos_token_ids=_eos_token_ids(source, config),
        context_length=_context_length(text_config),
        is_text_part=text_config is not config,
    )


def _read_json(source: ModelSource) -> dict[str, Any]:
    if is_artifact(source.folder):
        return own_config(source.folder)
    path = source.folder / "config.json"
    try:
        if not path.is_file():
            raise ModelNotFound(f"{source.name} has no config.json; give the directory of a Hugging Face model")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{source.name}: config.json cannot be read ({error.strerror}); make it readable"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source.name}: config.json does not parse ({first_line(error)}); download it again"
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{source.name}: config.json does not parse (it is no object); download it again")
    return fields


def _needs_code(fields: Mapping[str, Any]) -> bool:
    """Whether a model names code of its own, and transformers has no model class of that name."""
    auto_map = fields.get("auto_map")
    if not isinstance(auto_map, Mapping) or not {_CODE_KEY, "AutoConfig"} & auto_map.keys():
        return False
    model_type = str(fields.get("model_type"))
    known_class = _causal_class(CONFIG_MAPPING[model_type]) if _is_known(model_type) else None
    return known_class is None or known_class.__name__ not in (fields.get("architectures") or [])


def _is_known(model_type: object) -> bool:
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _causal_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    chosen: type[PreTrainedModel] | None = found[0] if isinstance(found, tuple | list) else found
    return chosen


def _read_config(source: ModelSource, fields: dict[str, Any], *, with_code: bool) -> PreTrainedConfig:
    config: PreTrainedConfig
    try:
        if is_artifact(source.folder):
            config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        else:
            config = AutoConfig.from_pretrained(source.folder, trust_remote_code=with_code)
        config.get_text_config()  # some configs have several text parts
    except Exception as error:  # config classes check values each in its own way, and own code may do anything
        raise _unfit(source, "config", error) from error
    return config


def _refuse_quantized(config: PreTrainedConfig, name: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{name} is already quantized ({method}); this version quantizes by itself: give the full-precision model"
        )


def _own_class(config: PreTrainedConfig, source: ModelSource) -> type[PreTrainedModel]:
    """The model class of a model's own code, which runs here."""
    reference = (getattr(config, "auto_map", None) or {}).get(_CODE_KEY)
    if reference is None:
        raise UnsupportedModel(f"{source.name}: its code has no {_CODE_KEY}, which serving needs; give another model")
    try:
        found = get_class_from_dynamic_module(reference, source.folder)
    except Exception as error:
        raise _unfit(source, "code", error) from error
    if not issubclass(found, PreTrainedModel):
        raise UnsupportedModel(f"{source.name}: its {found.__name__} is no PreTrainedModel; give another model")
    return found


def _known_class(config: PreTrainedConfig, text_config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class in transformers that generates text for a config."""
    architectures = list(getattr(config, "architectures", None) or ())
    described = architectures[0] if architectures else config.model_type
    endings = ("ForCausalLM", "LMHeadModel") + (("ForConditionalGeneration",) if text_config is not config else ())
    model_class = _causal_class(type(text_config))
    if model_class is None:  # some are listed for the whole only
        of_whole = _causal_class(type(config))
        model_class = of_whole if of_whole is not None and of_whole.config_class is type(text_config) else None
    is_causal = not architectures or any(
        a.endswith(endings) or (model_class is not None and a == model_class.__name__) for a in architectures
    )
    if getattr(config, "is_encoder_decoder", False) or not is_causal or model_class is None:
        part = "" if text_config is config else f" whose text part is of type {text_config.model_type}"
        raise UnsupportedModel(
            f"{name} is a {described}{part}, which does not continue text; give a decoder-only causal language model"
        )
    return model_class


def _unfit(source: ModelSource, what: str, error: Exception) -> UnsupportedModel:
    return UnsupportedModel(
        f"{source.name}: its {what} does not work with this version of transformers "
        f"({type(error).__name__}: {first_line(error)}); give another model"
    )


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        SettingError: CUDA asked for, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SettingError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu")


def pick_dtype(dtype: str, device: torch.device, of_checkpoint: torch.dtype | None) -> torch.dtype:
    """`auto` is the checkpoint's on CUDA; on a CPU bfloat16 where the CPU multiplies it, else float32."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda":
        return of_checkpoint or torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if has_bf16 else torch.float32


@contextmanager
def class_errors() -> Iterator[None]:
    """Within it, whatever a model's class raises becomes ours: classes fail in any way, above all those of own code.

    Raises:
        ModelError: with the first line of what it said.
    """
    try:
        yield
    except PennyweightError:
        raise
    except Exception as error:
        text = f"transformers could not load this model: {type(error).__name__}: {first_line(error)}"
        raise ModelError(text) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 200 characters."""
    return str(error).strip().split("\n", 1)[0][:200]


def _context_length(config: PreTrainedConfig) -> int:
    stated = (getattr(config, field, None) for field in _CONTEXT_FIELDS)
    length = next((length for length in stated if isinstance(length, int) and length > 0), _UNSTATED_CONTEXT)
    return length - config.pad_token_id - 1 if config.model_type in _COUNTS_FROM_PADDING else length


def _eos_token_ids(source: ModelSource, config: PreTrainedConfig) -> frozenset[int]:
    """From the generation config where there is one; it may list several."""
    sources: list[Any] = [config, config.get_text_config()]
    if (source.folder / "generation_config.json").is_file():
        try:
            sources.insert(0, GenerationConfig.from_pretrained(source.folder))
        except Exception as error:  # it checks values in any way
            raise CheckpointError(
                f"{source.name}: generation_config.json cannot be used ({type(error).__name__}); make it readable, "
                "download it again or remove it"
            ) from error
    found = (getattr(source, "eos_token_id", None) for source in sources)
    eos: int | list[int] = next((ids for ids in found if ids is not None), [])
    return frozenset([eos] if isinstance(eos, int) else eos)
