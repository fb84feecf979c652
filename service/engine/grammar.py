"""Which tokens a grammar allows next, worked out for all sequences of a step on other threads beside the forward."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from service.engine.batch import Failure
from service.engine.messages import public_text
from service.engine.sequence import FinishReason, Sequence
from service.errors import GrammarError

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
"""One goes on when a sequence keeps the other busy; a mask takes 0.1 ms, and torch wants the other cores."""
_WAIT_LIMIT_S = 5.0
"""A step waits so long for its masks: many times what the limits of one mask allow, for a machine with other work."""
_FREE_S = 0.5
_FREE_S_PER_TOKEN = 0.01
"""Processor time of a sequence's masks: first ones may take 0.1 s, the mean of ordinary grammars is 0.1 ms. What
takes more ends, so that no request holds up the steps of others for much longer than `_FREE_S` in all."""


class Matcher(Protocol):
    """A grammar and how far a text has come in it. Used by one thread at a time."""

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""

    def advance(self, token_ids: Seq[int]) -> None:
        """Read the next tokens of the text; raises GrammarError if they do not follow the grammar."""

    def mask(self) -> bytes:
        """A byte for each token of the vocabulary, 0 where it may not come next.

        Raises:
            GrammarError: to work it out takes too much.
        """


Compile = Callable[[str], Matcher]
"""Makes a matcher at the begin of a text; called from any thread. It raises GrammarError."""


@dataclass(slots=True, eq=False)
class _State:
    """A sequence's matcher, made when it is first needed, and how many of its tokens that has read."""

    num_read: int
    matcher: Matcher | None = None
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Task:
    """A row of the step that is under way."""

    sequence: Sequence
    state: _State
    result: bytearray | int | Failure | None = None


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What the grammars of a step say, by row.

    Attributes:
        masks: a byte for each token, 0 where it may not come next; the ends of a text only where it may end.
        ends: the token that ends a text that is complete.
        failures: of sequences that cannot go on.
    """

    masks: dict[int, bytearray]
    ends: dict[int, int]
    failures: dict[int, Failure]


class Grammars:
    """The matchers of sequences. All but `prepare` is called on the engine thread.

    A matcher follows the token ids of its sequence, so that one that is computed again, or anew after it
    was sent back, needs nothing more.

    Args:
        compile_grammar: None if no sequence has a grammar.
        max_prepared: matchers that wait for their sequences at most; what is dropped is compiled once more.
    """

    def __init__(self, compile_grammar: Compile | None = None, *, max_prepared: int = 64) -> None:
        self._compile = compile_grammar
        self._max_prepared = max_prepared
        self._prepared: OrderedDict[str, Matcher] = OrderedDict()
        self._lock = threading.Lock()  # guards `_prepared`
        self._states: dict[str, _State] = {}
        self._tasks: list[_Task] = []
        self._queue: deque[_Task] = deque()  # of the tasks, those that no thread has taken
        self._futures: list[Future[None]] = []
        self._pool: ThreadPoolExecutor | None = None

    def prepare(self, request_id: str, grammar: str) -> None:
        """Compile a sequence's grammar before it comes, on the calling thread, which may be any.

        Raises:
            GrammarError: it cannot be compiled.
        """
        assert self._compile is not None
        matcher = self._compile(grammar)
        with self._lock:
            self._prepared[request_id] = matcher
            if len(self._prepared) > self._max_prepared:
                self._prepared.popitem(last=False)

    def begin(self, sequences: Seq[Sequence]) -> None:
        """Start working out what may come next in those of the sequences that have a grammar."""
        self._settle()
        self._tasks = [self._new_task(sequence) for sequence in sequences if sequence.params.grammar is not None]
        if not self._tasks:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")
        queue = self._queue = deque(self._tasks)
        num_threads = min(_NUM_THREADS, len(self._tasks))
        self._futures = [self._pool.submit(self._work, queue) for _ in range(num_threads)]

    def take(self, sequences: Seq[Sequence]) -> Verdicts:
        """What `begin` has found for the same sequences, or the same without a `begin` before it."""
        verdicts = Verdicts({}, {}, {})
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.grammar is not None]
        if not rows:
            return verdicts
        if [task.sequence for task in self._tasks] != [sequences[row] for row in rows]:
            self.begin(sequences)
        self._settle()
        for row, task in zip(rows, self._tasks, strict=True):
            match task.result:
                case bytearray() as mask:
                    verdicts.masks[row] = mask
                case int(token_id):
                    verdicts.ends[row] = token_id
                case Failure() as failure:
                    verdicts.failures[row] = failure
        self._tasks = []
        return verdicts

    def forget(self, request_id: str) -> None:
        """Drop the matcher of a sequence that has ended."""
        self._states.pop(request_id, None)
        with self._lock:
            self._prepared.pop(request_id, None)

    def close(self) -> None:
        """End the threads when they have done what they do."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _settle(self) -> None:
        """Wait for what was begun; what is not done in time fails, and other threads take over."""
        if wait(self._futures, _WAIT_LIMIT_S).not_done:
            self._queue.clear()
            self.close()
            text = f"the grammar had no mask within {_WAIT_LIMIT_S:g} s; simplify it, or retry when fewer requests run"
            late = Failure(FinishReason.ERROR, text)
            # The thread that has not come back may set its own task's result, which nobody reads any more.
            self._tasks = [
                task if task.result is not None else _Task(task.sequence, task.state, late) for task in self._tasks
            ]
        self._futures = []

    def _work(self, queue: deque[_Task]) -> None:
        while queue:
            try:
                task = queue.popleft()
            except IndexError:  # another thread took the last one
                return
            task.result = self._judge(task.sequence, task.state)

    def _judge(self, sequence: Sequence, state: _State) -> bytearray | int | Failure:
        started = time.thread_time()
        try:
            matcher = state.matcher = state.matcher or self._new_matcher(sequence)
            matcher.advance(sequence.token_ids[state.num_read :])
            state.num_read = len(sequence.token_ids)
            found = _allowed(matcher, sequence)
        except GrammarError as error:
            return Failure(FinishReason.ERROR, str(error))
        except Exception as error:
            logger.exception("the grammar of %s failed", sequence.request_id)
            return Failure(FinishReason.ERROR, public_text(error))
        state.seconds += time.thread_time() - started
        if state.seconds > _FREE_S + _FREE_S_PER_TOKEN * sequence.num_generated:
            text = f"the grammar took {state.seconds:.2f} s for {sequence.num_generated + 1} tokens; simplify it"
            return Failure(FinishReason.ERROR, text)
        return found

    def _new_task(self, sequence: Sequence) -> _Task:
        # Here, and not where it is worked on: a thread that comes late must not bring back what was forgotten.
        state = self._states.setdefault(sequence.request_id, _State(sequence.num_prompt_tokens))
        return _Task(sequence, state)

    def _new_matcher(self, sequence: Sequence) -> Matcher:
        with self._lock:
            matcher = self._prepared.pop(sequence.request_id, None)
        if matcher is None:
            grammar = sequence.params.grammar
            assert self._compile is not None
            assert grammar is not None
            matcher = self._compile(grammar)
        return matcher


def _allowed(matcher: Matcher, sequence: Sequence) -> bytearray | int:
    """The mask of a sequence's next token, or the token that ends it if only its end may follow."""
    mask = bytearray(matcher.mask())
    ends = [token_id for token_id in sequence.params.stop_token_ids if token_id < len(mask)]
    for token_id in ends:
        mask[token_id] = 0
    has_more = mask != bytes(len(mask))
    if matcher.is_accepting and ends:
        if not has_more:
            return min(ends)
        for token_id in ends:
            mask[token_id] = 1
    elif not has_more:
        raise GrammarError("no token of the vocabulary can follow in the grammar; change it, or send fewer stop tokens")
    return mask
