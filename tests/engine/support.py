"""A running engine for tests: what it delivers and observes, and small models with unusual attention."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.grammar import Compile
from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent, SequenceTimings
from service.engine.stats import StepStats
from tests.models import VOCAB_SIZE, build_model

TIMEOUT_S = 60.0

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "sliding_window": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

BYTES_PER_BLOCK = 16 * 3 * 2 * (2 * 16) * 4
"""Of the llama families: tokens, layers, K and V, heads and their size, float32."""


def make_model(family: str) -> PreTrainedModel:
    """A float32 model of 3 layers with random weights: a family of `tests.models`, or one below."""
    torch.manual_seed(0)
    model: PreTrainedModel
    match family:
        case "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES))
        case "gemma2":
            # Untied: with a tied head the scaled embedding would make each token repeat itself.
            options: dict[str, Any] = {
                "query_pre_attn_scalar": 16,
                "attn_logit_softcapping": 5.0,
                "tie_word_embeddings": False,
            }
            model = Gemma2ForCausalLM(Gemma2Config(**SIZES | options))
        case "gpt-oss":
            rope = {"rope_type": "default", "rope_theta": 10000.0}
            options = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": rope}
            model = GptOssForCausalLM(GptOssConfig(**SIZES | options))
        case _:
            return build_model(family)
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    nn.Module.eval(model)
    return model


def make_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + num_tokens)
    ids: list[int] = torch.randint(10, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
    return ids


def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy tokens by transformers' own `generate` and eager attention."""
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, eos_token_id=None, do_sample=False
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@dataclass(slots=True)
class Recorder:
    """Takes what an engine delivers and observes."""

    events: dict[str, list[SequenceEvent]] = field(default_factory=dict)
    steps: list[StepStats] = field(default_factory=list)
    finished: list[FinishReason] = field(default_factory=list)
    num_step_errors: int = 0
    num_nonfinite: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def deliver(self, events: Sequence[SequenceEvent]) -> None:
        with self._changed:
            for event in events:
                self.events.setdefault(event.request_id, []).append(event)
            self._changed.notify_all()

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_step_error(self) -> None:
        self.num_step_errors += 1

    def on_nonfinite(self) -> None:
        self.num_nonfinite += 1

    def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
        assert timings.total_s >= 0
        self.finished.append(reason)

    def clear(self) -> None:
        """Forget what came so far."""
        self.events.clear()
        self.finished.clear()

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events.get(request_id, []) for token in event.token_ids]

    def end(self, request_id: str) -> SequenceEvent:
        """Wait for the terminal event."""
        self._wait(lambda: any(event.finish_reason for event in self.events.get(request_id, [])), request_id)
        return next(event for event in self.events[request_id] if event.finish_reason)

    def wait_for_tokens(self, request_id: str, count: int = 1) -> None:
        self._wait(lambda: len(self.tokens(request_id)) >= count, request_id)

    def reason(self, request_id: str) -> FinishReason | None:
        return self.end(request_id).finish_reason

    def _wait(self, predicate: Callable[[], bool], request_id: str) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, TIMEOUT_S), f"{request_id} got {self.events.get(request_id)}"


class CheckedEngine(Engine):
    """Checks its blocks after each step."""

    def step(self) -> None:
        super().step()
        with self._changed:
            self._scheduler.check_integrity()


@contextmanager
def running(
    model: nn.Module, *, compile_grammar: Compile | None = None, **limits: Any
) -> Iterator[tuple[Engine, Recorder]]:
    """A started engine; at the end each request has had one terminal event, its last, and no block is held."""
    recorder = Recorder()
    config = EngineConfig(**{"max_model_len": 512, "kv_memory_bytes": 1 << 21, "vocab_size": VOCAB_SIZE, **limits})
    engine = CheckedEngine(model, config, observer=recorder, deliver=recorder.deliver, compile_grammar=compile_grammar)
    engine.start()
    try:
        yield engine, recorder
    finally:
        engine.stop()
    for request_id, events in recorder.events.items():
        reasons = [event.finish_reason for event in events]
        assert reasons[-1] is not None, f"{request_id} did not end"
        assert reasons[:-1] == [None] * (len(reasons) - 1), f"{request_id} ended more than once: {reasons}"
        assert events[-1].timings is not None
    assert len(recorder.finished) == len(recorder.events)
    state = engine.state()
    assert not state.has_failed
    assert state.num_free_kv_blocks + state.num_cached_kv_blocks == state.num_kv_blocks
    assert state.num_running == state.num_waiting == 0


def greedy(max_tokens: int, stop_token_ids: frozenset[int] = frozenset()) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=stop_token_ids)


def solo(model: nn.Module, prompt: list[int], params: SamplingParams) -> list[int]:
    """Tokens of one request that has an engine and a copy of the model for itself."""
    with running(copy.deepcopy(model)) as (engine, recorder):
        engine.submit("solo", prompt, params)
        recorder.end("solo")
    return recorder.tokens("solo")
