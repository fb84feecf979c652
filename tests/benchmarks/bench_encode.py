"""How long numerics takes to encode a model of 1.1 B parameters, scheme by scheme, without the native encoders.

    python -m tests.benchmarks.bench_encode --output FILE.json

Run it on an idle machine. It encodes bfloat16 matrices of the shapes of TinyLlama-1.1B, one layer after another and the
head, into new buffers; the embedding stays as it is, and counts as another head. `--share 0.1` encodes as many of the
layers and no head: `seconds` are then scaled by parameters, from `measured_s` of `measured_parameters`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.numerics.encode import encode
from service.numerics.schemes import parse_scheme
from tests.benchmarks.bench_engine import machine

LAYERS = 22
HIDDEN, INNER, KEYS, VOCABULARY = 2048, 5632, 256, 32000
LAYER_SHAPES = (
    *((HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)),
    *((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)),
)
HEAD_SHAPE = (VOCABULARY, HIDDEN)
NUM_PARAMETERS = LAYERS * sum(rows * columns for rows, columns in LAYER_SHAPES) + 2 * VOCABULARY * HIDDEN
MAX_SECONDS = {
    **dict.fromkeys(("w8a16", "w8a16-g64", "w4a16-g64", "w4a16-g128-sym"), 2.5),
    **dict.fromkeys(("w2a16", "w3a16", "w5a16", "w6a16", "w4a16-float", "w4a16-row", "absmax", "zeropoint"), 6.0),
    **dict.fromkeys(("fp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), 6.0),
    **dict.fromkeys(("nf4", "fp4", "nf4-dq"), 12.0),
    **dict.fromkeys(("w4a16+mse", "w3a16+mse", "w4a16-asym+mse"), 30.0),
    **dict.fromkeys(("q4_k", "q5_k", "q6_k"), 60.0),
    **dict.fromkeys(("w4a16+hqq", "w3a16+hqq"), 90.0),
}
"""What each may take with two threads."""


class Measured(NamedTuple):
    """Seconds of what was encoded."""

    seconds: float
    num_parameters: int


def make_matrices(shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Normal weights."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes]


def measure(scheme: str, layer: list[Tensor], head: list[Tensor], *, share: float) -> Measured:
    """Encode that share of the model; heads only with all of it."""
    parsed = parse_scheme(scheme)
    encode(layer[0], parsed)  # what is done once, such as tables, is no part of it
    matrices = layer * max(1, round(LAYERS * share)) + (2 * head if share == 1 else [])
    started = time.perf_counter()
    for matrix in matrices:
        encode(matrix, parsed)
    return Measured(time.perf_counter() - started, sum(matrix.numel() for matrix in matrices))


def share_of_one(text: str) -> float:
    """A number above 0 and up to 1."""
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return share


def row_of(scheme: str, measured: Measured) -> dict[str, Any]:
    """Figures of a scheme."""
    seconds = measured.seconds * NUM_PARAMETERS / measured.num_parameters
    return {
        "scheme": parse_scheme(scheme).name,
        "seconds": round(seconds, 3),
        "max_seconds": MAX_SECONDS.get(scheme),
        "measured_s": round(measured.seconds, 3),
        "measured_parameters": measured.num_parameters,
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--share", type=share_of_one, default=1.0, help="of the model that is encoded; the rest is scaled"
    )
    parser.add_argument("--schemes", default=";".join(MAX_SECONDS), help="semicolons between them")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    layer, head = make_matrices(LAYER_SHAPES), make_matrices((HEAD_SHAPE,) if given.share == 1 else ())
    scaled = "" if given.share == 1 else f", scaled from {given.share:g} of the layers"
    print(f"{NUM_PARAMETERS / 1e9:.2f} B parameters{scaled}; {given.threads} threads", flush=True)
    report: dict[str, Any] = {
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "num_parameters": NUM_PARAMETERS,
        "share": given.share,
        "rows": [],
    }
    for scheme in given.schemes.split(";"):
        row = row_of(scheme, measure(scheme, layer, head, share=given.share))
        report["rows"].append(row)
        is_slow = row["max_seconds"] is not None and row["seconds"] > row["max_seconds"]
        limit = "" if row["max_seconds"] is None else f" of {row['max_seconds']:g}"
        print(f"{row['scheme']:18} {row['seconds']:8.2f} s{limit}{'  TOO SLOW' if is_slow else ''}", flush=True)
    if given.output:
        given.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
