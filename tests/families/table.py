"""The table of model types in the documentation, from the list that the sweep checks: `--output docs/families.md`."""

from __future__ import annotations

import argparse
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.families.listed import Listed, read_list
from tests.families.sweep import NOT_BUILT, REFUSED, WHOLE_PROMPTS

_MEANINGS = {
    "packed": "the tokens of all sequences lie in one row for each step; the fastest",
    "per-request": "a cache and a forward for each sequence; prompts in pieces",
    WHOLE_PROMPTS: "the same, and each prompt in one piece",
    "single": "one sequence at a time, because the model keeps a state of its own",
    REFUSED: "the start fails with a message that says why",
    NOT_BUILT: "transformers makes no tiny model of this type to try",
}


def table(rows: dict[str, Listed]) -> str:
    """The whole document."""
    release = ".".join(version("transformers").split(".")[:2])
    counts = Counter(row.result for row in rows.values())
    lines = [
        "# Model types",
        "",
        f"What becomes of each of the {len(rows)} causal language model types of transformers {release}. A tiny model",
        "of random float32 weights is saved, loaded and asked for greedy text, with prompts of several lengths at once",
        "and in pieces. Unquantized it must give the tokens of transformers; as `w8a16`, with at least 90 % of its",
        "weights quantized, those of the model with the decoded weights. BERT and its kin are made as decoders",
        "(`is_decoder`) and XLM as `causal`: an encoder continues no text and is refused. Of checkpoints with several",
        "parts, such as an image encoder, the text part is served.",
        "",
        "A model of yours goes the way of its type unless its layers differ in kind from those of the tiny one: which",
        "way is right is found out at each start, by comparing it with the model's own forward.",
        "",
        "`pytest -m nightly tests/families` tries all of them, and `python -m tests.families.table --output",
        "docs/families.md` writes this file from the list that they are held to.",
        "",
        "| computed | types | |",
        "|---|---|---|",
        *(f"| {result} | {counts[result]} | {meaning} |" for result, meaning in _MEANINGS.items()),
        "",
        "| type | computed | `w8a16` | why not packed, or not served |",
        "|---|---|---|---|",
        *(_line(model_type, row) for model_type, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def _line(model_type: str, row: Listed) -> str:
    is_served = row.result not in (REFUSED, NOT_BUILT)
    quantized = ("no: its experts have a layout of their own" if row.unquantized_only else "yes") if is_served else ""
    return f"| `{model_type}` | {row.result} | {quantized} | {row.reason} |"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.parse_args().output.write_text(table(read_list()), encoding="utf-8")


if __name__ == "__main__":
    main()
