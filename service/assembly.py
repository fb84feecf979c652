"""Builds from settings what a service serves. It imports heavy libraries: only the load thread may import it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service.api.defaults import read_sampling_defaults
from service.api.grammars import GrammarChecker
from service.api.logs import adopt_library_logs
from service.api.probe_text import PROBE_TEXTS
from service.api.state import ServedModel, ServiceState
from service.api.text import TextCodec, encode_probe
from service.demo import model_folder
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.probe import num_probed_tokens
from service.engine.sizing import device_memory, kv_memory_bytes
from service.errors import CheckpointError, SettingError, UnsupportedModel
from service.loading.artifact import is_artifact
from service.loading.artifact_cache import CacheOptions, cache_folder
from service.loading.artifact_writer import CacheWriter
from service.loading.fidelity_report import NUM_TOKENS, Fidelity
from service.loading.fidelity_run import FidelityCheck
from service.loading.loader import LoadedModel, load_model, peak_bytes
from service.loading.plan import Limits
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress, Phase
from service.loading.report import LoadReport
from service.metrics import ModelFigures
from service.numerics.recipe import parse_recipe
from service.reports.machine import thread_limits
from service.settings import Settings, model_name

has_grammars = find_spec("llguidance") is not None
if has_grammars:
    from service.api.matchers import Matchers

logger = logging.getLogger(__name__)

_BUSY_S = 0.5


class Loaded(NamedTuple):
    """What the load thread made.

    Attributes:
        run_beside: compares beside requests, once the model is served; None if it is not to.
        cache_writer: keeps the quantized model for the next start, beside requests too.
    """

    served: ServedModel
    engine: Engine
    figures: ModelFigures
    fidelity: FidelityCheck
    run_beside: Callable[[], None] | None
    cache_writer: CacheWriter


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
    fidelity = compared_first(settings, loaded, tokenizer, state.progress)
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
    report = _final_report(loaded, fidelity.result(), device, max_model_len=max_model_len)
    codec = TextCodec(tokenizer, context_length=max_model_len)
    served = ServedModel(
        engine=engine,
        codec=codec,
        report=report,
        fidelity=fidelity.result,
        vocab_size=loaded.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        sampling_defaults=read_sampling_defaults(loaded.folder),
        chat_template=codec.chat_template(),
        grammars=None if matchers is None else GrammarChecker(matchers),
    )
    figures = ModelFigures(
        report=report,
        engine_state=engine.state,
        fidelity=fidelity.result,
        device_memory=partial(device_memory, device),
    )
    run_beside = partial(fidelity.run_beside, partial(_is_busy, engine), num_threads)
    cache_writer = CacheWriter(loaded.uncached, report.phase_seconds)
    return Loaded(
        served, engine, figures, fidelity, run_beside if settings.fidelity == "background" else None, cache_writer
    )


def _final_report(loaded: LoadedModel, fidelity: Fidelity, device: torch.device, *, max_model_len: int) -> LoadReport:
    """The report of the load with what came after it."""
    seconds = loaded.report.phase_seconds
    return replace(
        loaded.report,
        peak_bytes=peak_bytes(device),
        phase_seconds=seconds | {"probe": seconds["probe"] + fidelity.seconds},
        honesty=replace(loaded.report.honesty, num_probed_tokens=num_probed_tokens(max_model_len)),
    )


def compared_first(
    settings: Settings, loaded: LoadedModel, tokenizer: PreTrainedTokenizerFast, progress: LoadProgress
) -> FidelityCheck:
    """The comparison of a model with its original; it is made here, with torch's threads, if settings want it first.

    Raises:
        FidelityError: the KL is more than `--max-kl`, or is not known.
    """
    probe = encode_probe(tokenizer, PROBE_TEXTS, vocab_size=loaded.vocab_size, length=NUM_TOKENS)
    fidelity = FidelityCheck(loaded, probe)
    if _compares_first(settings):
        fidelity.run_first(progress, num_threads=torch.get_num_threads(), max_kl=settings.max_kl)
    return fidelity


def _compares_first(settings: Settings) -> bool:
    return settings.fidelity == "before-ready" or settings.max_kl is not None


def _is_busy(engine: Engine) -> bool:
    """Whether requests are being computed, or were a moment ago: another may come with the answer to the last."""
    state = engine.state()
    is_recent = state.since_step_s is not None and state.since_step_s < _BUSY_S
    return is_recent or state.num_running + state.num_waiting > 0


def load_options(settings: Settings) -> LoadOptions:
    """What settings say about loading."""
    return LoadOptions(
        artifacts=_cache_options(settings),
        verify=settings.verify,
        compares_first=_compares_first(settings),
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


def _cache_options(settings: Settings) -> CacheOptions | None:
    """Where quantized models are kept, if anywhere."""
    if settings.cache_limit == 0:
        return None
    try:
        folder = cache_folder(settings.cache_dir)
    except RuntimeError:  # a user without a home
        logger.warning("the quantized model is not cached: this user has no home; set --cache-dir")
        return None
    return CacheOptions(folder=folder, limit_bytes=settings.cache_limit)


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


def read_tokenizer(folder: Path, name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of the model of a name, from its files.

    Raises:
        CheckpointError: it is not there, or does not load.
        UnsupportedModel: it has no files that the library `tokenizers` reads.
    """
    try:
        tokenizer: Any
        if is_artifact(folder):  # it was saved from the tokenizer of the model's own class, complete
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # it takes the files as they come, and fails in any way
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(f"{name}: its tokenizer does not load ({reason}); add tokenizer.json") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModel(f"{name}: its tokenizer exists in Python only; add a tokenizer.json")
    return tokenizer  # type: ignore[no-any-return]


def _load_tokenizer(loaded: LoadedModel, *, trust_remote_code: bool) -> tuple[PreTrainedTokenizerFast, frozenset[int]]:
    """The model's tokenizer, and all token ids that end a text."""
    tokenizer: Any = read_tokenizer(loaded.folder, loaded.name, trust_remote_code=trust_remote_code)
    _require_vocabulary(tokenizer, loaded)
    own_eos = frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    return tokenizer, loaded.eos_token_ids | own_eos


def _require_vocabulary(tokenizer: Any, loaded: LoadedModel) -> None:
    """Refuse a tokenizer that gives token ids which the model does not know.

    Models are often made for more tokens than their tokenizer has. Some have fewer than theirs with the tokens that
    were added to it, as for images: a prompt with one of these is refused, the model is not.
    """
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    beginning = [token_id for token_id in (tokenizer.bos_token_id,) if token_id is not None]
    largest = max([*ids, *beginning], default=0)
    if largest >= loaded.vocab_size:
        raise CheckpointError(
            f"{loaded.name}: its tokenizer has token ids up to {largest}, the model takes 0..{loaded.vocab_size - 1}; "
            "the tokenizer belongs to another model: put the one of this model into its folder"
        )


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
