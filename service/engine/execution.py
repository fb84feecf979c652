"""Computes a step: forward, then sampling, and what fails again in smaller parts."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import torch

from service.engine.batch import Failure, Outcome, Scores, Token, Work
from service.engine.messages import public_text
from service.engine.outcomes import read_outcomes
from service.engine.runner import ModelRunner
from service.engine.sampler import Sampler
from service.engine.sequence import FinishReason
from service.engine.stats import EngineObserver, EnginePath
from service.loading.memory import trim_heap

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""Lower case, of RuntimeErrors: by a CUDA driver, torch's CPU allocator on Linux and elsewhere, and cuBLAS."""
_GROWTH = 1.01
"""Of what memory is thought to hold, with each step after it ran out: twice as much after 70 steps."""


class StepExecutor:
    """Gives each sequence of a step its outcome, whatever happens to its neighbours. Owned by the engine thread.

    If a step raises, each of its sequences is computed alone. If it runs out of memory, what can be freed is
    freed, and it is computed in parts of half as many tokens, again and again down to single ones; the next
    steps begin with such parts. Whatever is computed twice gives the same: keys and values of a token go
    where they went before, and the sampler draws the same number for it.

    Args:
        chunk_length: if it is given, each sequence is computed and sampled in forwards of its own, a prompt
            in chunks that end at multiples of it and generated tokens one by one, so that shapes never
            depend on neighbours, or on what was computed before. A step that runs out of memory breaks this.
    """

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, observer: EngineObserver, *, chunk_length: int | None = None
    ) -> None:
        self.runner = runner
        self._sampler = sampler
        self._observer = observer
        self._chunk_length = chunk_length
        self._num_fitting: float | None = None  # tokens of one forward, since memory ran out
        self._num_refused = 0  # tokens for which it did

    def compute(self, works: Seq[Work]) -> dict[str, Outcome]:
        """Compute a step.

        Returns:
            By request id, of each work that samples or has failed.
        """
        plan = _Plan(self.runner, works, self._chunk_length)
        plan.most_tokens = None if self._num_fitting is None else int(self._num_fitting)
        outcomes: dict[str, Outcome] = {}
        while part := plan.take():
            error = self._try(part, outcomes)
            if error is None:
                continue
            if not plan.has_failed:
                self._observer.on_step_error()
            if is_out_of_memory(error):
                if not plan.num_refused:
                    _log_out_of_memory(part, error)
                    _free_memory()
                is_planned = plan.put_back_smaller(part)
            else:
                is_planned = plan.put_back_alone(part)
            if not is_planned:
                outcomes[part[0].sequence.request_id] = _failure(part[0], error)
        self._learn(plan)
        return outcomes

    def forget(self, request_id: str) -> None:
        """Drop what is kept of a sequence that has ended."""
        self._sampler.forget(request_id)
        self.runner.forget(request_id)

    def _learn(self, plan: _Plan) -> None:
        """Keep for the next steps what fits, and let it grow until it is what once did not fit."""
        if self._chunk_length is not None:
            return
        if plan.num_refused:
            self._num_refused = max(self._num_refused, plan.num_refused)
            self._num_fitting = plan.most_tokens
        elif self._num_fitting is not None:
            self._num_fitting *= _GROWTH
            if self._num_fitting >= self._num_refused:
                self._num_fitting, self._num_refused = None, 0

    def _try(self, part: Seq[Work], outcomes: dict[str, Outcome]) -> Exception | None:
        """Add outcomes, or tell the error; without its traceback, which would keep tensors alive."""
        try:
            news = self._compute_together(part)
        except Exception as error:
            if not is_out_of_memory(error):
                request_ids = [work.sequence.request_id for work in part]
                extra = {"request_id": request_ids[0]} if len(part) == 1 else None
                logger.exception("computing %s failed", ", ".join(request_ids), extra=extra)
            return error.with_traceback(None)
        for request_id, outcome in news.items():
            outcomes[request_id] = _joined(outcomes.get(request_id), outcome)
        return None

    def _compute_together(self, works: Seq[Work]) -> dict[str, Outcome]:
        self._sampler.begin([work.sequence for work in works if work.samples])
        return read_outcomes(self.runner.forward(works), works, self._sampler)


