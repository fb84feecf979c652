"""What `pennyweight evaluate` finds: quality and size of recipes on a text, as JSON, or as a table for people."""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from service.errors import ModelError, SettingError, UnsupportedModel
from service.loading.artifact import is_artifact
from service.loading.config import pick_device
from service.loading.evaluation import Evaluator, TextQuality, Windows, cut
from service.loading.loader import load_model
from service.loading.memory import trim_heap
from service.loading.plan import LoadPlan
from service.loading.planning import LoadOptions, find_model, open_checkpoint, plan_found, prepare_process
from service.loading.progress import LoadProgress
from service.numerics.recipe import Recipe
from service.reports.evaluate_options import WINDOW_TOKENS, Evaluation
from service.reports.terminal import FILE_WIDTH

ARITHMETIC: Final = (
    "both sides computed in float32 from the weights that each holds, so that the figures are those of the format "
    "alone; the serving dtype and the kernels add rounding of their own"
)
_MB: Final = 1e6

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """A recipe; see `TextQuality` for the figures of quality.

    Attributes:
        recipe: canonical text; `none` is the model as it is in its files.
        weight_bytes: what a service with this recipe would hold at the serving dtype.
        bits_per_parameter: 8 * weight_bytes / number of parameters.
    """

    recipe: str
    perplexity: float
    kl_mean_nats: float
    kl_p99_nats: float
    top1_ratio: float
    weight_bytes: int
    bits_per_parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """All rows, that of `none` first.

    Attributes:
        text: what it is called.
        num_tokens: that were scored.
        window_tokens: of a whole window.
        dtype: serving dtype that bytes are counted at.
    """

    model: str
    text: str
    num_tokens: int
    num_windows: int
    window_tokens: int
    dtype: str
    arithmetic: str
    rows: tuple[EvaluationRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TextIds:
    """A text by a model's tokenizer: the special tokens that go before any, and its own."""

    prefix: Sequence[int]
    text: Sequence[int]


def evaluate(
    evaluation: Evaluation,
    options: LoadOptions,
    read_text: Callable[[Any, str], TextIds],
    on_progress: OnProgress,
) -> EvaluationReport:
    """Compare recipes with the unquantized model, one after another.

    Args:
        options: of loading; their recipe does not matter.
        read_text: gives the ids of a text, from where the model is and that text.

    Raises:
        SettingError, RecipeError: the text is too short, or a recipe does not fit the model.
        ModelError: the model cannot be loaded; DoesNotFit: with one of the recipes it needs more memory than there is.
    """
    prepare_process(options)
    if is_artifact(Path(os.path.expanduser(options.model))):
        raise UnsupportedModel(
            f"{options.model} was quantized before, and has no full-precision weights to compare with; give the model "
            "that it was made from"
        )
    source, served = find_model(options, LoadProgress())
    plans = _plan(evaluation.recipes, options)
    ids = read_text(source, evaluation.text)
    window_tokens = min(WINDOW_TOKENS, served.context_length)
    windows = _windows(evaluation, ids, window_tokens)
    _require_known(windows, served.config.get_text_config().vocab_size, source.name)
    quantized = [recipe for recipe in plans if not recipe.is_none]
    unquantized = next(iter(plans.values()))
    steps = _Steps(on_progress, num_all=(len(quantized) + 1) * len(windows.batches) + len(quantized))
    with Evaluator(source, served, windows, pick_device(options.device)) as evaluator:
        steps.begin("none")
        quality = evaluator.original(steps.step)
        rows = [_row("none", quality, unquantized.original_bytes, unquantized.num_parameters)]
        for recipe in quantized:
            steps.begin(recipe.text)
            rows.append(_evaluate_one(evaluator, replace(options, recipe=recipe), steps))
            gc.collect()  # models refer to themselves: the next one would come beside this one
            trim_heap()
    return EvaluationReport(
        model=source.name,
        text=evaluation.text_name,
        num_tokens=quality.num_tokens,
        num_windows=sum(len(batch) for batch in windows.batches),
        window_tokens=window_tokens,
        dtype=str(unquantized.dtype).removeprefix("torch."),
        arithmetic=ARITHMETIC,
        rows=tuple(rows),
    )


class _Steps:
    """Progress: a step is a model that was loaded, or a forward."""

    def __init__(self, on_progress: OnProgress, *, num_all: int) -> None:
        self._on_progress, self._num_all = on_progress, num_all
        self._num_done = 0
        self._text = ""

    def begin(self, text: str) -> None:
        self._text = text
        self._on_progress(text, self._num_done, self._num_all)

    def step(self) -> None:
        self._num_done += 1
        self._on_progress(self._text, self._num_done, self._num_all)


def _evaluate_one(evaluator: Evaluator, options: LoadOptions, steps: _Steps) -> EvaluationRow:
    """Load, compare and let go of a quantized model."""
    loaded = load_model(options, LoadProgress())
    steps.step()
    report = loaded.report
    quality = evaluator.compare(loaded.model, steps.step)
    return _row(report.recipe, quality, report.weight_bytes.total, report.num_parameters)


def _row(recipe: str, quality: TextQuality, weight_bytes: int, num_parameters: int) -> EvaluationRow:
    if not math.isfinite(quality.perplexity + quality.kl_mean_nats):
        raise ModelError(
            f"{recipe}: the model computes numbers that are not finite on this text; give another text, or check its "
            "weights"
        )
    return EvaluationRow(
        recipe=recipe,
        perplexity=quality.perplexity,
        kl_mean_nats=quality.kl_mean_nats,
        kl_p99_nats=quality.kl_p99_nats,
        top1_ratio=quality.top1_ratio,
        weight_bytes=weight_bytes,
        bits_per_parameter=8 * weight_bytes / num_parameters,
    )


def _plan(recipes: Iterable[Recipe], options: LoadOptions) -> dict[Recipe, LoadPlan]:
    """The plan of every recipe, before anything is computed: a wrong one costs no minutes."""
    plans = {}
    for recipe in recipes:
        wanted = replace(options, recipe=recipe)
        source, served = find_model(wanted, LoadProgress())  # each changes what it has of the config
        with open_checkpoint(source, served, LoadProgress()) as checkpoint:
            plans[recipe] = plan_found(wanted, source, served, checkpoint.refs)
        if not recipe.is_none:  # that one is never whole in memory
            plans[recipe].require_fit()
    return plans


def _windows(evaluation: Evaluation, ids: TextIds, window_tokens: int) -> Windows:
    try:
        return cut(ids.text, ids.prefix, window_tokens=window_tokens, max_windows=evaluation.max_windows)
    except ValueError as error:
        raise SettingError(
            f"--text {evaluation.text_name}: {len(ids.text)} tokens, of which none can be scored; give a text of some "
            "pages"
        ) from error


def _require_known(windows: Windows, vocab_size: int, name: str) -> None:
    largest = max(int(batch.max()) for batch in windows.batches)
    if largest >= vocab_size:
        raise UnsupportedModel(
            f"{name}: its tokenizer gives token {largest}, its vocabulary ends before {vocab_size}; tokenizer and "
            "weights belong to different models"
        )


def print_report(report: EvaluationReport, console: Console | None = None) -> None:
    """A line for each recipe, and what the figures are below."""
    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    table = Table(title=report.model, title_justify="left")
    for name in ("recipe", "perplexity", "loss", "KL mean", "KL p99", "top-1", "MB", "saving", "bits/parameter"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=name != "recipe")
    unquantized = report.rows[0]
    for row in report.rows:
        table.add_row(
            row.recipe,
            f"{row.perplexity:.4f}",
            f"{row.perplexity / unquantized.perplexity - 1:+.2%}",
            f"{row.kl_mean_nats:.5f}",
            f"{row.kl_p99_nats:.4f}",
            f"{row.top1_ratio:.1%}",
            f"{row.weight_bytes / _MB:.3f}",
            f"{1 - row.weight_bytes / unquantized.weight_bytes:.1%}",
            f"{row.bits_per_parameter:.2f}",
        )
    console.print(table, markup=False, highlight=False)
    for line in (
        f"{report.num_tokens} tokens of {report.text} in {report.num_windows} windows of at most "
        f"{report.window_tokens}; KL(none || recipe) in nats per token; bytes at {report.dtype}",
        report.arithmetic,
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
