"""Recipes: which pattern wins, canonical text, labels, refusals."""

from __future__ import annotations

import hashlib

import pytest

from service.errors import RecipeError
from service.numerics.recipe import Recipe, num_layers, parse_recipe, resolve
from service.numerics.schemes import NONE, W8A16, parse_scheme

MLP = "model.layers.3.mlp.down_proj"


def test_last_matching_pattern_wins_over_default_and_earlier_ones() -> None:
    recipe = parse_recipe("w8a16, *.mlp.*=w4a16, *.down_proj=w8a16-g64, *.q_proj=none")
    assert recipe.scheme_for(MLP, is_head=False).name == "w8a16-g64"
    assert recipe.scheme_for("model.layers.3.mlp.up_proj", is_head=False).name == "w4a16-g64"
    assert recipe.scheme_for("model.layers.3.self_attn.q_proj", is_head=False) == NONE
    assert recipe.scheme_for("model.layers.3.self_attn.k_proj", is_head=False) == W8A16


def test_pattern_must_match_the_full_name_and_its_case() -> None:
    recipe = parse_recipe("none,down_proj=w8a16,*.DOWN_PROJ=w8a16")
    assert recipe.scheme_for(MLP, is_head=False) == NONE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w4a16", "w8a16"),
        ("w8a16-g128", "w8a16"),
        ("none", "none"),
        ("w4a16,lm_head=none", "none"),
        ("none,lm_head=w4a16", "w4a16-g64"),
        ("w4a16,*=w4a16-sym", "w4a16-g64-sym"),
    ],
)
def test_head_is_w8a16_by_row_unless_default_is_none_or_a_pattern_names_it(text: str, expected: str) -> None:
    assert parse_recipe(text).scheme_for("lm_head", is_head=True).name == expected


def test_text_is_canonical_and_reads_back() -> None:
    recipe = parse_recipe(" w4a16 , lm_head = w8a16-row+rtn,*.k_proj=none ")
    assert recipe.text == "w4a16-g64,lm_head=w8a16,*.k_proj=none"
    assert parse_recipe(recipe.text) == recipe


def test_label_is_the_scheme_or_a_hash_of_the_text() -> None:
    assert parse_recipe("w4a16").label == "w4a16-g64"
    digest = hashlib.sha256(b"w4a16-g64,lm_head=none").hexdigest()
    assert parse_recipe("w4a16-asym,lm_head=none").label == f"mixed-{digest[:8]}"


def test_unmatched_patterns_are_named() -> None:
    recipe = parse_recipe("w8a16,*.down_proj=w4a16,lm_haed=none")
    assert recipe.unmatched(iter([MLP, "lm_head"])) == ("lm_haed",)
    assert Recipe(default=parse_scheme("w8a16"), overrides=()).unmatched([]) == ()


@pytest.mark.parametrize("text", ["", " ", ",w8a16", "lm_head=none", "lm_head=none,w8a16"])
def test_recipe_without_a_default_scheme_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="does not begin with a default scheme"):
        parse_recipe(text)


@pytest.mark.parametrize("text", ["w8a16,", "w8a16,w4a16", "w8a16,=none", "w8a16,,lm_head=none"])
def test_override_that_is_not_pattern_and_scheme_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not PATTERN=SCHEME; write"):
        parse_recipe(text)


def test_same_pattern_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="pattern 'lm_head' is given twice"):
        parse_recipe("w8a16,lm_head=none,lm_head=none")


@pytest.mark.parametrize("text", ["int8", "w8a16,lm_head=int8", "w8a16,lm_head="])
def test_unknown_scheme_anywhere_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a quantization scheme"):
        parse_recipe(text)


def names(num_layers: int) -> list[str]:
    leaves = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    return ["lm_head", *(f"model.layers.{index}.{leaf}" for index in range(num_layers) for leaf in leaves)]


@pytest.mark.parametrize(
    ("count", "layers"),
    [
        (8, {0, 3, 6, 7}),  # the first and the last, and 3 and 6 of the rule of thirds
        (16, {0, 1, 4, 7, 10, 13, 14, 15}),
        (32, {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}),
    ],
)
@pytest.mark.parametrize("base", ["q4_k", "q5_k"])
def test_a_mixed_scheme_is_that_of_llama_cpp(base: str, count: int, layers: set[int]) -> None:
    mixed, counts = parse_scheme(f"{base}_m"), num_layers(names(count))
    resolved = {name: resolve(mixed, name, counts, in_features=512)[0].name for name in names(count)}
    six_bits = {name for name, scheme in resolved.items() if scheme == "q6_k"}
    assert six_bits == {
        f"model.layers.{index}.{leaf}" for index in layers for leaf in ("self_attn.v_proj", "mlp.down_proj")
    }
    assert {scheme for name, scheme in resolved.items() if name not in six_bits} == {base}


def test_layers_are_counted_by_stack() -> None:
    counted = num_layers(["encoder.layers.1.fc2", "decoder.layers.4.fc2", "decoder.layers.0.experts.7.w2", "lm_head"])
    assert counted == {"encoder.layers.": 2, "decoder.layers.": 5}


@pytest.mark.parametrize(("scheme", "fallback"), [("q4_k", "q5_0"), ("q5_k_m", "q5_1"), ("q6_k", "q8_0")])
def test_a_k_quant_falls_back_for_other_rows_than_multiples_of_256(scheme: str, fallback: str) -> None:
    kept, no_reason = resolve(parse_scheme(scheme), "x", {}, in_features=768)
    assert (kept.name, no_reason) == (scheme.removesuffix("_m"), "")
    for in_features in (1, 96, 576, 4095):
        found, reason = resolve(parse_scheme(scheme), "x", {}, in_features=in_features)
        assert found.name == fallback
        assert reason.startswith(f"rows of {in_features} weights are no multiple of 256")


def test_other_schemes_mean_what_they_say() -> None:
    for name in ("w4a16-g64", "q4_0", "nf4-dq", "w8a16-tensor"):
        assert resolve(parse_scheme(name), "model.layers.0.mlp.down_proj", {}, in_features=100) == (
            parse_scheme(name),
            "",
        )
