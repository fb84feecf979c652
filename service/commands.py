"""The commands that measure and tell, and end. What they need is imported when one runs: `serve` starts without it."""

from __future__ import annotations

import json
from collections.abc import Sequence

from service.errors import SettingError
from service.reports.bench_options import KernelBench
from service.reports.machine import thread_limits
from service.settings import Settings


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


def bench_kernels(bench: KernelBench, settings: Settings, *, as_json: bool) -> int:
    """Measure the kernels, print the figures, and write them if a file was named; returns the exit code.

    Raises:
        SettingError: a weight does not fit into memory, or the file can no longer be written.
    """
    from service.reports.bench_kernels import measure
    from service.reports.bench_table import print_report, terminal_progress

    num_threads = thread_limits().num_threads if settings.threads == "auto" else settings.threads
    with terminal_progress() as on_progress:
        report = measure(bench, num_threads=num_threads, kernel_isa=settings.kernel_isa, on_progress=on_progress)
    text = json.dumps(report.as_dict(), indent=2)
    if as_json:
        print(text)
    else:
        print_report(report)
    if bench.output is not None:  # last: minutes of measuring are not lost with it
        try:
            bench.output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SettingError(
                f"--output {bench.output}: {error.strerror}; it must be a file that can be written: "
                "keep what was printed, or name another and measure again"
            ) from error
    return 0
