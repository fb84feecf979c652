"""Every model family: stock weights without a recipe, all that a recipe names with one, the tokens of generate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.layers.experts import QuantizedExperts
from service.loading.loader import LoadedModel
from service.numerics.schemes import parse_scheme
from service.numerics.storage import storage_shapes
from tests.engine.support import generate, greedy, make_prompt, running
from tests.loading.support import load, logits, round_weights, stock
from tests.models import CONTEXT, MORE_FAMILIES

RECIPES = ["w8a16", "w4a16-g32"]
EXPERTS = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"]
UNTOUCHED = re.compile(
    r"norm|ln_|bias$|sinks$"
    r"|mlp\.(gate|router|shared_expert_gate)\.weight$"
    r"|(embed_tokens|embed_in|embed_positions)\.weight$"
)
"""Parameters that stay as they are, unless an embedding is tied."""

PROMPTS = [make_prompt(n) for n in (5, 17)]
MAX_TOKENS = 16

Written = Callable[[str], Path]


def is_head(name: str, loaded: LoadedModel) -> bool:
    """Whether a row is of the head, or of the embedding that shares its weight."""
    rows = {row.name: row for row in loaded.report.layers}
    return name == "lm_head" or rows["lm_head"].reason == f"shares the weight of {name}"


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_an_unquantized_load_equals_the_stock_load_bit_for_bit(family: str, checkpoint: Written) -> None:
    loaded, reference = load(checkpoint(family)), stock(checkpoint(family))
    expected = reference.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert [n for n, tensor in loaded.model.state_dict().items() if not torch.equal(tensor, expected[n])] == []
    # Equal weights at other addresses may be summed in another order: float32 rounding of a few hundred terms.
    difference = (logits(loaded.model) - logits(reference)).abs().max()
    assert difference <= 1e-5 * logits(reference).abs().max()
    assert loaded.report.saving_ratio == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_all_that_the_recipe_names_carries_its_scheme_and_nothing_else(
    family: str, recipe: str, checkpoint: Written
) -> None:
    loaded = load(checkpoint(family), recipe)
    rows = {row.name: row for row in loaded.report.layers}
    for name, parameter in stock(checkpoint(family)).named_parameters():
        row = rows.get(name) or rows.get(name.removesuffix(".weight"))
        if row is not None and is_head(row.name, loaded):
            assert row.scheme == "w8a16"
        elif UNTOUCHED.search(name):
            assert row is None or row.scheme == "none"
            assert torch.equal(loaded.model.get_parameter(name), parameter)
        else:
            assert row is not None, f"{name} is not in the report"
            assert row.scheme == recipe
            assert not row.reason
            assert 0 < row.relative_error < 0.2
    assert loaded.report.saving_ratio > 0.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_a_quantized_load_equals_the_stock_model_with_decoded_weights(
    family: str, recipe: str, checkpoint: Written
) -> None:
    loaded, reference = load(checkpoint(family), recipe), stock(checkpoint(family))
    round_weights(reference, loaded)
    expected, found = logits(reference), logits(loaded.model)
    # Same values, other order of float32 sums and roundings: 3 layers of at most 128 terms, each within 2^-23.
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_the_engine_gives_the_tokens_of_generate(family: str, recipe: str, checkpoint: Written) -> None:
    loaded, reference = load(checkpoint(family), recipe), stock(checkpoint(family))
    round_weights(reference, loaded)
    expected = [generate(reference, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) > 4, "outputs that hardly vary prove little"
    with running(loaded.model, max_model_len=CONTEXT) as (engine, recorder):
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(MAX_TOKENS))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
    assert [recorder.tokens(str(i)) for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", EXPERTS)
def test_bytes_of_experts_are_those_of_their_buffers(family: str, recipe: str, checkpoint: Written) -> None:
    loaded = load(checkpoint(family), recipe)
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, QuantizedExperts)}
    rows = {row.name: row for row in loaded.report.layers if row.name in layers}
    assert rows.keys() == layers.keys()
    assert {name.rpartition(".")[2] for name in layers} == {"gate_up_proj", "down_proj"}
    for name, layer in layers.items():
        shapes = storage_shapes(layer.out_features, layer.in_features, parse_scheme(recipe))
        expected = layer.num_experts * (shapes.codes_bytes + shapes.scales_bytes)
        assert rows[name].bytes == expected == sum(buffer.nbytes for buffer in layer.buffers())
        assert rows[name].shape == (layer.num_experts * layer.out_features, layer.in_features)
    total = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    assert loaded.report.weight_bytes.total == total
    expected_codes = sum(b.nbytes for n, b in loaded.model.named_buffers() if n.endswith("qweight"))
    assert loaded.report.weight_bytes.codes == expected_codes


@pytest.mark.parametrize("recipe", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_codebooks_reach_linears_and_experts(family: str, recipe: str, checkpoint: Written) -> None:
    loaded, reference = load(checkpoint(family), recipe), stock(checkpoint(family))
    schemes = {row.name.rpartition(".")[2]: row.scheme for row in loaded.report.layers}
    assert {schemes[name] for name in ("q_proj", "gate_up_proj", "down_proj")} == {recipe}
    round_weights(reference, loaded)
    expected = logits(reference)
    assert (logits(loaded.model) - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_experts_opt_out_one_by_one(checkpoint: Written) -> None:
    loaded = load(checkpoint("mixtral"), "w8a16,*.0.mlp.experts.*=none,*.1.mlp.experts.down_proj=w4a16-g32")
    reference = stock(checkpoint("mixtral"))
    schemes = {row.name: row.scheme for row in loaded.report.layers if "experts" in row.name}
    assert list(schemes.values()) == ["none", "none", "w8a16", "w4a16-g32"]
    round_weights(reference, loaded)
    expected = logits(reference)
    assert (logits(loaded.model) - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_a_pattern_reaches_a_router(checkpoint: Written) -> None:
    loaded = load(checkpoint("qwen2_moe"), "w8a16,*.shared_expert_gate=w8a16")
    rows = [row for row in loaded.report.layers if row.name.endswith("shared_expert_gate")]
    assert [(row.scheme, row.reason) for row in rows] == [("w8a16", "")] * 2
