"""Holds figures of `tests.benchmarks.bench_model` against what whole models are to reach.

    python -m tests.benchmarks.check_model FILE.json

Prints every requirement with the worst figure that was measured for it, and what misses it; ends with 1 if any does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.check_kernels import Figure, Requirement, conclude

SHAPES = ("smollm2-135m", "tinyllama-1.1b")
RECIPES = ("w8a16", "w4a16-g64")
MIN_W8_SPEEDUP, MIN_W4_SPEEDUP = 1.7, 2.2
"""Of the decode of one sequence; that of 4 bit is asked of 1.1 B parameters only."""
LARGE_SHAPE = "tinyllama-1.1b"
NEVER_SLOWER = {"prefill_512": "prefill of 512 tokens", "decode_16": "decode of 16 sequences"}


def check(result: Mapping[str, Any]) -> list[Requirement]:
    """All requirements, each with its figures."""
    found = {
        (shape["shape"], row["recipe"]): row["speedup"]
        for shape in result["shapes"]
        for row in shape["rows"]
        if row["recipe"] in RECIPES
    }
    wanted = [("w8a16", SHAPES, MIN_W8_SPEEDUP), ("w4a16-g64", (LARGE_SHAPE,), MIN_W4_SPEEDUP)]
    requirements = [
        Requirement(
            f"{recipe}, decode of 1 sequence: {least}x",
            list(_figures(found, "decode_1", [(shape, recipe) for shape in shapes], least)),
        )
        for recipe, shapes, least in wanted
    ]
    everything = [(shape, recipe) for shape in SHAPES for recipe in RECIPES]
    for key, name in NEVER_SLOWER.items():
        requirements.append(Requirement(f"{name}: never slower", list(_figures(found, key, everything, 1.0))))
    return requirements


def _figures(
    found: Mapping[tuple[str, str], Mapping[str, float]], key: str, wanted: Iterable[tuple[str, str]], least: float
) -> Iterator[Figure]:
    """A figure for each wanted shape and recipe; one that was not measured misses."""
    for shape, recipe in wanted:
        speedup = found.get((shape, recipe), {}).get(key)
        text = "not measured" if speedup is None else f"{speedup:.2f}x"
        yield Figure(f"{recipe} {shape}", text, (speedup or 0) / least)


def main() -> int:
    """Print all requirements; 1 if one is missed or was not measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of `tests.benchmarks.bench_model`")
    return conclude(check(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    raise SystemExit(main())
