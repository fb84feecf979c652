"""What one sequence does never changes its neighbours: faults, seeds, threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from transformers import PreTrainedModel

from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.messages import public_text
from service.engine.sequence import FinishReason, SamplingParams, SequenceEvent, SequenceTimings
from service.errors import Unavailable
from tests.engine.support import (
    BYTES_PER_BLOCK,
    TIMEOUT_S,
    Recorder,
    greedy,
    make_model,
    make_prompt,
    running,
    solo,
)
from tests.kernels.support import computing_with
from tests.models import NAN_TOKEN_ID, RAISE_TOKEN_ID, VOCAB_SIZE, build_model

NEIGHBOURS = {f"neighbour{n}": make_prompt(n) for n in (3, 18, 30)}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_model("faulty")


@pytest.fixture(params=["auto", "torch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels' attention reads nobody else's slots; torch's reads padding, and what is stale in a block."""
    with computing_with(request.param):
        yield request.param


def test_an_exception_ends_only_the_sequence_that_caused_it(llama: PreTrainedModel) -> None:
    with running(llama, max_num_batched_tokens=16) as (engine, recorder):
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, greedy(20))
        recorder.wait_for_tokens("neighbour3")
        engine.submit("bad", [*make_prompt(20), RAISE_TOKEN_ID], greedy(20))
        end = recorder.end("bad")
        assert end.finish_reason is FinishReason.ERROR
        assert end.error == f"RuntimeError: token {RAISE_TOKEN_ID} was met"
        for name, prompt in NEIGHBOURS.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(llama, prompt, greedy(20))
    assert recorder.num_step_errors == 1
    assert recorder.num_nonfinite == 0


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("cannot read /srv/secret/model.py, line 3"), "ValueError: cannot read <path>, line 3"),
        (RuntimeError("C:\\secret\\x.dll failed 3/4\nat line 2"), "RuntimeError: <path> failed 3/4"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("x" * 999), "RuntimeError: " + "x" * 186),
    ],
    ids=["path", "windows-path-and-lines", "empty", "long"],
)
def test_the_text_of_an_error_shows_nothing_of_the_machine(error: Exception, text: str) -> None:
    assert public_text(error) == text


@pytest.mark.usefixtures("isa")
def test_nan_logits_end_only_the_sequence_that_has_them(llama: PreTrainedModel) -> None:
    with running(llama, max_num_batched_tokens=16) as (engine, recorder):
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, greedy(20))
        recorder.wait_for_tokens("neighbour3")
        engine.submit("bad", [NAN_TOKEN_ID, *make_prompt(20)], greedy(20))
        end = recorder.end("bad")
        assert end.finish_reason is FinishReason.NONFINITE
        assert end.error == "the model gave NaN or infinite logits for this sequence"
        for name, prompt in NEIGHBOURS.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(llama, prompt, greedy(20))
    assert recorder.num_nonfinite == 1
    assert recorder.num_step_errors == 0


@pytest.mark.usefixtures("isa")
def test_what_a_nan_sequence_leaves_in_its_blocks_reaches_nobody(llama: PreTrainedModel) -> None:
    with running(llama, kv_memory_bytes=6 * BYTES_PER_BLOCK) as (engine, recorder):
        for count in (1, 95):  # short: blocks are never written; long: each slot becomes NaN
            engine.submit(f"bad{count}", [NAN_TOKEN_ID] * count, greedy(1))
            assert recorder.reason(f"bad{count}") is FinishReason.NONFINITE
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, greedy(2))
        for name, prompt in NEIGHBOURS.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(llama, prompt, greedy(2))


@pytest.mark.usefixtures("isa")
def test_a_nan_sequence_in_the_first_block_does_not_reach_padded_neighbours(llama: PreTrainedModel) -> None:
    with running(llama) as (engine, recorder):
        engine.submit("early", make_prompt(2), greedy(3))
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, greedy(40))
        recorder.end("early")
        engine.submit("bad", [NAN_TOKEN_ID] * 9, greedy(1))  # into the block that "early" has left
        assert recorder.reason("bad") is FinishReason.NONFINITE
        for name, prompt in NEIGHBOURS.items():
            assert recorder.reason(name) is FinishReason.LENGTH
            assert recorder.tokens(name) == solo(llama, prompt, greedy(40))


