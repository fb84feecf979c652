"""Holds figures of the engine's benchmarks against what the engine is to reach.

    python -m tests.benchmarks.check_engine FILE.json ...

Takes what `bench_engine`, `bench_scheduling`, `bench_sampler`, `bench_kv_cache` and `bench_processes` have written, in
any order. Prints every requirement with the worst figure that was measured for it, and what misses it; ends with 1 if
any does or was not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.check_kernels import Figure, Requirement, conclude

MAX_BOOKKEEPING_MS = {16: 0.3, 128: 1.0}
"""By the sequences of a decode step."""
RECIPE, MIN_BATCH_SPEEDUP = "w8a16", 5.0
"""Tokens per second of 16 sequences against one."""
MAX_QUIET_MEDIANS = 1.5
"""Of a stream's intervals beside a long prompt, on top of the step budget."""
MAX_FIRST_TOKEN_RATIO = 2.0
MIN_PREFIX_SPEEDUP = 5.0
MAX_KV_BYTES_RATIO, MIN_KV_BLOCKS_RATIO, MAX_KL_NATS = 0.53, 1.85, 0.002
MAX_SAMPLER_MS = 4.0
MAX_PROCESS_RATIO = 1.05

Result = Mapping[str, Any]


def check(results: Iterable[Result]) -> list[Requirement]:
    """All requirements, each with the figures that some of the results have for it."""
    found: dict[str, Any] = {}
    for result in results:
        found |= {_key(name, value): value for name, value in result.items()}
    return [
        *_bookkeeping(found.get("bookkeeping", [])),
        Requirement(
            f"{RECIPE}, 16 sequences: {MIN_BATCH_SPEEDUP:g}x the tokens/s of one", list(_batch(found.get("steps", [])))
        ),
        *_fairness(found.get("fairness")),
        Requirement(
            f"a repeated prefix: first token {MIN_PREFIX_SPEEDUP:g}x sooner",
            [
                _least(f"{part['prefix_tokens']} tokens", part["speedup"], MIN_PREFIX_SPEEDUP, "{:.1f}x")
                for part in _present(found.get("prefix"))
            ],
        ),
        *_kv_cache(found),
        Requirement(
            f"sampler, 16 rows of 49,152: {MAX_SAMPLER_MS:g} ms",
            [
                _most(row["case"], row["median_ms"], MAX_SAMPLER_MS, "{:.2f} ms")
                for row in found.get("sampling", [])
                if row["path"] == "sampler"
            ],
        ),
        Requirement(
            f"two processes: at most {MAX_PROCESS_RATIO} of the speed of one",
            [
                _most(model["model"], model["speed_ratio"], MAX_PROCESS_RATIO, "{:.2f}")
                for model in found.get("processes", [])
            ],
        ),
    ]


def _key(name: str, value: Any) -> str:
    """Rows and models have one name in several files; what is in them tells of what they are."""
    if name == "rows":
        return "sampling" if "case" in value[0] else "steps"
    if name == "models":
        return "kv_models" if isinstance(value, dict) else "processes"
    return name


def _bookkeeping(rows: Iterable[Result]) -> Iterator[Requirement]:
    for num_sequences, most in MAX_BOOKKEEPING_MS.items():
        figures = [
            _most("decode step", row["median_ms"], most, "{:.3f} ms")
            for row in rows
            if row["sequences"] == num_sequences
        ]
        yield Requirement(f"outside the forward, {num_sequences} sequences: {most:g} ms", figures)


def _batch(rows: Iterable[Result]) -> Iterator[Figure]:
    speeds = {
        row["num_sequences"]: row["tokens_per_s"] for row in rows if (row["path"], row["scheme"]) == ("engine", RECIPE)
    }
    if {1, 16} <= speeds.keys():
        yield _least("135 M", speeds[16] / speeds[1], MIN_BATCH_SPEEDUP, "{:.1f}x")


def _fairness(part: Result | None) -> Iterator[Requirement]:
    subjects = [(f"beside {found['prompt_tokens']} tokens", found) for found in _present(part)]
    yield Requirement(
        f"inter-token p99 beside a prompt: budget + {MAX_QUIET_MEDIANS} medians",
        [
            _most(
                subject,
                found["inter_token_ms"]["p99"],
                found["step_budget_ms"] + MAX_QUIET_MEDIANS * found["quiet_median_ms"],
                "{:.0f} of {:.0f} ms",
            )
            for subject, found in subjects
        ],
    )
    yield Requirement(
        f"first token of that prompt: {MAX_FIRST_TOKEN_RATIO:g}x its time alone",
        [_most(subject, found["first_token_ratio"], MAX_FIRST_TOKEN_RATIO, "{:.2f}x") for subject, found in subjects],
    )


def _kv_cache(found: Mapping[str, Any]) -> Iterator[Requirement]:
    ratios = {name: model["ratios"] for name, model in found.get("kv_models", {}).items()}
    yield Requirement(
        f"int8 KV: {MAX_KV_BYTES_RATIO} of the bytes per token",
        [_most(name, part["bytes per token"], MAX_KV_BYTES_RATIO, "{:.3f}") for name, part in ratios.items()],
    )
    yield Requirement(
        f"int8 KV: {MIN_KV_BLOCKS_RATIO}x the blocks",
        [_least(name, part["blocks"], MIN_KV_BLOCKS_RATIO, "{:.2f}x") for name, part in ratios.items()],
    )
    yield Requirement(
        f"int8 KV: mean KL {MAX_KL_NATS} nats on the demo model",
        [_most(name, part["mean"], MAX_KL_NATS, "{:.5f}") for name, part in found.get("kl_nats", {}).items()],
    )


def _present(part: Result | None) -> list[Result]:
    return [] if part is None else [part]


def _most(subject: str, measured: float, most: float, form: str) -> Figure:
    return Figure(subject, form.format(measured, most), most / measured)


def _least(subject: str, measured: float, least: float, form: str) -> Figure:
    return Figure(subject, form.format(measured), measured / least)


def main() -> int:
    """Print all requirements; 1 if one is missed or was not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON of the engine's benchmarks")
    return conclude(check(json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().files))


if __name__ == "__main__":
    raise SystemExit(main())
