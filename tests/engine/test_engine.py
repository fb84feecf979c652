from __future__ import annotations

import threading

import pytest
from transformers import PreTrainedModel

from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sequence import FinishReason, SamplingParams
from service.errors import InvalidRequest, PromptTooLong, QueueFull, SettingError, Unavailable
from tests.conftest import Gate
from tests.engine.support import (
    BYTES_PER_BLOCK,
    TIMEOUT_S,
    Recorder,
    greedy,
    make_prompt,
    running,
    solo,
)
from tests.models import BLOCK_TOKEN_ID, VOCAB_SIZE, build_model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_model("faulty")


def held_prompt(num_tokens: int = 4) -> list[int]:
    """A prompt that keeps the model at the gate, at its first token."""
    return [BLOCK_TOKEN_ID, *make_prompt(num_tokens - 1)]


# What is refused before any state exists


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param", "message"),
    [
        ([], greedy(1), InvalidRequest, "prompt", "the prompt has 0 tokens; at least 1"),
        ([1, 300], greedy(1), InvalidRequest, "prompt", r"token id 300 is outside the vocabulary, 0\.\.299"),
        ([1, -1], greedy(1), InvalidRequest, "prompt", "token id -1 is outside"),
        (
            [1] * 40,
            greedy(61),
            PromptTooLong,
            "max_tokens",
            "40 prompt tokens and max_tokens 61 make 101, the context is 100",
        ),
        (
            [1] * 100,
            greedy(1),
            PromptTooLong,
            "prompt",
            "100 prompt tokens .* make 101, the context is 100 tokens; shorten",
        ),
    ],
    ids=["empty", "id-above", "id-below", "max-tokens", "prompt"],
)
def test_a_bad_request_is_refused_and_the_next_one_served(
    llama: PreTrainedModel,
    *,
    prompt: list[int],
    params: SamplingParams,
    error: type[InvalidRequest],
    param: str,
    message: str,
) -> None:
    with running(llama, max_model_len=100) as (engine, recorder):
        with pytest.raises(error, match=message) as caught:
            engine.submit("bad", prompt, params)
        assert caught.value.param == param
        engine.submit("good", make_prompt(40), greedy(60))
        assert recorder.reason("good") is FinishReason.LENGTH
        assert "bad" not in recorder.events


def test_a_request_that_the_kv_memory_can_never_hold_is_refused(llama: PreTrainedModel) -> None:
    with running(llama, kv_memory_bytes=2 * BYTES_PER_BLOCK) as (engine, recorder):
        with pytest.raises(PromptTooLong, match=r"make 33, the KV memory holds 32 tokens; .* raise --kv-memory"):
            engine.submit("bad", make_prompt(30), greedy(3))
        engine.submit("good", make_prompt(30), greedy(2))
        assert recorder.reason("good") is FinishReason.LENGTH


def test_a_request_id_in_use_is_refused_until_it_has_ended(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama) as (engine, recorder):
        engine.submit("a", held_prompt(), greedy(1))
        with pytest.raises(InvalidRequest, match="request id 'a' is in use"):
            engine.submit("a", make_prompt(4), greedy(1))
        gate.opened.set()
        recorder.end("a")


def test_a_full_queue_refuses_and_takes_again_when_it_has_moved(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama, max_num_seqs=1, max_queue=2) as (engine, recorder):
        engine.submit("0", held_prompt(), greedy(2))
        assert gate.reached.wait(TIMEOUT_S)
        engine.submit("1", make_prompt(4), greedy(2))
        engine.submit("2", make_prompt(4), greedy(2))
        with pytest.raises(QueueFull, match="2 texts wait, --max-queue allows 2; retry later"):
            engine.submit("3", make_prompt(4), greedy(2))
        assert engine.state().num_waiting == 2
        gate.opened.set()
        recorder.end("2")
        engine.submit("4", make_prompt(4), greedy(2))
        assert recorder.reason("4") is FinishReason.LENGTH


def test_before_the_start_and_after_the_stop_nothing_is_accepted(llama: PreTrainedModel) -> None:
    config = EngineConfig(max_model_len=64, kv_memory_bytes=1 << 20, vocab_size=VOCAB_SIZE)
    recorder = Recorder()
    engine = Engine(llama, config, observer=recorder, deliver=recorder.deliver)
    with pytest.raises(Unavailable, match="not started"):
        engine.submit("a", [1], greedy(1))
    assert engine.state().num_kv_blocks == 0
    engine.start()
    engine.stop()
    with pytest.raises(Unavailable, match="stopped"):
        engine.submit("a", [1], greedy(1))


def test_a_start_that_fails_raises_at_the_caller(llama: PreTrainedModel) -> None:
    config = EngineConfig(max_model_len=64, kv_memory_bytes=1, vocab_size=VOCAB_SIZE)
    recorder = Recorder()
    engine = Engine(llama, config, observer=recorder, deliver=recorder.deliver)
    with pytest.raises(SettingError, match="raise --kv-memory"):
        engine.start()


def test_a_limit_below_1_is_refused() -> None:
    with pytest.raises(SettingError, match="max_queue is 0; it must be at least 1"):
        EngineConfig(max_model_len=1, kv_memory_bytes=1, vocab_size=1, max_queue=0)


# How sequences end


