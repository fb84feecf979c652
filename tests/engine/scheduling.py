"""A scheduler with small blocks, and steps without a model, for tests."""

from __future__ import annotations

from service.engine.allocator import BlockAllocator
from service.engine.batch import Batch, Failure, Outcome, Token
from service.engine.block_manager import BlockManager
from service.engine.pacing import StepPacer
from service.engine.scheduler import Scheduler
from service.engine.sequence import FinishReason, SamplingParams, Sequence

BLOCK_SIZE = 4
STOP_TOKEN = 9
ONE, TWO, STOP = Token(1), Token(2), Token(STOP_TOKEN)
ERROR = Failure(FinishReason.ERROR, "ValueError: no")
NONFINITE = Failure(FinishReason.NONFINITE, "NaN")


def make_scheduler(
    num_blocks: int = 16,
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 8,
    chunked: bool = True,
    chunk_length: int = 1,
    prefix_cache: bool = False,
    pacer: StepPacer | None = None,
) -> Scheduler:
    return Scheduler(
        BlockManager(BlockAllocator(num_blocks), block_size=BLOCK_SIZE, prefix_cache=prefix_cache),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunked=chunked,
        chunk_length=chunk_length,
        pacer=pacer,
    )


def make_sequence(request_id: str, num_prompt_tokens: int = 3, max_tokens: int = 2) -> Sequence:
    return Sequence(
        request_id=request_id,
        token_ids=[1] * num_prompt_tokens,
        num_prompt_tokens=num_prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP_TOKEN})),
        submitted_at=0.0,
    )


def shares(batch: Batch | None) -> list[tuple[str, int, int]]:
    assert batch is not None
    return [(work.sequence.request_id, work.position, work.count) for work in batch.works]


def outcomes_of(batch: Batch, token: Outcome = ONE) -> dict[str, Outcome]:
    return {work.sequence.request_id: token for work in batch.works if work.samples}


def step(scheduler: Scheduler, token: Outcome = ONE, now: float = 1.0) -> list[tuple[str, int, int]]:
    batch = scheduler.schedule(now)
    assert batch is not None
    scheduler.commit(batch, outcomes_of(batch, token), now)
    scheduler.check_integrity()
    return shares(batch)