class _Plan:
    """What is left to compute of a step, and how much of it at once.

    Attributes:
        most_tokens: of one forward; None for any number.
        num_refused: the most tokens for which memory ran out; 0 if it did not.
    """

    def __init__(self, runner: ModelRunner, works: Seq[Work], chunk_length: int | None) -> None:
        self._runner = runner
        if chunk_length is not None:
            works = [piece for work in works for piece in fixed_pieces(work, chunk_length)]
        self._left = list(reversed(works))  # the next one last; those of one sequence are neighbours
        # Off the packed path a forward holds one sequence in any case: those before a fault are not computed twice.
        self._is_alone = chunk_length is not None or runner.path is not EnginePath.PACKED
        self._repeated: set[str] = set()
        self.most_tokens: int | None = None
        self.num_refused = 0
        self.has_failed = False

    def take(self) -> list[Work]:
        """The next part; empty if nothing is left."""
        part: list[Work] = []
        num_tokens = 0
        while self._left:
            work = self._left[-1]
            num_tokens += work.count
            is_full = self.most_tokens is not None and num_tokens > self.most_tokens
            if part and (is_full or self._is_alone or work.sequence is part[-1].sequence):
                break
            self._left.pop()
            if is_full and self.most_tokens is not None and self._runner.resume_position(work) is not None:
                rest = work.position + self.most_tokens
                self._left.append(Work(work.sequence, rest, work.position + work.count - rest))
                work = Work(work.sequence, work.position, self.most_tokens)
            part.append(work)
        return part

    def put_back_alone(self, part: Seq[Work]) -> bool:
        """Compute each sequence alone from now on; False if it was, so that it has failed."""
        self.has_failed = True
        if len(part) == 1:
            self._drop(part[0])
            return False
        self._is_alone = True
        self._left += reversed(part)
        return True

    def put_back_smaller(self, part: Seq[Work]) -> bool:
        """Compute half as many tokens at once from now on; False if that cannot be, also not a second time."""
        starts = [self._runner.resume_position(work) for work in part]
        num_tokens = sum(work.count for work in part)
        self.has_failed = True
        self.num_refused = max(self.num_refused, num_tokens)
        if len(part) == 1 and (num_tokens == 1 or starts[0] is None):
            request_id = part[0].sequence.request_id
            if request_id in self._repeated:
                self._drop(part[0])
                return False
            self._repeated.add(request_id)  # what was freed may suffice
        else:
            half = -(-num_tokens // 2)
            self.most_tokens = half if self.most_tokens is None else min(self.most_tokens, half)
        for work, start in zip(reversed(part), reversed(starts), strict=True):
            first = work.position if start is None else start
            self._left.append(Work(work.sequence, first, work.position + work.count - first))
        return True

    def _drop(self, work: Work) -> None:
        """Leave out what follows of a sequence that has failed."""
        while self._left and self._left[-1].sequence is work.sequence:
            self._left.pop()


def fixed_pieces(work: Work, chunk_length: int) -> Iterator[Work]:
    """Cut a work at multiples of `chunk_length` within the prompt, and behind it at each token."""
    position, stop = work.position, work.position + work.count
    num_prompt_tokens = work.sequence.num_prompt_tokens
    while position < stop:
        end = position + 1
        if position < num_prompt_tokens:
            end = min(position + chunk_length - position % chunk_length, num_prompt_tokens)
        yield Work(work.sequence, position, end - position)
        position = end


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, torch's on a CPU or a GPU, or that of a library below it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(known in text for known in _OUT_OF_MEMORY_TEXTS)


def _log_out_of_memory(works: Seq[Work], error: Exception) -> None:
    logger.warning(
        "%d tokens of %d sequences ran out of memory (%s) and are computed in parts; "
        "lower --max-num-batched-tokens, --max-num-seqs or --kv-memory",
        sum(work.count for work in works),
        len(works),
        public_text(error),
    )


def _joined(before: Outcome | None, news: Outcome) -> Outcome:
    """The outcome of a sequence after another piece of it; what pieces before it scored may be scored again."""
    if isinstance(before, Failure):
        return before
    if before is None or isinstance(before, Token) or isinstance(news, Failure):
        return news
    if isinstance(news, Token):
        return before._replace(token=news)
    num_again = max(0, before.position + len(before.prompt_logprobs) - news.position)
    return Scores(before.position, before.prompt_logprobs + news.prompt_logprobs[num_again:], news.token)


def _failure(work: Work, error: Exception) -> Failure:
    if not is_out_of_memory(error):
        return Failure(FinishReason.ERROR, public_text(error))
    text = (
        f"out of memory: there is none to compute {work.count} {'token' if work.count == 1 else 'tokens'} "
        "of this sequence, which cannot be computed in smaller parts; shorten it"
    )
    logger.error("sequence %s: %s", work.sequence.request_id, text, extra={"request_id": work.sequence.request_id})
    return Failure(FinishReason.ERROR, text)


def _free_memory() -> None:
    """Give back what nobody uses: garbage, the C heap's, and what torch keeps of a GPU's."""
    gc.collect()
    trim_heap()
    torch.cuda.empty_cache()  # does nothing where no GPU was used
