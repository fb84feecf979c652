"""The sampler beside transformers' logits processors, 16 rows at a vocabulary of 49,152, on one thread.

    python -m tests.benchmarks.bench_sampler --output FILE.json

Both get the same logits and histories of 700 tokens; transformers' processors run row by row, as rows differ.
CPU time of the thread counts, so that others on the machine disturb little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine.sampler import Sampler
from service.engine.sequence import SamplingParams, Sequence
from tests.benchmarks.bench_engine import machine

NUM_ROWS, VOCAB_SIZE = 16, 49_152
NUM_PROMPT_TOKENS, NUM_TOKENS = 500, 700
NUM_RUNS, NUM_PEER_RUNS = 60, 5
SCALE = 3.0
"""Standard deviation of the logits: at temperature 1 the likeliest 256 tokens have six tenths of the probability."""
ALL: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": tuple((token_id, 1.0) for token_id in range(300)),
    "min_tokens": 400,
    "stop_token_ids": frozenset({1, 2}),
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "whole vocabulary": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9, "temperature": 0.5},
    "top_p 0.9 of thousands": {"top_p": 0.9},
    "min_p 0.0001": {"min_p": 0.0001},
    "all": ALL,
    "all without top_k": ALL | {"top_k": 0},
    "all with 20 logprobs": ALL | {"num_logprobs": 20},
}


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of a step's sampling."""

    case: str
    path: str
    median_ms: float
    p90_ms: float


def make_sequences(params: dict[str, Any]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sequence(
            request_id=str(row),
            token_ids=torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator).tolist(),
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            params=SamplingParams(max_tokens=NUM_TOKENS, seed=row, **params),
            submitted_at=0,
        )
        for row in range(NUM_ROWS)
    ]


def processors() -> LogitsProcessorList:
    """What transformers has of `ALL`: not the penalties by count."""
    biases: Any = {(token_id,): bias for token_id, bias in ALL["logit_bias"]}
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(ALL["repetition_penalty"]),
            SequenceBiasLogitsProcessor(biases),
            MinNewTokensLengthLogitsProcessor(NUM_PROMPT_TOKENS, ALL["min_tokens"], [1, 2]),
            TemperatureLogitsWarper(ALL["temperature"]),
            TopKLogitsWarper(ALL["top_k"]),
            TopPLogitsWarper(ALL["top_p"]),
            MinPLogitsWarper(ALL["min_p"]),
        ]
    )


def timed(run: Callable[[Tensor], None], logits: Tensor, num_runs: int) -> list[float]:
    """Milliseconds of each run but a first one."""
    times = []
    for _ in range(num_runs + 1):
        fresh = logits.clone()
        started_at = time.thread_time()
        run(fresh)
        times.append(1e3 * (time.thread_time() - started_at))
    return times[1:]


def row_of(case: str, path: str, times: list[float]) -> Row:
    return Row(case, path, statistics.median(times), statistics.quantiles(times, n=10)[-1])


@torch.inference_mode()
def measure() -> list[Row]:
    """All cases, then transformers' processors with the parameters of `ALL`."""
    logits = SCALE * torch.randn((NUM_ROWS, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    rows = []
    for case, params in CASES.items():
        sampler, sequences = Sampler(), make_sequences(params)

        def step(fresh: Tensor, sampler: Sampler = sampler, sequences: list[Sequence] = sequences) -> None:
            for sequence, token in zip(sequences, sampler.sample(fresh, sequences), strict=True):
                assert token is not None
                sequence.token_ids.append(token.token_id)

        rows.append(row_of(case, "sampler", timed(step, logits, NUM_RUNS)))
    chain, histories = processors(), [torch.tensor([sequence.token_ids]) for sequence in make_sequences(ALL)]

    def peer(fresh: Tensor) -> None:
        for row, ids in enumerate(histories):
            scores: Tensor = chain(ids, fresh[row : row + 1])  # type: ignore[arg-type]
            scores.softmax(-1).multinomial(1)

    rows.append(row_of("all", "transformers", timed(peer, logits, NUM_PEER_RUNS)))
    return rows


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "rows": [asdict(row) for row in measure()]}
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
