"""The list of model types is that of transformers, and the documentation says what it says."""

from __future__ import annotations

import json

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from service.engine.stats import EnginePath
from tests.families.listed import read_list
from tests.families.sweep import MIN_QUANTIZED_SHARE, NOT_BUILT, REFUSED, WHOLE_PROMPTS
from tests.families.table import table
from tests.floors import ROOT

LISTED = read_list()
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "families_2026-11-22.json"

PACKED = set(
    """
    afmoe apertus arcee aria_text axk1 beam bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v3 doge ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1
    laguna lfm2 llama mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral3 mistral mixtral
    modernbert-decoder moshi nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_moe seed_oss smollm3 solar_open starcoder2 vaultgemma youtu
    """.split()  # noqa: SIM905 - one to a line would fill two screens
)
"""Known to be right packed, by an independent trial of the method."""
WITH_CACHES = {
    "bloom",
    "codegen",
    "falcon",
    "gpt_neo",
    "gptj",
    "mamba",
    "mamba2",
    "mpt",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "stablelm",
}
"""Known to be right with a cache for each sequence."""


def test_every_type_of_transformers_is_listed_and_no_other() -> None:
    assert list(LISTED) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_every_listed_result_is_one_that_there_is() -> None:
    results = {path.value for path in EnginePath} | {WHOLE_PROMPTS, REFUSED, NOT_BUILT}
    assert {row.result for row in LISTED.values()} == results


def test_whatever_is_not_packed_has_its_reason() -> None:
    assert [t for t, row in LISTED.items() if bool(row.reason) == (row.result == "packed")] == []
    unserved = [t for t, row in LISTED.items() if row.result in (REFUSED, NOT_BUILT)]
    assert [t for t, row in LISTED.items() if bool(row.message) != (t in unserved)] == []


def test_the_types_that_are_known_to_be_right_packed_are() -> None:
    assert len(PACKED) == 81
    assert {model_type for model_type in PACKED if LISTED[model_type].result != "packed"} == set()


def test_the_types_that_are_known_to_be_right_with_caches_are_served() -> None:
    slow = {"per-request", WHOLE_PROMPTS, "single"}
    assert {model_type for model_type in WITH_CACHES if LISTED[model_type].result not in slow} == set()


def test_the_document_is_the_list() -> None:
    document = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert document == table(LISTED), "write it anew: python -m tests.families.table --output docs/families.md"


def test_the_stored_sweep_is_that_of_the_list() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert {t: row["result"] for t, row in stored.items()} == {t: row.result for t, row in LISTED.items()}
    served = [row for row in stored.values() if row["num_distinct"] and not row["quantized"]]
    assert min(row["quantized_share"] for row in served) >= MIN_QUANTIZED_SHARE
