"""One model type through the whole service: tiny checkpoint, load, engine, and transformers' own tokens beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from service.engine.filters import packing_obstacle
from service.engine.stats import EnginePath
from service.errors import PennyweightError
from service.loading.loader import LoadedModel
from tests.engine.support import greedy, running
from tests.families.recipes import CONTEXT, GENERATE_DEPARTS, VOCAB_SIZE, build
from tests.loading.support import load, round_weights

NOT_BUILT = "not built"
REFUSED = "refused"
WHOLE_PROMPTS = "per-request, whole prompts"

PROMPT_LENGTHS = (5, 23, 1, 11)
MIN_QUANTIZED_SHARE = 0.9
_NOT_NAMED = ("routers", "input embeddings", "shares")
"""How the report begins its reason for what no recipe quantizes by itself, or has quantized under another name."""
MAX_TOKENS = 12
MAX_NUM_BATCHED_TOKENS = 16
"""Fewer than the longest prompt, so that it is computed in chunks where that is possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a type.

    Attributes:
        result: the path, with whether prompts are computed whole; or `REFUSED` or `NOT_BUILT`.
        reason: why the path is not the packed one; the text of the refusal or of the error.
        quantized: why it is not served as `w8a16`; empty if it is, or is not served at all.
        quantized_share: of the weights of linears and experts, `w8a16`.
        num_distinct: tokens that occur in the outputs.
        seconds: of all of this.
    """

    result: str
    reason: str = ""
    quantized: str = ""
    quantized_share: float = 0.0
    num_distinct: int = 0
    seconds: float = 0.0


def sweep(model_type: str, folder: Path) -> Outcome:
    """Build, save, load and serve a type, unquantized and as `w8a16`.

    Raises:
        AssertionError: tokens differ from those of transformers.
    """
    started = time.monotonic()
    outcome = _sweep(model_type, folder)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


def _sweep(model_type: str, folder: Path) -> Outcome:
    try:
        model = build(model_type)
    except Exception as error:  # noqa: BLE001 - configs and models raise anything
        return Outcome(result=NOT_BUILT, reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
    model.save_pretrained(folder)
    reference = type(model).from_pretrained(folder, dtype=torch.float32)
    reference.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # some force their last token
    try:
        outcome = _serve(model_type, load(folder, "none"), reference)
    except PennyweightError as error:
        return Outcome(result=REFUSED, reason=str(error))
    rounded: Any = load(folder, "none").model
    rounded.generation_config = reference.generation_config
    try:
        loaded = load(folder, "w8a16")
        assert loaded.plan.weight_bytes == loaded.report.weight_bytes, "the plan knew it to the byte"
        round_weights(rounded, loaded)
        quantized = _serve(model_type, loaded, rounded)
    except PennyweightError as error:
        return replace(outcome, quantized=str(error))
    assert quantized.result == outcome.result, "the recipe must not change the path"
    return replace(outcome, quantized_share=_quantized_share(loaded))


def _serve(model_type: str, loaded: LoadedModel, reference: PreTrainedModel) -> Outcome:
    """Serve prompts of several lengths together, and compare with a model that computes each alone."""
    obstacle = packing_obstacle(loaded.model) or "packed, it fails or its logits differ from those of its own forward"
    prompts = [_prompt(length) for length in PROMPT_LENGTHS]
    with running(
        loaded.model,
        max_model_len=min(CONTEXT, loaded.context_length),
        vocab_size=loaded.vocab_size,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    ) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(prompts)):
            recorder.end(str(i))
        path = engine.path
    assert path is not None
    found = [recorder.tokens(str(i)) for i in range(len(prompts))]
    complete = _forward_greedily if model_type in GENERATE_DEPARTS else _generate
    expected = [complete(reference, prompt) for prompt in prompts]
    assert found == expected, f"{path}: {found} instead of {expected}"
    is_whole = max(step.num_tokens for step in recorder.steps) > MAX_NUM_BATCHED_TOKENS
    return Outcome(
        result=WHOLE_PROMPTS if path is EnginePath.PER_REQUEST and is_whole else path.value,
        reason="" if path is EnginePath.PACKED else obstacle,
        num_distinct=len({token for tokens in found for token in tokens}),
    )


def _prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(10, VOCAB_SIZE - 10, (length,), generator=generator).tolist()
    return ids


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, eos_token_id=None, do_sample=False
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def _forward_greedily(model: nn.Module, prompt: list[int]) -> list[int]:
    """By forwards over all tokens so far, with no cache."""
    ids = list(prompt)
    for _ in range(MAX_TOKENS):
        logits = model(torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _quantized_share(loaded: LoadedModel) -> float:
    """Of the weights that the recipe names by default: of linears, experts and the head."""
    rows = [row for row in loaded.report.layers if not row.reason.startswith(_NOT_NAMED)]
    total = sum(row.shape[0] * row.shape[1] for row in rows)
    return round(sum(row.shape[0] * row.shape[1] for row in rows if row.scheme != "none") / total, 3)
