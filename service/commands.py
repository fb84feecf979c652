"""The commands that measure and tell, and end. What they need is imported when one runs: `serve` starts without it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import SettingError
from service.loading.artifact import is_artifact
from service.numerics.recipe import parse_recipe
from service.reports.bench_options import KernelBench
from service.reports.bench_serve_options import ServeBench
from service.reports.evaluate_options import Evaluation
from service.reports.machine import thread_limits
from service.settings import Settings, read_hub_token

if TYPE_CHECKING:
    from service.loading.planning import LoadOptions


def doctor(settings: Settings | None, errors: Sequence[str], *, as_json: bool) -> int:
    """Print what there is to know about this machine and the settings; returns the exit code.

    `errors` say why there are no settings.
    """
    from service.reports.doctor import examine, print_diagnosis

    diagnosis = examine({} if settings is None else settings.model_dump(mode="json"), errors)
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
    else:
        print_diagnosis(diagnosis)
    return diagnosis.exit_code


def plan(settings: Settings, *, as_json: bool) -> int:
    """Print what loading the model would take; returns the exit code.

    Raises:
        ModelError: the model cannot be served; DoesNotFit: it needs more memory than there is.
        SettingError: a setting does not fit the model or the machine.
    """
    from service.assembly import load_options
    from service.loading.planning import plan_model
    from service.loading.progress import LoadProgress
    from service.reports.plan import plan_as_dict, print_plan

    if settings.hf_token_file is not None:
        os.environ["HF_TOKEN"] = read_hub_token(settings.hf_token_file)
    planned = plan_model(load_options(settings), LoadProgress())
    if as_json:
        print(json.dumps(plan_as_dict(planned, kv_cache=settings.kv_cache), indent=2))
    else:
        print_plan(planned, kv_cache=settings.kv_cache)
    planned.require_fit()
    return 0


def quantize(output: Path, settings: Settings, *, as_json: bool) -> int:
    """Write the quantized model into a folder of its own, and print what it takes; returns the exit code.

    Raises:
        ModelError: the model cannot be loaded or quantized, loses more than `--max-kl`, or cannot be written.
        SettingError: a setting does not fit the model or the machine.
    """
    if parse_recipe(settings.quantize).is_none:
        raise SettingError("--quantize none: there is nothing to quantize; serve the model itself")
    if settings.model is not None and is_artifact(Path(os.path.expanduser(settings.model))):
        raise SettingError(f"{settings.model} is quantized already; copy it")
    from service.assembly import compared_first, read_tokenizer
    from service.loading.artifact_export import export_artifact
    from service.loading.loader import load_model
    from service.loading.progress import Phase
    from service.reports.progress import shown_load

    with shown_load() as progress:
        loaded = load_model(_measuring_options(settings), progress)
        tokenizer = read_tokenizer(loaded.folder, loaded.name, trust_remote_code=False)
        fidelity = compared_first(settings, loaded, tokenizer, progress).result()
        progress.enter(Phase.WARMUP, loaded.contents.num_bytes)
        export_artifact(loaded, output, save_tokenizer=tokenizer.save_pretrained, on_bytes=progress.advance)
    report = loaded.report
    facts = {
        "output": str(output),
        "recipe": report.recipe,
        "dtype": report.dtype,
        "original_bytes": report.original_bytes,
        "quantized_bytes": report.weight_bytes.total,
        "saving_ratio": report.saving_ratio,
        "kl_mean_nats": fidelity.kl_mean_nats,
        "system_fingerprint": report.fingerprint,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"{loaded.name} as {report.recipe}: {report.weight_bytes.total} bytes of weights instead of "
            f"{report.original_bytes}, {report.saving_ratio:.1%} less\nserve it: pennyweight serve {output}"
        )
    return 0


def inspect(folder: Path | None, settings: Settings, *, as_json: bool) -> int:
    """Quantize the model, print what that did to each layer, and draw it if a folder was named; returns the exit code.

    Raises:
        ModelError: the model cannot be quantized; DoesNotFit: it needs more memory than there is.
        SettingError: a setting does not fit the model or the machine, or there is nothing to draw.
    """
    from service.loading.loader import load_model
    from service.reports.inspect import inspection_as_dict, print_inspection
    from service.reports.inspect_watch import EncodingWatch
    from service.reports.progress import shown_load

    if folder is not None:
        with _drawing("--plot", folder):
            from service.reports.inspect_plot import draw
    watch = None if folder is None else EncodingWatch()
    options = _measuring_options(settings)
    with shown_load() as progress:
        loaded = load_model(replace(options, watch=watch), progress)
    if watch is not None and not watch.layers:
        raise SettingError(
            f"--plot {folder}: no weight was encoded as {loaded.report.recipe}, so there is nothing to draw; leave "
            "--plot out, or give another recipe, or the model before it was quantized"
        )
    if as_json:
        print(json.dumps(inspection_as_dict(loaded.name, loaded.report), indent=2))
    else:
        print_inspection(loaded.name, loaded.report)
    if folder is not None and watch is not None:
        _write("--plot", folder, partial(draw, loaded.name, loaded.report, watch))
    return 0


def evaluate(evaluation: Evaluation, settings: Settings, *, as_json: bool) -> int:
    """Compare recipes on a text, print the figures, and draw them if a file was named; returns the exit code.

    Raises:
        ModelError: the model cannot be loaded; DoesNotFit: it needs more memory than there is.
        SettingError: a setting, a recipe or the text does not fit the model or the machine.
    """
    from service.api.text import encode_text
    from service.assembly import read_tokenizer
    from service.loading.source import ModelSource
    from service.reports import evaluate as report_on
    from service.reports.terminal import terminal_progress

    if evaluation.plot is not None:
        with _drawing("--plot", evaluation.plot):
            from service.reports.evaluate_plot import draw

    def read_text(source: ModelSource, text: str) -> report_on.TextIds:
        tokenizer = read_tokenizer(source.folder, source.name, trust_remote_code=settings.trust_remote_code)
        return report_on.TextIds(*encode_text(tokenizer, text))

    options = _measuring_options(settings.model_copy(update={"quantize": evaluation.recipes[0].text}))
    with terminal_progress() as on_progress:
        report = report_on.evaluate(evaluation, options, read_text, on_progress)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        report_on.print_report(report)
    if evaluation.plot is not None:
        _write("--plot", evaluation.plot, partial(draw, report))
    return 0


def bench_kernels(bench: KernelBench, settings: Settings, *, as_json: bool) -> int:
    """Measure the kernels, print the figures, and write them if a file was named; returns the exit code.

    Raises:
        SettingError: a weight does not fit into memory, or the file can no longer be written.
    """
    from service.reports.bench_kernels import measure
    from service.reports.bench_table import print_report
    from service.reports.terminal import terminal_progress

    num_threads = thread_limits().num_threads if settings.threads == "auto" else settings.threads
    with terminal_progress() as on_progress:
        report = measure(bench, num_threads=num_threads, kernel_isa=settings.kernel_isa, on_progress=on_progress)
    text = json.dumps(report.as_dict(), indent=2)
    if as_json:
        print(text)
    else:
        print_report(report)
    if bench.output is not None:  # last: minutes of measuring are not lost with it
        _write("--output", bench.output, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return 0


def bench_serve(bench: ServeBench, *, as_json: bool) -> int:
    """Measure servers, print the figures, and write and draw them if files were named; returns the exit code.

    It is 1 if a server did not answer one request in full at some load.

    Raises:
        BenchError: a server cannot be measured, or two are of different models.
        SettingError: what is asked for does not fit the models, or a file cannot be written.
    """
    from service.reports.bench_serve import measure
    from service.reports.bench_serve_table import print_report
    from service.reports.terminal import terminal_progress

    if bench.plot is not None:
        with _drawing("--plot", bench.plot):
            from service.reports.bench_serve_plot import draw
    with terminal_progress() as on_progress:
        report = measure(bench, on_progress)
    text = json.dumps(report.as_dict(), indent=2)
    if as_json:
        print(text)
    else:
        print_report(report)
    if bench.output is not None:
        _write("--output", bench.output, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if bench.plot is not None:
        _write("--plot", bench.plot, partial(draw, report))
    return 1 if report.has_failed else 0


def _measuring_options(settings: Settings) -> LoadOptions:
    """What settings say about loading, for a command that keeps nothing; torch uses their threads from here on."""
    import torch

    from service.assembly import load_options

    if settings.hf_token_file is not None:
        os.environ["HF_TOKEN"] = read_hub_token(settings.hf_token_file)
    torch.set_num_threads(thread_limits().num_threads if settings.threads == "auto" else settings.threads)
    return replace(load_options(settings), artifacts=None)


@contextmanager
def _drawing(flag: str, path: Path) -> Iterator[None]:
    """Within it, what draws is imported.

    Raises:
        SettingError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingError(
            f"{flag} {path}: {str(error.name).partition('.')[0]} is not installed, and draws it; "
            f"run: pip install -e '.[plot]', or leave {flag} out"
        ) from error


def _write(flag: str, path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that could be written when the measuring began.

    Raises:
        SettingError: it no longer can.
    """
    try:
        write(path)
    except OSError as error:
        raise SettingError(
            f"{flag} {path}: {error.strerror}; it must be a file that can be written: "
            "keep what was printed, or name another and measure again"
        ) from error
