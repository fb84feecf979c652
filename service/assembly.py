"""Builds from settings what a service serves. It imports heavy libraries: only the load thread may import it."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.api.defaults import read_sampling_defaults
from service.api.grammars import GrammarChecker
from service.api.logs import adopt_library_logs
from service.api.state import ServedModel, ServiceState
from service.api.text import TextCodec
from service.demo import model_folder
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sizing import device_memory, kv_memory_bytes
from service.errors import CheckpointError, SettingError, UnsupportedModel
from service.loading.loader import LoadedModel, load_model, peak_bytes
from service.loading.plan import Limits
from service.loading.planning import LoadOptions
from service.loading.progress import Phase
from service.metrics import ModelFigures
from service.numerics.recipe import parse_recipe
from service.reports.machine import thread_limits
from service.settings import Settings, model_name

has_grammars = find_spec("llguidance") is not None
if has_grammars:
    from service.api.matchers import Matchers

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What the load thread made."""

    served: ServedModel
    engine: Engine
    figures: ModelFigures


def load(settings: Settings, state: ServiceState) -> Loaded:
    """Load the model and start its engine; runs on the load thread.

    Raises:
        PennyweightError: the model cannot be loaded or served.
    """
    adopt_library_logs()
    disable_progress_bars()
    num_threads = thread_limits().num_threads if settings.threads == "auto" else settings.threads
    torch.set_num_threads(num_threads)  # of this thread, for quantization
    loaded = load_model(load_options(settings), state.progress)
    peak, planned = loaded.report.peak_bytes["host"], loaded.plan.peak_bytes
    logger.info("the load took %d bytes at its peak, %d at most were planned", peak, planned)
    state.progress.enter(Phase.WARMUP)
    max_model_len = _max_model_len(settings, loaded)
    tokenizer, eos_token_ids = _load_tokenizer(loaded, trust_remote_code=settings.trust_remote_code)
    matchers = _make_matchers(tokenizer, loaded.vocab_size, eos_token_ids)
    engine = Engine(
        loaded.model,
        _engine_config(settings, loaded, max_model_len=max_model_len, num_threads=num_threads),
        observer=state.metrics,
        deliver=state.router.deliver,
        compile_grammar=None if matchers is None else matchers.compile,
    )
    engine.start()
    max_model_len = _within_kv_memory(settings, engine, max_model_len)
    device = next(loaded.model.parameters()).device
    report = replace(loaded.report, peak_bytes=peak_bytes(device))
    codec = TextCodec(tokenizer, context_length=max_model_len)
    served = ServedModel(
        engine=engine,
        codec=codec,
        report=report,
        vocab_size=loaded.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        sampling_defaults=read_sampling_defaults(loaded.folder),
        chat_template=codec.chat_template(),
        grammars=None if matchers is None else GrammarChecker(matchers),
    )
    figures = ModelFigures(report=report, engine_state=engine.state, device_memory=partial(device_memory, device))
    return Loaded(served, engine, figures)


def load_options(settings: Settings) -> LoadOptions:
    """What settings say about loading."""
    return LoadOptions(
        model=settings.model or str(model_folder()),
        recipe=parse_recipe(settings.quantize),
        folder_name=model_name(settings) if settings.model is None else None,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        cache_dir=settings.cache_dir,
        trust_remote_code=settings.trust_remote_code,
        kernel_isa=settings.kernel_isa,
        limits=Limits(memory_bytes=settings.memory, kv_memory_bytes=settings.kv_memory),
    )


def _make_matchers(tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> Matchers | None:
    """What compiles grammars for the tokenizer; None without the extra `grammar`."""
    if not has_grammars:
        return None
    return Matchers(tokenizer.backend_tokenizer.to_str, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def _engine_config(settings: Settings, loaded: LoadedModel, *, max_model_len: int, num_threads: int) -> EngineConfig:
    max_num_seqs = settings.max_num_seqs
    return EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_memory_bytes=kv_memory_bytes(
            loaded.model,
            requested=settings.kv_memory,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache=settings.kv_cache,
            memory_limit=settings.memory,
        ),
        kv_cache=settings.kv_cache,
        max_queue=settings.max_queue,
        vocab_size=loaded.vocab_size,
        num_threads=num_threads,
        prefix_cache=settings.prefix_cache == "on",
        step_budget_ms=settings.step_budget_ms,
        deterministic=settings.deterministic,
    )


def _load_tokenizer(loaded: LoadedModel, *, trust_remote_code: bool) -> tuple[PreTrainedTokenizerFast, frozenset[int]]:
    """The model's tokenizer, and all token ids that end a text."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{loaded.name}: its tokenizer does not load ({reason}); add tokenizer.json") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModel(f"{loaded.name}: its tokenizer exists in Python only; add a tokenizer.json")
    own_eos = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return tokenizer, loaded.eos_token_ids | own_eos


def _within_kv_memory(settings: Settings, engine: Engine, max_model_len: int) -> int:
    """The context, or as much of it as one sequence finds memory for."""
    state = engine.state()
    num_tokens = state.num_kv_blocks * state.block_size
    if num_tokens >= max_model_len:
        return max_model_len
    if settings.max_model_len is not None:
        raise SettingError(
            f"--max-model-len {max_model_len}: the KV memory holds {num_tokens} tokens; lower it, or raise --kv-memory"
        )
    logger.warning("the KV memory holds %d tokens, so does the context now; raise --kv-memory", num_tokens)
    return num_tokens


def _max_model_len(settings: Settings, loaded: LoadedModel) -> int:
    length = settings.max_model_len or loaded.context_length
    if length > loaded.context_length:
        raise SettingError(
            f"--max-model-len {length}: {loaded.name} was made for {loaded.context_length} tokens; use at most that"
        )
    return length
