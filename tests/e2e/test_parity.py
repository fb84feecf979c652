"""What is loaded and served, quantized or not, against transformers' `generate` on the same weights, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from service.demo import model_folder
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.engine.support import generate, greedy, make_prompt, running
from tests.models import FAMILIES

RECIPES = ["none", "w8a16", "w8a16-g32", "w4a16-g32", "w4a16-g32-sym"]
TEXTS = [
    "The captain looked at the sea and",
    "It was",
    "At the end of the long corridor, beyond the door which nobody had opened since the old man died, she heard",
    "'My dear sir,' said the lawyer,",
]
MAX_TOKENS = 24


def load(folder: Path, recipe: str) -> PreTrainedModel:
    options = LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype="float32")
    model = load_model(options, LoadProgress()).model
    assert isinstance(model, PreTrainedModel)
    return model


def assert_equal_to_generate(model: PreTrainedModel, prompts: list[list[int]], vocab_size: int) -> None:
    expected = [generate(model, prompt, MAX_TOKENS) for prompt in prompts]
    with running(model, vocab_size=vocab_size, max_num_batched_tokens=16, kv_memory_bytes=1 << 23) as (
        engine,
        recorder,
    ):
        engine.submit("alone", prompts[0], greedy(MAX_TOKENS))
        recorder.end("alone")
        assert recorder.tokens("alone") == expected[0]
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
            if i == 0:
                recorder.wait_for_tokens("0")  # the others meet a neighbour that decodes
        for i in range(len(prompts)):
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_demo_model_gets_the_tokens_of_generate_alone_and_in_a_mixed_batch(recipe: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    assert_equal_to_generate(load(model_folder(), recipe), prompts, vocab_size=len(tokenizer))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_family_gets_the_tokens_of_generate(
    family: str, recipe: str, checkpoint: Callable[[str], Path]
) -> None:
    prompts = [make_prompt(n) for n in (5, 17, 33, 1)]
    with torch.inference_mode():
        assert_equal_to_generate(load(checkpoint(family), recipe), prompts, vocab_size=300)