def test_a_stop_token_ends_and_is_not_delivered(llama: PreTrainedModel) -> None:
    prompt = make_prompt(9)
    tokens = solo(llama, prompt, greedy(12))
    stop = tokens[6]
    first = tokens.index(stop)
    with running(llama) as (engine, recorder):
        engine.submit("a", prompt, greedy(12, frozenset({stop})))
        assert recorder.reason("a") is FinishReason.STOP
        assert recorder.tokens("a") == tokens[:first]


def test_events_of_a_step_come_together_with_timings_that_are_in_order(llama: PreTrainedModel) -> None:
    with running(llama) as (engine, recorder):
        engine.submit("a", make_prompt(9), greedy(3))
        timings = recorder.end("a").timings
        assert timings is not None
        assert timings.queue_s is not None
        assert timings.first_token_s is not None
        assert 0 <= timings.queue_s <= timings.first_token_s <= timings.total_s
        assert [len(event.token_ids) for event in recorder.events["a"]] == [1, 1, 1]
        assert engine.state().last_step_at is not None


def test_a_queued_sequence_can_be_aborted(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama, max_num_seqs=1) as (engine, recorder):
        engine.submit("first", held_prompt(), greedy(3))
        assert gate.reached.wait(TIMEOUT_S)
        engine.submit("second", make_prompt(4), greedy(3))
        engine.abort("second")
        gate.opened.set()
        assert recorder.reason("second") is FinishReason.ABORT
        assert recorder.tokens("second") == []
        assert recorder.reason("first") is FinishReason.LENGTH


def test_a_prefilling_sequence_can_be_aborted_and_its_id_used_again(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama, max_num_batched_tokens=8) as (engine, recorder):
        engine.submit("a", [*make_prompt(10), *held_prompt(10)], greedy(50))  # held in the second of 3 chunks
        assert gate.reached.wait(TIMEOUT_S)
        engine.abort("a", FinishReason.TIMEOUT)
        engine.abort("a")  # too late to change the reason
        gate.opened.set()
        assert recorder.reason("a") is FinishReason.TIMEOUT
        assert recorder.tokens("a") == []
        state = engine.state()
        assert state.num_free_kv_blocks == state.num_kv_blocks
        recorder.clear()
        engine.submit("a", make_prompt(4), greedy(9))
        assert recorder.reason("a") is FinishReason.LENGTH


def test_a_decoding_sequence_can_be_aborted_and_its_neighbour_goes_on(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama) as (engine, recorder):
        engine.submit("a", make_prompt(4), greedy(500))
        recorder.wait_for_tokens("a", 3)
        engine.submit("b", held_prompt(), greedy(5))
        assert gate.reached.wait(TIMEOUT_S)
        num_tokens = len(recorder.tokens("a"))
        engine.abort("a")
        gate.opened.set()
        assert recorder.reason("a") is FinishReason.ABORT
        assert len(recorder.tokens("a")) == num_tokens, "the token of the step under way is delivered"
        state = engine.state()
        assert state.num_free_kv_blocks >= state.num_kv_blocks - 1  # "b" has one
        assert recorder.reason("b") is FinishReason.LENGTH


def test_aborting_what_is_unknown_or_has_ended_does_nothing(llama: PreTrainedModel) -> None:
    with running(llama) as (engine, recorder):
        engine.abort("never")
        engine.submit("a", make_prompt(4), greedy(2))
        recorder.end("a")
        engine.abort("a")
        engine.submit("b", make_prompt(4), greedy(2))
        recorder.end("b")
        assert list(recorder.events) == ["a", "b"]


def test_drain_lets_accepted_sequences_finish_and_refuses_new_ones(llama: PreTrainedModel, gate: Gate) -> None:
    with running(llama, max_num_seqs=1) as (engine, recorder):
        engine.submit("running", held_prompt(), greedy(5))
        engine.submit("waiting", make_prompt(4), greedy(5))
        assert gate.reached.wait(TIMEOUT_S)
        drain = threading.Thread(target=engine.drain, args=(TIMEOUT_S,))
        gate.opened.set()
        drain.start()
        drain.join(TIMEOUT_S)
        assert recorder.reason("running") is recorder.reason("waiting") is FinishReason.LENGTH
        with pytest.raises(Unavailable, match="draining"):
            engine.submit("new", make_prompt(4), greedy(1))


def test_drain_ends_what_is_left_after_its_time_with_shutdown(llama: PreTrainedModel) -> None:
    with running(llama, max_num_seqs=1, max_model_len=4096, kv_memory_bytes=1 << 23) as (engine, recorder):
        engine.submit("running", make_prompt(4), greedy(4000))
        engine.submit("waiting", make_prompt(4), greedy(4000))
        recorder.wait_for_tokens("running")
        engine.drain(0.0)
        assert recorder.reason("running") is recorder.reason("waiting") is FinishReason.SHUTDOWN


def test_stop_ends_all_sequences_with_shutdown(llama: PreTrainedModel) -> None:
    with running(llama, max_num_seqs=1, max_model_len=4096, kv_memory_bytes=1 << 23) as (engine, recorder):
        engine.submit("running", make_prompt(4), greedy(4000))
        engine.submit("waiting", make_prompt(4), greedy(4000))
        recorder.wait_for_tokens("running")
        engine.stop()
        assert recorder.reason("running") is recorder.reason("waiting") is FinishReason.SHUTDOWN