def test_a_consumer_that_raises_stops_the_engine_loudly(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    broken = threading.Event()

    def deliver(events: Sequence[SequenceEvent]) -> None:
        recorder.deliver(events)
        if not broken.is_set():
            broken.set()
            raise RuntimeError("nobody listens")

    config = EngineConfig(max_model_len=64, kv_memory_bytes=1 << 20, vocab_size=VOCAB_SIZE)
    engine = Engine(llama, config, observer=recorder, deliver=deliver)
    engine.start()
    engine.submit("a", make_prompt(4), greedy(9))
    assert recorder.reason("a") is FinishReason.ERROR
    engine.drain(TIMEOUT_S)
    assert "the engine thread failed" in caplog.text
    assert engine.state().has_failed
    with pytest.raises(Unavailable, match="the engine has failed; restart the service"):
        engine.submit("b", make_prompt(4), greedy(9))
    engine.stop()


def test_an_observer_that_raises_takes_no_end_from_a_request(llama: PreTrainedModel) -> None:
    class Raising(Recorder):
        def on_finished(self, reason: FinishReason, timings: SequenceTimings) -> None:
            raise RuntimeError("a defect")

    recorder = Raising()
    config = EngineConfig(max_model_len=64, kv_memory_bytes=1 << 20, vocab_size=VOCAB_SIZE)
    engine = Engine(llama, config, observer=recorder, deliver=recorder.deliver)
    engine.start()
    engine.submit("a", make_prompt(4), greedy(2))
    assert recorder.reason("a") is FinishReason.LENGTH
    engine.drain(TIMEOUT_S)
    assert engine.state().has_failed
    engine.stop()


def test_a_lost_block_stops_the_engine_loudly_when_it_is_idle(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(max_model_len=64, kv_memory_bytes=1 << 20, vocab_size=VOCAB_SIZE)
    recorder = Recorder()
    engine = Engine(llama, config, observer=recorder, deliver=recorder.deliver)
    engine.start()
    engine._allocator.allocate(1)
    engine.submit("a", make_prompt(4), greedy(2))
    assert recorder.reason("a") is FinishReason.LENGTH
    engine._thread.join(TIMEOUT_S)  # it looks when nothing has come for a second
    assert engine.state().has_failed
    assert "holders, expected: {0: (1, 0)}" in caplog.text
    engine.stop()


def test_blocks_that_cannot_be_given_back_take_no_end_from_a_request(
    llama: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(max_model_len=512, kv_memory_bytes=1 << 20, vocab_size=VOCAB_SIZE)
    recorder = Recorder()
    engine = Engine(llama, config, observer=recorder, deliver=recorder.deliver)
    engine.start()
    names = ("a", "b", "c")
    for name in names:
        engine.submit(name, make_prompt(4), greedy(400))
    for name in names:
        recorder.wait_for_tokens(name)
    with engine._changed:
        for block in (0, 1):  # what the first two hold
            assert engine._allocator.num_holders(block) == 1
            engine._allocator._num_holders[block] = 0
    engine.abort("a")
    reasons = [recorder.reason(name) for name in names]
    engine._thread.join(TIMEOUT_S)
    assert reasons == [FinishReason.ABORT, FinishReason.ERROR, FinishReason.ERROR]
    assert [len([event for event in recorder.events[name] if event.finish_reason]) for name in names] == [1, 1, 1]
    assert engine.state().has_failed
    assert "block 0 is freed twice" in caplog.text
    assert "block 1 is freed twice" in caplog.text
    engine.stop()


def test_a_seeded_sequence_gets_the_same_tokens_with_and_without_neighbours() -> None:
    model = make_model("llama")
    params = {
        name: SamplingParams(max_tokens=30, temperature=1.2, top_p=0.9, top_k=50, seed=seed)
        for seed, name in enumerate(NEIGHBOURS)
    }
    with running(model, max_num_batched_tokens=16) as (engine, recorder):
        for name, prompt in NEIGHBOURS.items():
            engine.submit(name, prompt, params[name])
        for name in NEIGHBOURS:
            recorder.end(name)
    for name, prompt in NEIGHBOURS.items():
        assert recorder.tokens(name) == solo(model, prompt, params[name])
        assert len(set(recorder.tokens(name))) > 5


def test_a_request_id_and_seed_used_again_give_the_same_tokens() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.5, seed=11)
    with running(make_model("llama")) as (engine, recorder):
        engine.submit("a", make_prompt(6), params)
        recorder.end("a")
        first = recorder.tokens("a")
        recorder.clear()
        engine.submit("a", make_prompt(6), params)
        recorder.end("a")
        assert recorder.tokens("a") == first


def test_requests_from_many_threads_all_end(llama: PreTrainedModel) -> None:
    num_threads, num_requests = 4, 8
    with running(llama, max_num_batched_tokens=32, max_num_seqs=8) as (engine, recorder):

        def work(thread: int) -> None:
            for i in range(num_requests):
                name = f"{thread}-{i}"
                engine.submit(name, make_prompt(1 + 7 * i), greedy(1 + i))
                if i % 3 == thread % 3:
                    engine.abort(name)
                recorder.end(name)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert len(recorder.events) == num_threads * num_requests
