"""The table of schemes has all of them, says what the code says, and its figures are within what is asked of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from service.api.text import encode_text
from service.assembly import read_tokenizer
from service.demo import model_folder
from service.errors import RecipeError
from service.loading.planning import LoadOptions
from service.loading.source import ModelSource
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import ALIASES, NAMED, parse_scheme
from service.reports.evaluate import TextIds, evaluate
from service.reports.evaluate_options import Evaluation, parse_recipes
from tests.docs.schemes import RESULTS, ROWS, bits_per_weight, mixed_bits_per_weight, table
from tests.floors import ROOT

DOCUMENT = ROOT / "docs" / "schemes.md"
NOVEL = ROOT / "tests" / "data" / "the_lost_world.txt"

FAKE = {
    "w8a16": (36.5809, 0.00014),
    "w6a16-g64": (36.6139, 0.00069),
    "q6_k": (36.6008, 0.00088),
    "w5a16-g64": (36.6608, 0.00279),
    "q5_k_m": (36.6339, 0.00208),
    "w4a16-g32": (36.9251, 0.00923),
    "w4a16-g64": (37.0236, 0.01164),
    "w4a16-g64+mse": (36.9336, 0.00955),
    "w4a16-g128": (36.9630, 0.01396),
    "w4a16-g128-sym": (37.1517, 0.01495),
    "nf4": (37.0315, 0.01202),
    "q4_k_m": (36.7774, 0.00679),
    "q4_0": (36.9524, 0.01080),
    "w3a16-g64": (38.2863, 0.05556),
    "w3a16-g64+mse": (38.0297, 0.04595),
    "w2a16-g32": (49.2226, 0.29351),
    "w2a16-g16+mse": (41.2186, 0.12471),
}
"""Perplexity and mean KL of the demo model on the same windows, its weights rounded by plain code or by llama.cpp."""
FAKE_FACTOR = 1.3
UNQUANTIZED_PERPLEXITY = 36.5783
MAX_W8_LOSS = 0.002
FAMILIES = (
    ("w8a16", "w6a16-g64", "w5a16-g64", "w4a16-g64", "w3a16-g64", "w2a16-g64"),
    ("q8_0", "q6_k", "q5_k", "q4_k"),
    ("q5_k_m", "q4_k_m"),
    ("q8_0", "q5_0", "q4_0"),
    ("q5_1", "q4_1"),
    ("w4a16-g64+mse", "w3a16-g64+mse"),
    ("w4a16-g64+hqq", "w3a16-g64+hqq", "w2a16-g64+hqq"),
)
"""From more bits to fewer."""


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    return {row["recipe"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}


def test_the_documentation_is_what_the_code_and_the_measurements_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(), "python -m tests.docs.schemes --output docs/schemes.md"


def test_every_named_scheme_is_in_the_table() -> None:
    names = [row.scheme for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(names) >= {*NAMED, *ALIASES, "none"}


def test_every_number_of_bits_offset_and_fit_that_there_is_is_in_the_table() -> None:
    schemes = [parse_scheme(row.scheme) for row in ROWS]
    assert {s.bits for s in schemes if not s.named} == {2, 3, 4, 5, 6, 8, 16}
    assert {s.offset for s in schemes} == {"sym", "asym", "float"}
    assert {s.fit for s in schemes} == {"rtn", "mse", "hqq"}
    for bits in (1, 7):
        with pytest.raises(RecipeError):
            parse_scheme(f"w{bits}a16")


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("w8a16", 8 + 32 / 4096),
        ("w4a16-g64", 4 + 16 / 64 + 4 / 64),
        ("w4a16-g128-sym", 4 + 16 / 128),
        ("nf4", 4 + 32 / 64),
        ("q8_0", 8 + 16 / 32),
        ("q4_1", 4 + 32 / 32),
        ("q4_k", 4.5),
        ("q6_k", 6.5625),
        ("w2a16-g64", 2 + 16 / 64 + 4 / 64),
    ],
)
def test_bits_are_those_of_the_layout(scheme: str, bits: float) -> None:
    assert bits_per_weight(parse_scheme(scheme)) == bits


@pytest.mark.parametrize(("base", "bits"), [("q4_k", 4.5), ("q5_k", 5.5)])
def test_bits_of_a_mixed_scheme_are_those_of_its_layers(base: str, bits: float) -> None:
    value, down, all_weights = 4096**2, 4096 * 11008, 4 * 4096**2 + 3 * 4096 * 11008
    share = 16 / 32 * (value + down) / all_weights  # four layers first, four last, and eight between
    assert mixed_bits_per_weight(parse_scheme(f"{base}_m")) == pytest.approx(bits + share * (6.5625 - bits))


def test_divergences_are_near_those_of_plain_rounding(measured: dict[str, dict[str, Any]]) -> None:
    assert {name: measured[name]["kl_mean_nats"] for name in FAKE if _is_far(measured, name)} == {}


def _is_far(measured: dict[str, dict[str, Any]], name: str) -> bool:
    return bool(measured[name]["kl_mean_nats"] > FAKE_FACTOR * FAKE[name][1])


def test_losses_are_near_those_of_plain_rounding(measured: dict[str, dict[str, Any]]) -> None:
    unquantized = measured["none"]["perplexity"]
    assert unquantized == pytest.approx(UNQUANTIZED_PERPLEXITY, abs=1e-4)
    for name, (perplexity, _) in FAKE.items():
        assert measured[name]["perplexity"] - unquantized <= 1.05 * (perplexity - unquantized) + 0.02, name


@pytest.mark.parametrize(
    ("name", "max_kl", "min_top1"),
    [("w8a16", 0.003, 0.985), ("q6_k", 0.008, 0), ("q4_k_m", 0.04, 0.92), ("q4_0", 0.09, 0)],
)
def test_divergence_and_agreement_are_within_what_is_usual(
    name: str, max_kl: float, min_top1: float, measured: dict[str, dict[str, Any]]
) -> None:
    assert measured[name]["kl_mean_nats"] <= max_kl
    assert measured[name]["top1_ratio"] >= min_top1


def test_8_bits_lose_next_to_nothing(measured: dict[str, dict[str, Any]]) -> None:
    assert measured["w8a16"]["perplexity"] <= (1 + MAX_W8_LOSS) * measured["none"]["perplexity"]


@pytest.mark.parametrize("family", FAMILIES, ids="_".join)
def test_fewer_bits_diverge_more(family: tuple[str, ...], measured: dict[str, dict[str, Any]]) -> None:
    divergences = [measured[name]["kl_mean_nats"] for name in family]
    assert divergences == sorted(divergences)


@pytest.mark.nightly
def test_the_demo_model_still_is_as_measured(measured: dict[str, dict[str, Any]]) -> None:
    """On the first pages of the same novel: some 1000 tokens, so that means vary by their standard error."""

    def read_text(source: ModelSource, text: str) -> TextIds:
        return TextIds(*encode_text(read_tokenizer(source.folder, source.name, trust_remote_code=False), text))

    names = [*FAKE, "q8_0", "fp8"]
    evaluation = Evaluation(recipes=parse_recipes(";".join(names)), text=NOVEL.read_text(encoding="utf-8"))
    options = LoadOptions(model=str(model_folder()), recipe=parse_recipe("none"), device="cpu", dtype="bfloat16")
    report = evaluate(evaluation, options, read_text, lambda *_: None)
    for row in report.rows[1:]:
        usual = measured[row.recipe]["kl_mean_nats"]
        assert math.log(row.kl_mean_nats / usual) == pytest.approx(0, abs=math.log(FAKE_FACTOR)), row.recipe
