"""The commands that measure and tell, and end. What they need is imported when one runs: `serve` starts without it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from service.errors import SettingError
from service.reports.bench_options import KernelBench
from service.reports.bench_serve_options import ServeBench
from service.reports.machine import thread_limits
from service.settings import Settings, read_hub_token


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
    from service.reports.bench_serve import ServeReport, measure
    from service.reports.bench_serve_table import print_report
    from service.reports.terminal import terminal_progress

    draw: Callable[[ServeReport, Path], None] | None = None
    if bench.plot is not None:
        try:
            from service.reports.bench_serve_plot import draw
        except ModuleNotFoundError as error:
            raise SettingError(
                f"--plot {bench.plot}: {str(error.name).partition('.')[0]} is not installed, and draws it; "
                "run: pip install -e '.[plot]', or leave --plot out"
            ) from error
    with terminal_progress() as on_progress:
        report = measure(bench, on_progress)
    text = json.dumps(report.as_dict(), indent=2)
    if as_json:
        print(text)
    else:
        print_report(report)
    if bench.output is not None:
        _write("--output", bench.output, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    if bench.plot is not None and draw is not None:
        _write("--plot", bench.plot, partial(draw, report))
    return 1 if report.has_failed else 0


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
