"""Grammars in the engine, with a matcher of a few lines: what is allowed, who ends when, and who fails."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from service.engine import grammar as grammar_module
from service.engine.grammar import Grammars, Matcher
from service.engine.sampler import Sampler
from service.engine.sequence import FinishReason, SamplingParams
from service.errors import GrammarError
from tests.engine.support import greedy, make_prompt, running, solo
from tests.engine.test_sampler import make_sequence
from tests.models import VOCAB_SIZE, build_model

END = 0


class OneOf:
    """Texts of two letters and any number of them: `ab:3` allows tokens 1 and 2, three of them; no number, any number.

    The letters stand for tokens from 1 on.
    """

    def __init__(self, text: str) -> None:
        letters, _, count = text.partition(":")
        self.token_ids = [ord(letter) - ord("a") + 1 for letter in letters]
        self.count = int(count) if count else None
        self.num_read = 0

    @property
    def is_accepting(self) -> bool:
        return self.count is None or self.num_read == self.count

    def advance(self, token_ids: Sequence[int]) -> None:
        if not set(token_ids) <= set(self.token_ids):
            raise GrammarError(f"{token_ids} are not in the text")
        self.num_read += len(token_ids)

    def mask(self) -> bytes:
        mask = bytearray(VOCAB_SIZE)
        if self.count is None or self.num_read < self.count:
            for token_id in self.token_ids:
                mask[token_id] = 1
        return bytes(mask)


class Failing(OneOf):
    """Raises at its third mask."""

    error: Exception = GrammarError("too many states")

    def mask(self) -> bytes:
        if self.num_read == 2:
            raise self.error
        return super().mask()


class Defective(Failing):
    error = ZeroDivisionError("a defect")


class Blocking(OneOf):
    """Waits at its third mask."""

    opened = threading.Event()

    def mask(self) -> bytes:
        if self.num_read == 2:
            self.opened.wait(60)
        return super().mask()


def compile_grammar(text: str) -> Matcher:
    kind, _, rest = text.rpartition(" ")
    kinds: dict[str, Callable[[str], Matcher]] = {
        "failing": Failing,
        "defective": Defective,
        "blocking": Blocking,
        "": OneOf,
    }
    return kinds[kind](rest)


def params(grammar: str, max_tokens: int = 9, **fields: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"temperature": 2.0, "seed": 1, "stop_token_ids": frozenset({END})}
    return SamplingParams(max_tokens=max_tokens, grammar=grammar, **defaults | fields)


def test_a_text_follows_its_grammar_and_ends_with_it() -> None:
    model = build_model("llama")
    with running(model, compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("done", make_prompt(5), params("ab:6"))
        engine.submit("cut", make_prompt(5), params("ab:20"))
        engine.submit("open", make_prompt(5), params("abc", temperature=0, logit_bias=((END, 100.0),)))
        assert recorder.reason("done") is FinishReason.STOP
        assert recorder.reason("cut") is FinishReason.LENGTH
        assert recorder.reason("open") is FinishReason.STOP
    assert len(recorder.tokens("done")) == 6
    assert len(recorder.tokens("cut")) == 9
    assert set(recorder.tokens("done")) == set(recorder.tokens("cut")) == {1, 2}
    assert recorder.tokens("open") == []  # it may end at once, and the bias wants that
    free = solo(model, make_prompt(5), SamplingParams(max_tokens=9, temperature=2.0, seed=1))
    assert not set(free) <= {1, 2}


def test_a_grammar_that_is_complete_ends_the_text_before_min_tokens_are_reached() -> None:
    with running(build_model("llama"), compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("finished", make_prompt(5), params("ab:2", min_tokens=9))
        engine.submit("unfinished", make_prompt(5), params("ab", min_tokens=7, logit_bias=((END, 100.0),)))
        assert recorder.reason("finished") is recorder.reason("unfinished") is FinishReason.STOP
    assert len(recorder.tokens("finished")) == 2
    assert len(recorder.tokens("unfinished")) == 7


def test_a_neighbour_without_a_grammar_gets_what_it_gets_alone() -> None:
    model = build_model("llama")
    free = [greedy(30), SamplingParams(max_tokens=30, temperature=1.0, seed=3, top_p=0.9)]
    alone = [solo(model, make_prompt(9), each) for each in free]
    with running(copy.deepcopy(model), compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("a", make_prompt(9), free[0])
        engine.submit("bound", make_prompt(4), params("abcd:25", 30))
        engine.submit("failing", make_prompt(4), params("failing ab", 30))
        engine.submit("b", make_prompt(9), free[1])
        for name in ("a", "b", "bound", "failing"):
            recorder.end(name)
    assert [recorder.tokens("a"), recorder.tokens("b")] == alone


@pytest.mark.parametrize(
    ("kind", "message"), [("failing", "too many states"), ("defective", "ZeroDivisionError: a defect")]
)
def test_a_matcher_that_fails_ends_its_own_sequence_only(kind: str, message: str) -> None:
    with running(build_model("llama"), compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("good", make_prompt(5), params("ab:8"))
        engine.submit("bad", make_prompt(5), params(f"{kind} ab:8"))
        assert recorder.reason("good") is FinishReason.STOP
        end = recorder.end("bad")
    assert (end.finish_reason, end.error) == (FinishReason.ERROR, message)
    assert len(recorder.tokens("bad")) == 2


def test_a_grammar_without_a_next_token_fails_with_its_reason() -> None:
    with running(build_model("llama"), compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("a", make_prompt(5), params("ab:5", stop_token_ids=frozenset({END, 1, 2})))
        assert "no token of the vocabulary can follow" in (recorder.end("a").error or "")


def test_a_mask_that_does_not_come_fails_its_sequence_and_later_ones_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammar_module, "_WAIT_LIMIT_S", 1.0)
    Blocking.opened.clear()
    try:
        with running(build_model("llama"), compile_grammar=compile_grammar) as (engine, recorder):
            engine.submit("free", make_prompt(5), greedy(30))
            engine.submit("bad", make_prompt(5), params("blocking ab:8"))
            assert "no mask within 1 s" in (recorder.end("bad").error or "")
            engine.submit("good", make_prompt(5), params("ab:8"))
            assert recorder.reason("good") is FinishReason.STOP
            assert recorder.reason("free") is FinishReason.LENGTH
    finally:
        Blocking.opened.set()


def test_a_grammar_that_takes_too_long_in_all_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "_FREE_S", 0.0)
    monkeypatch.setattr(grammar_module, "_FREE_S_PER_TOKEN", 0.0)
    with running(build_model("llama"), compile_grammar=compile_grammar) as (engine, recorder):
        engine.submit("a", make_prompt(5), params("ab:8"))
        assert "simplify it" in (recorder.end("a").error or "")


def test_a_sequence_that_was_sent_back_goes_on_in_its_grammar() -> None:
    model = build_model("llama")
    alone = solo(model, make_prompt(20), SamplingParams(max_tokens=60, temperature=0))
    limits: dict[str, Any] = {
        "kv_memory_bytes": 9 * 16 * 3 * 2 * 32 * 4,
        "compile_grammar": compile_grammar,
    }  # 9 blocks
    with running(copy.deepcopy(model), **limits) as (engine, recorder):
        engine.submit("old", make_prompt(20), greedy(60))
        engine.submit("young", make_prompt(21), params("abc:61", 70))
        assert recorder.reason("young") is FinishReason.STOP
        recorder.end("old")
    assert sum(step.num_preempted for step in recorder.steps) > 0
    assert len(recorder.tokens("young")) == 61
    assert set(recorder.tokens("young")) <= {1, 2, 3}
    assert recorder.tokens("old") == alone


def test_logprobs_are_the_models_own_also_of_what_a_grammar_forces() -> None:
    logits = torch.randn((2, VOCAB_SIZE), generator=torch.Generator().manual_seed(0))
    sequences = [
        make_sequence("a", grammar="ab:2", num_logprobs=2, stop_token_ids=frozenset({END})),
        make_sequence("b", num_logprobs=2),
    ]
    expected = logits.double().log_softmax(1)
    bound, free = Sampler(Grammars(compile_grammar)).sample(logits.clone(), sequences)
    assert bound is not None
    assert bound.logprobs is not None
    assert bound.token_id in (1, 2)
    assert bound.logprobs.logprob == pytest.approx(expected[0, bound.token_id].item(), abs=1e-5)
    assert [token_id for token_id, _ in bound.logprobs.top] == expected[0].topk(2).indices.tolist()
    assert free is not None
    assert free.token_id not in (1, 2)


def test_a_matcher_that_was_prepared_is_not_compiled_again_and_few_are_kept() -> None:
    compiled: list[str] = []

    def compile_counted(text: str) -> Matcher:
        compiled.append(text)
        return compile_grammar(text)

    grammars = Grammars(compile_counted, max_prepared=2)
    for name in ("a:1", "b:1", "c:1"):
        grammars.prepare(name, name)
    sequences = [make_sequence(name, grammar=name, stop_token_ids=frozenset({END})) for name in ("a:1", "b:1", "c:1")]
    verdicts = grammars.take(sequences)
    assert sorted(verdicts.masks) == [0, 1, 2]
    assert compiled == ["a:1", "b:1", "c:1", "a:1"]  # the first had to make room
    grammars.close()


def test_a_thread_that_comes_late_brings_back_nothing_of_a_sequence_that_has_ended() -> None:
    opened = threading.Event()

    def compile_late(text: str) -> Matcher:
        assert opened.wait(60)
        return compile_grammar(text)

    grammars = Grammars(compile_late)
    grammars.begin([make_sequence("a", grammar="ab")])
    grammars.forget("a")  # its forward has failed at once
    opened.set()
    grammars.begin([])  # waits for the threads
    grammars.close()
    assert not grammars._states


def test_sequences_without_a_grammar_start_no_thread() -> None:
    before = threading.active_count()
    grammars = Grammars(compile_grammar)
    grammars.begin([make_sequence("a")])
    verdicts = grammars.take([make_sequence("a")])
    assert (verdicts.masks, verdicts.ends, verdicts.failures) == ({}, {}, {})
    assert threading.active_count() == before
