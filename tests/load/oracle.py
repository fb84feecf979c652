"""Texts that a load test compares with, as far as they do not depend on how sums are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedModel

from service.engine.sequence import SamplingParams
from tests.engine.support import running
from tests.models import build_model

MIN_GAP = 1e-3
"""Between the two largest logits where a greedy text goes on; another order of the sums moves a logit by some 1e-5."""
ERROR, NUM_TRIES = 1e-5, 4
"""Of weights, relative, and how many models have such errors: about half of them notice what depends on rounding."""


def generate(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers' own `generate` and eager attention, with their log-probabilities.

    At most `max_tokens`, and no further than where two logits compete.
    """
    model.set_attn_implementation("eager")
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            eos_token_id=None,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.cat(out.logits)
    largest = logits.topk(2).values
    competing = (largest[:, 0] - largest[:, 1] < MIN_GAP).nonzero()
    count = int(competing[0]) if len(competing) else max_tokens
    tokens: list[int] = out.sequences[0, len(prompt) :].tolist()
    logprobs: list[float] = logits.log_softmax(-1).amax(-1).tolist()
    return tokens[:count], logprobs[:count]


def count_steady(texts: Sequence[tuple[list[int], dict[str, Any], list[int]]]) -> list[int]:
    """How many tokens of sampled texts are the same with weights that are slightly off.

    Args:
        texts: prompt, parameters as of a request, and tokens of each.
    """
    counts = [len(tokens) for _, _, tokens in texts]
    for seed in range(NUM_TRIES):
        model = build_model("faulty")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + ERROR * torch.randn(parameter.shape, generator=generator))
        with running(model, kv_memory_bytes=1 << 24, max_queue=len(texts)) as (engine, recorder):
            for number, (prompt, sampling, tokens) in enumerate(texts):
                engine.submit(str(number), prompt, _params(sampling, max_tokens=len(tokens)))
            for number, (_, _, tokens) in enumerate(texts):
                recorder.end(str(number))
                pairs = zip(tokens, recorder.tokens(str(number)), strict=False)
                counts[number] = min(counts[number], sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return counts


def _params(sampling: dict[str, Any], *, max_tokens: int) -> SamplingParams:
    biases = tuple((int(token_id), bias) for token_id, bias in sampling["logit_bias"].items())
    return SamplingParams(max_tokens=max_tokens, **sampling | {"logit_bias": biases})
