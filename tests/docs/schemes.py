"""The table of schemes in the documentation, from the code and from measurements: `--output docs/schemes.md`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from service.kernels.native import takes
from service.numerics.recipe import num_layers, parse_recipe, resolve
from service.numerics.schemes import QuantScheme, parse_scheme
from service.numerics.storage import storage_shapes
from tests.floors import ROOT

RESULTS = ROOT / "tests" / "benchmarks" / "results" / "evaluate_2026-11-22.json"
"""What `pennyweight evaluate --json` found; the command stands in the document."""
SIDE = 4096
"""Of the weight whose bits are counted."""
NUM_LAYERS = 32
MIXED_LAYERS = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    **{f"mlp.{name}_proj": (11008, 4096) for name in ("gate", "up")},
    "mlp.down_proj": (4096, 11008),
}
"""Weights (out, in) of each layer of Llama 2 7B."""


class Row(NamedTuple):
    """A scheme in the table.

    Attributes:
        published: loss of perplexity that others measured on a large model, and who.
        use: when to take it.
    """

    scheme: str
    published: str
    use: str


ROWS = (
    Row("none", "", "the reference; where memory is no concern"),
    Row("w8a16", "+0.014, Llama 3.1 8B [1]", "the default: half of the memory of 16 bit, next to no loss"),
    Row("w8a16-asym", "", "rows whose weights all lie on one side of zero"),
    Row("w8a16-g64", "", "8 bits where a few weights of a row are much larger than others"),
    Row("absmax", "", "one scale for a whole weight, to compare with textbooks; `w8a16` costs no more and loses less"),
    Row("zeropoint", "", "the same with a zero point"),
    Row("fp8", "+0.09 with 8-bit activations, Llama 3.1 8B [1]", "weights whose sizes differ by orders of magnitude"),
    Row("q8_0", "+0.003, Llama 3 8B [2]", "closest to 16 bit; the codes of GGUF files"),
    Row("w6a16-g64", "", "between 8 and 4 bits"),
    Row("q6_k", "+0.022, Llama 3 8B [2]", "between 8 and 4 bits, the best for its size; rows of multiples of 256"),
    Row("w5a16-g64", "", "between 8 and 4 bits"),
    Row("q5_k", "", "better than `w5a16` for its size"),
    Row("q5_k_m", "+0.057, Llama 3 8B [2]", "5 bits, with 6 for the layers that matter most"),
    Row("q5_0", "", "rows that are no multiple of 256, where `q4_k` falls back to it"),
    Row("q5_1", "", "the same, where `q5_k` does"),
    Row("w4a16-g32", "", "4 bits with small groups"),
    Row("w4a16-g64", "", "plain 4 bits, quick to encode"),
    Row("w4a16-g64-float", "", "zero points that need not be whole: a little better, a little larger"),
    Row("w4a16-g64+mse", "", "the best plain 4.5 bits: scales and offsets fitted by least squares"),
    Row("w4a16-g64+hqq", "", "fitted by HQQ's solver, for weights with outliers"),
    Row("w4a16-g128", "+0.26, Llama 2 7B [3]", "4 bits and as few more as is sensible"),
    Row("w4a16-g128-sym", "", "no zero points, and the fewest bits of the plain 4-bit schemes with groups"),
    Row(
        "w4a16-row", "+1.7, Llama 2 7B [4]", "for comparisons only: one scale for a whole row is too coarse for 4 bits"
    ),
    Row("nf4", "", "what bitsandbytes' QLoRA uses, code for code"),
    Row("nf4-dq", "", "the same with scales that are quantized too"),
    Row("fp4", "", "for comparisons: the largest error of the 4-bit formats with groups of 64"),
    Row("q4_0", "+0.47, Llama 3 8B [2]", "the codes of GGUF files"),
    Row("q4_1", "", "the same with offsets"),
    Row("q4_k", "", "the best 4.5 bits that need no data"),
    Row("q4_k_m", "+0.18, Llama 3 8B [2]", "4 bits where quality comes first: 6 for the layers that matter most"),
    Row("w3a16-g64", "+1.19 in groups of 128, Llama 2 7B [3]", "where 4 bits do not fit, with `+mse`"),
    Row("w3a16-g64+mse", "", "the best plain 3 bits"),
    Row("w3a16-g64+hqq", "", "3 bits, weights with outliers"),
    Row("w2a16-g64", "diverges, Llama 2 7B [5]", "for comparisons only"),
    Row("w2a16-g32", "", "for comparisons only"),
    Row("w2a16-g16+mse", "", "the least loss at 2 bits, for the bits of 4; experimental"),
    Row("w2a16-g64+hqq", "", "experimental"),
)

_SOURCES = (
    "torchao's README, WikiText-2, word perplexity",
    "llama.cpp, `tools/quantize`, WikiText-2",
    "Lin et al., AWQ, table 4, WikiText-2",
    "SpinQuant's README, WikiText-2",
    "Tseng et al., QuIP#, and Egiazarian et al., AQLM: round to nearest, 2 bits",
)

_NOTES = (
    "`wBa16` takes B = 2, 3, 4, 5, 6, 8; `-row`, `-tensor` or `-gN` with N a power of two in 16..1024; `-sym`,",
    "`-asym` or `-float`; and `+rtn` (round to nearest, the default), `+mse` or `+hqq`. The table has those that",
    "differ in kind. `mse` looks for the least squared error and `hqq` for a small sum of |error|^0.7; both have",
    "float offsets, unless `-sym` or `-asym` says otherwise, which `hqq` does not take. Named formats have a fit of",
    "their own.",
    "",
    "`q4_k_m` and `q5_k_m` give `q6_k` to the projections to values and back from the inner width of the feed-forward",
    "part, in the first and the last eighth of the layers and every third one between them. Rows that are no",
    "multiple of 256 weights fall back from `q4_k` to `q5_0`, from `q5_k` to `q5_1` and from `q6_k` to `q8_0`; the",
    "report says so.",
    "",
    "Schemes with float16 scales, those with a `q`, refuse weights that these cannot hold, from 65,504 on at the",
    "earliest, and make zeros of weights whose scales would be below 6e-8. `nf4-dq` and one scale per tensor look at a",
    "whole weight before they store any of it: a load needs memory for the largest one.",
)


def table() -> str:
    """The whole document."""
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = {row["recipe"]: row for row in report["rows"]}
    recipes = ";".join(row.scheme for row in ROWS if row.scheme != "none")
    lines = [
        "# Schemes",
        "",
        "What a weight can be stored as, what that takes, and what it costs. Every scheme is one for a recipe",
        "(`--quantize`), alone or for some modules; see the README.",
        "",
        f"- bits: of all buffers of a weight of {SIDE} x {SIDE}, for each of its numbers; `_m` of the linear weights",
        "  of Llama 2 7B. Output heads and tied embeddings are `w8a16` whatever the recipe, so that a whole model has",
        "  some more.",
        "- speed: on a CPU `native` schemes are multiplied by the native kernels; others are decoded by torch for each",
        "  product, which is many times slower. All are right everywhere.",
        "- published: how much higher the perplexity of a large model is, as others found; their quantizers are like",
        "  these, not the same.",
        f"- KL, top-1, loss: of the demo model on {report['num_tokens']} tokens of a novel that it has not seen,",
        "  against the unquantized one: mean divergence in nats, how often both find the same token likeliest, and how",
        "  much higher the perplexity is. Where that is below 1 %, KL tells schemes apart, and perplexity does not.",
        "",
        "| scheme | bits | speed | published | KL | top-1 | loss | take it for |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row, found) for row in ROWS),
        "",
        *(f"{number}. {source}" for number, source in enumerate(_SOURCES, 1)),
        "",
        *_NOTES,
        "",
        "`python -m tests.docs.schemes --output docs/schemes.md` writes this file; the figures of the demo model are",
        "",
        f"    pennyweight evaluate --windows {report['num_windows']} --text NOVEL --json --quantize \\",
        f'      "{recipes}"',
    ]
    return "\n".join(lines) + "\n"


def bits_per_weight(scheme: QuantScheme) -> float:
    """Of all buffers of a square weight."""
    if scheme.is_none:
        return 16.0
    shapes = storage_shapes(SIDE, SIDE, scheme)
    return 8 * (shapes.codes_bytes + shapes.scales_bytes) / SIDE**2


def mixed_bits_per_weight(scheme: QuantScheme) -> float:
    """Of the linear weights of `MIXED_LAYERS`, which get different formats."""
    names = {f"layers.{i}.{name}": size for i in range(NUM_LAYERS) for name, size in MIXED_LAYERS.items()}
    counts, bits = num_layers(names), 0.0
    for name, (out_features, in_features) in names.items():
        kind, _ = resolve(scheme, name, counts, in_features=in_features)
        shapes = storage_shapes(out_features, in_features, kind)
        bits += 8 * (shapes.codes_bytes + shapes.scales_bytes)
    return bits / sum(out_features * in_features for out_features, in_features in names.values())


def _line(row: Row, found: dict[str, Any]) -> str:
    scheme = parse_scheme(row.scheme)
    same = "" if scheme.name == row.scheme else f" = `{scheme.name}`"
    bits = f"{mixed_bits_per_weight(scheme):.3g}" if scheme.is_mixed else f"{bits_per_weight(scheme):.6g}"
    speed = "native" if scheme.is_none or (not scheme.is_mixed and takes(scheme)) else "torch"
    figures = found[parse_recipe(row.scheme).text]
    loss = figures["perplexity"] / found["none"]["perplexity"] - 1
    measured = f"{figures['kl_mean_nats']:.5f} | {figures['top1_ratio']:.1%} | {loss:+.2%}"
    return f"| `{row.scheme}`{same} | {bits} | {speed} | {row.published} | {measured} | {row.use} |"


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.parse_args().output.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
