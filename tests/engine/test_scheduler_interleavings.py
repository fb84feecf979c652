"""Any order of what can happen to a scheduler."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.engine.batch import Batch, Failure, Outcome
from service.engine.sequence import FinishReason, SamplingParams, Sequence
from tests.engine.scheduling import (
    BLOCK_SIZE,
    ERROR,
    NONFINITE,
    ONE,
    STOP,
    STOP_TOKEN,
    TWO,
    make_scheduler,
    outcomes_of,
)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submit, abort, schedule and commit, with few blocks and prompts that often begin alike.

    The oracle is what each slot of the blocks stores: salt and tokens up to there, and whether the
    sequence that wrote it has gone wrong. What a sequence counts as computed must always be its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=8, max_num_seqs=3, max_num_batched_tokens=5, prefix_cache=True)
        self.slots: dict[int, tuple[str, tuple[int, ...], bool]] = {}
        self.bad: set[str] = set()
        self.sequences: dict[str, Sequence] = {}
        self.ended: dict[str, FinishReason] = {}
        self.started: list[str] = []
        self.batch: Batch | None = None
        self.now = 0.0

    @rule(
        num_prompt_tokens=st.integers(1, 16),
        max_tokens=st.integers(1, 16),
        last=st.sampled_from([1, 1, 2]),
        salt=st.sampled_from(["", "", "key"]),
        is_bad=st.sampled_from([False, False, False, True]),
    )
    def submit(self, num_prompt_tokens: int, max_tokens: int, last: int, *, salt: str, is_bad: bool) -> None:
        name = str(len(self.sequences))
        sequence = Sequence(
            request_id=name,
            token_ids=[1] * (num_prompt_tokens - 1) + [last],
            num_prompt_tokens=num_prompt_tokens,
            params=SamplingParams(max_tokens=max_tokens, stop_token_ids=frozenset({STOP_TOKEN})),
            submitted_at=float(name),
            cache_salt=salt,
        )
        self.sequences[name] = sequence
        if is_bad:
            self.bad.add(name)
        self.scheduler.add(sequence)

    @rule(number=st.integers(0, 60), reason=st.sampled_from([FinishReason.ABORT, FinishReason.TIMEOUT]))
    def abort(self, number: int, reason: FinishReason) -> None:
        self.scheduler.abort(str(number), reason, self.now)

    @precondition(lambda self: self.batch is None)
    @rule()
    def schedule(self) -> None:
        self.now += 1
        self.batch = self.scheduler.schedule(self.now)
        if self.batch is None:
            return
        assert 1 <= sum(work.count for work in self.batch.works) <= 5
        for work in self.batch.works:
            sequence = work.sequence
            last_slot = work.position + work.count - 1
            assert work.position == sequence.num_computed
            assert last_slot // BLOCK_SIZE < len(sequence.block_table), "a token has no block"
            if sequence.scheduled_at == self.now:
                self.started.append(sequence.request_id)
            for position in range(work.position, work.position + work.count):
                self.slots[self.slot(sequence, position)] = self.content(sequence, position)

    @precondition(lambda self: self.batch is not None)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        assert self.batch is not None
        choices: list[Outcome] = [ONE, TWO, STOP, ERROR]
        outcomes: dict[str, Outcome] = {}
        for work in self.batch.works:
            is_bad = work.sequence.request_id in self.bad
            outcome = NONFINITE if is_bad else data.draw(st.sampled_from(choices))
            if is_bad and not work.samples:
                continue
            if work.samples or isinstance(outcome, Failure):
                outcomes[work.sequence.request_id] = outcome
        self.scheduler.commit(self.batch, outcomes, self.now)
        self.batch = None

    @rule()
    def take_events(self) -> None:
        for event in self.scheduler.take_events():
            assert event.request_id not in self.ended, "an event after the terminal one"
            if event.finish_reason is not None:
                self.ended[event.request_id] = event.finish_reason
                assert not self.sequences[event.request_id].block_table

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def content(self, sequence: Sequence, position: int) -> tuple[str, tuple[int, ...], bool]:
        is_bad = sequence.request_id in self.bad
        return sequence.cache_salt, tuple(sequence.token_ids[: position + 1]), is_bad

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.scheduler.check_integrity()

    @invariant()
    def what_is_computed_is_stored_and_was_written_by_sound_sequences(self) -> None:
        for sequence in self.sequences.values():
            for position in range(sequence.num_computed):
                salt, token_ids, is_bad = self.slots[self.slot(sequence, position)]
                assert (salt, token_ids) == self.content(sequence, position)[:2]
                assert not is_bad or sequence.request_id in self.bad

    @invariant()
    def nobody_is_overtaken(self) -> None:
        assert self.started == sorted(self.started, key=int)

    def teardown(self) -> None:
        """Whatever happened, all accepted sequences end."""
        for _ in range(1000):
            if self.batch is not None:
                self.scheduler.commit(self.batch, outcomes_of(self.batch), self.now)
                self.batch = None
            self.take_events()
            if not self.scheduler.has_work:
                break
            self.schedule()
        assert self.ended.keys() == self.sequences.keys()
        self.scheduler.check_integrity()


TestAnyInterleaving = SchedulerMachine.TestCase
TestAnyInterleaving.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
