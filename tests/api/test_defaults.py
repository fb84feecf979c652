"""Sampling defaults: which values of a generation config are taken, and which are not, and who says so."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from service.api.defaults import SamplingDefaults, read_sampling_defaults

OPENAI = SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0)


def read(folder: Path, stated: dict[str, Any]) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return read_sampling_defaults(folder)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, OPENAI),
        ({"do_sample": True}, OPENAI),
        ({"temperature": 0.6}, SamplingDefaults(temperature=0.6)),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
            SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
        ),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1}, OPENAI),
        ({"min_p": 0.05, "repetition_penalty": 1.1}, SamplingDefaults(min_p=0.05, repetition_penalty=1.1)),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingDefaults(repetition_penalty=1.1)),
        ({"temperature": 0, "top_p": 1, "top_k": 0}, SamplingDefaults(temperature=0.0)),
        ({"temperature": None, "top_p": None, "top_k": None, "min_p": None}, OPENAI),
        ({"repetition_penalty": 1.0, "min_p": 0.0, "max_new_tokens": 5}, OPENAI),
    ],
    ids=["nothing", "sampled", "one", "all", "greedy", "others", "greedy with a penalty", "lowest", "null", "neutral"],
)
def test_what_is_stated_is_taken_unless_the_model_does_not_sample(
    tmp_path: Path, stated: dict[str, Any], expected: SamplingDefaults, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(tmp_path, stated) == expected
    assert caplog.messages == []


def test_a_model_without_a_generation_config_has_the_defaults_of_openai(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == OPENAI


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 2.1, "1", True, float("nan"), float("inf"), [1])),
        *(("top_p", value) for value in (0, 1.1, -1, "a")),
        *(("top_k", value) for value in (-1, 1.5, False, "5")),
        *(("repetition_penalty", value) for value in (0, 0.05, 11, "1", True)),
        *(("min_p", value) for value in (-0.1, 1.1, "0")),
    ],
)
def test_a_value_that_cannot_be_used_is_left_out_and_logged(
    tmp_path: Path, name: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, {name: value}) == OPENAI
    assert f"generation_config.json: {name} is" in caplog.text
    assert "it is not used" in caplog.text
