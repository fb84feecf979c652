"""Recipes on a text: what is asked for, the rows, and how they are told."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from service.api.text import encode_text
from service.errors import DoesNotFit, ModelError, RecipeError, SettingError, UnsupportedModel
from service.layers.linear import PackedLinear
from service.loading.artifact import MANIFEST_NAME
from service.loading.plan import Limits
from service.loading.planning import LoadOptions
from service.loading.source import ModelSource
from service.numerics.recipe import parse_recipe
from service.reports.evaluate import EvaluationReport, TextIds, evaluate, print_report
from service.reports.evaluate_options import BUNDLED_TEXT, Evaluation, parse_recipes, read_options
from service.reports.evaluate_plot import draw
from tests.loading.support import load
from tests.models import CONTEXT, build_tokenizer, write_checkpoint

ANY_SOURCE = ModelSource(folder=Path(), name="any", revision="local")
RECIPES = "w8a16;w4a16-g32;nf4,*.1.*=none"


def words(**given: str) -> Mapping[str, Any]:
    return {"text": None, "windows": None, "plot": None} | given


def no_progress(_text: str, _num_done: int, _num_all: int) -> None:
    """Nobody looks."""


def tokenize(_source: ModelSource, text: str) -> TextIds:
    return TextIds(*encode_text(build_tokenizer(), text))


def evaluated(
    folder: Path,
    recipes: str,
    *,
    text: str = BUNDLED_TEXT,
    max_windows: int | None = 1,
    limits: Limits | None = None,
    read_text: Callable[[Any, str], TextIds] = tokenize,
) -> EvaluationReport:
    evaluation = Evaluation(recipes=parse_recipes(recipes), text=text, max_windows=max_windows)
    options = LoadOptions(
        model=str(folder), recipe=parse_recipe("none"), device="cpu", dtype="bfloat16", limits=limits or Limits()
    )
    return evaluate(evaluation, options, read_text, no_progress)


def test_rows_are_the_unquantized_model_and_then_the_recipes(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    report = evaluated(folder, RECIPES)
    first, *rows = report.rows
    assert (first.recipe, first.kl_mean_nats, first.kl_p99_nats, first.top1_ratio) == ("none", 0, 0, 1)
    assert first.bits_per_parameter == 16
    assert [row.recipe for row in rows] == RECIPES.split(";")
    for row in rows:
        loaded = load(folder, row.recipe, dtype="bfloat16").report
        assert row.weight_bytes == loaded.weight_bytes.total
        assert row.bits_per_parameter == loaded.bits_per_parameter
        assert 0 < row.kl_mean_nats < row.kl_p99_nats
        assert 0 < row.top1_ratio <= 1
        assert first.weight_bytes == loaded.original_bytes
    assert rows[0].kl_mean_nats < rows[1].kl_mean_nats
    assert report.num_tokens == CONTEXT - 1


def test_none_among_the_recipes_is_the_row_that_is_there_anyway(checkpoint: Callable[[str], Path]) -> None:
    report = evaluated(checkpoint("gpt2"), "none;w8a16")
    assert [row.recipe for row in report.rows] == ["none", "w8a16"]
    assert [row.recipe for row in evaluated(checkpoint("gpt2"), "none").rows] == ["none"]


def test_progress_ends_with_all_of_it(checkpoint: Callable[[str], Path]) -> None:
    steps: list[tuple[str, int, int]] = []
    evaluation = Evaluation(recipes=parse_recipes("w8a16;nf4"), max_windows=1)
    options = LoadOptions(model=str(checkpoint("llama")), recipe=parse_recipe("none"), device="cpu")
    evaluate(evaluation, options, tokenize, lambda *step: steps.append(step))
    assert [text for text, *_ in steps] == sorted((text for text, *_ in steps), key=["none", "w8a16", "nf4"].index)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1] == ("nf4", 5, 5)


def test_one_quantized_model_is_there_at_a_time(checkpoint: Callable[[str], Path]) -> None:
    def count() -> int:
        return sum(type(held) is PackedLinear for held in gc.get_objects())

    def see(text: str, _num_done: int, _num_all: int) -> None:
        if text not in counts:  # it begins
            counts[text] = count() - before

    counts: dict[str, int] = {}
    evaluation = Evaluation(recipes=parse_recipes("w4a16;nf4"), max_windows=1)
    options = LoadOptions(model=str(checkpoint("llama")), recipe=parse_recipe("none"), device="cpu")
    gc.collect()
    gc.disable()  # so that nothing but the evaluation itself lets go of a model
    try:
        before = count()
        evaluate(evaluation, options, tokenize, see)
        assert (counts, count()) == ({"none": 0, "w4a16-g64": 0, "nf4": 0}, before)
    finally:
        gc.enable()


def test_windows_are_as_long_as_the_context(checkpoint: Callable[[str], Path]) -> None:
    report = evaluated(checkpoint("llama"), "none", max_windows=None)
    num_ids = len(tokenize(ANY_SOURCE, BUNDLED_TEXT).text)
    assert report.window_tokens == CONTEXT
    assert report.num_windows == -(-num_ids // CONTEXT)
    assert report.num_tokens == num_ids - report.num_windows


@pytest.mark.parametrize("text", ["", "x"], ids=["empty", "one token"])
def test_a_text_with_nothing_to_score_is_refused(text: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(SettingError, match=f"{len(text)} tokens, of which none can be scored; give a text"):
        evaluated(checkpoint("llama"), "w8a16", text=text)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("w8a16;nf4,lm_head=none,model.embed_tokens=w8a16", "lm_head=none and model.embed_tokens=w8a16: the two share"),
        ("w8a16;nf4,nothing=none", "pattern 'nothing' matches no layer"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused_before_any_is_tried(
    recipes: str, message: str, checkpoint: Callable[[str], Path]
) -> None:
    def read(_source: ModelSource, _text: str) -> TextIds:
        pytest.fail("the text was read")

    with pytest.raises(RecipeError, match=message):
        evaluated(checkpoint("llama_tied"), recipes, read_text=read)


def test_a_recipe_that_does_not_fit_into_memory_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(DoesNotFit):
        evaluated(checkpoint("llama"), "w8a16", limits=Limits(memory_bytes=1000))


def test_the_unquantized_model_need_not_fit_into_memory(checkpoint: Callable[[str], Path]) -> None:
    report = evaluated(checkpoint("llama"), "none", limits=Limits(memory_bytes=1000))
    assert [row.recipe for row in report.rows] == ["none"]


def test_tokens_that_the_model_does_not_have_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModel, match="its tokenizer gives token 300, its vocabulary ends before 300"):
        evaluated(checkpoint("llama"), "w8a16", read_text=lambda *_: TextIds([], [1, 300, 2]))


def test_a_model_that_was_quantized_before_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("{}", encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="was quantized before, and has no full-precision weights"):
        evaluated(tmp_path, "w8a16")


def test_numbers_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="none: the model computes numbers that are not finite on this text"):
        evaluated(folder, "w8a16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a16;w8a16-row", "'w8a16' stands twice in 'w8a16;w8a16-row'; give each recipe once"),
        ("w8a16;", "'' does not begin with a default scheme"),
        ("w8a16;w9a16", "'w9a16' is not a quantization scheme"),
        ("nf4,lm_head=none,lm_head=w8a16", "pattern 'lm_head' is given twice"),
        (";".join(["w8a16"] * 65), "65 recipes, it must be at most 64"),
    ],
)
def test_recipes_that_are_wrong_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipes(text)


def test_options_are_read(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Once upon a time", encoding="utf-8")
    found = read_options(words(text=str(text), windows="3", plot=str(tmp_path / "p.png")), " nf4 ; w8a16,lm_head=none")
    assert [recipe.text for recipe in found.recipes] == ["nf4", "w8a16,lm_head=none"]
    assert (found.text, found.text_name, found.max_windows) == ("Once upon a time", str(text), 3)
    assert found.plot == tmp_path / "p.png"
    assert read_options(words(), "w8a16") == Evaluation(recipes=(parse_recipe("w8a16"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a text of some pages"),
        (b" \n\t", "is empty; give a text of some pages"),
        (b"caf\xe9", "must be UTF-8, and is not; convert it"),
        (None, "cannot be read .*; give a file that can be"),
    ],
    ids=["empty", "blanks", "latin-1", "missing"],
)
def test_a_text_that_cannot_be_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(SettingError, match=f"--text .*text: {message}"):
        read_options(words(text=str(tmp_path / "text")), "w8a16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"windows": "0"}, "--windows 0: must be a whole number from 1 to 1000000"),
        ({"windows": "1e3"}, "--windows 1e3: must be a whole number"),
        ({"windows": "9" * 40}, "must be a whole number"),
        ({"plot": "figure.jpg"}, "--plot figure.jpg: must end in .png"),
        ({"plot": "/nowhere/figure.png"}, "--plot /nowhere/figure.png: must be a file in a folder that exists"),
    ],
    ids=["no window", "no number", "too many", "no png", "no folder"],
)
def test_a_value_that_is_wrong_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        read_options(words(**given), "w8a16")


def test_a_report_is_told_and_drawn(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    report = replace(evaluated(checkpoint("llama"), RECIPES), model="a $name with_ signs")
    console = Console(file=io.StringIO(), width=160)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(row.recipe in text for row in report.rows)
    assert f"{CONTEXT - 1} tokens of the bundled text in 1 windows of at most {CONTEXT}" in text
    assert "computed in float32" in text
    for name, rows in (("all.png", report.rows), ("none.png", report.rows[:1])):
        draw(replace(report, rows=rows), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("has_frame", [False, True])
def test_special_tokens_before_a_text_are_told_apart(has_frame: bool) -> None:
    tokenizer = build_tokenizer()
    if has_frame:
        _frame(tokenizer)
    plain = tokenizer.backend_tokenizer.encode("the captain<|endoftext|>", add_special_tokens=False).ids
    assert encode_text(tokenizer, "the captain<|endoftext|>") == ([0] if has_frame else [], plain)


def _frame(tokenizer: PreTrainedTokenizerFast) -> None:
    """Have it put the end of text before and behind each text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", pair=None, special_tokens=[("<|endoftext|>", 0)]
    )
