"""A comparison before the service is ready, or beside its requests: limits, pauses, and what goes wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from service.errors import FidelityError
from service.loading.background import HurriedCrew, ModestCrew, Stopped
from service.loading.fidelity_report import UNQUANTIZED, Fidelity
from service.loading.fidelity_run import FidelityCheck
from service.loading.loader import LoadedModel
from service.loading.progress import LoadProgress
from service.loading.shards import SINGLE_NAME
from tests.loading.support import load
from tests.models import write_checkpoint

TIMEOUT_S = 60.0
IDS = list(range(10, 250))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "m")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load(folder, "w8a16")


def idle() -> bool:
    return False


def first(loaded: LoadedModel, max_kl: float | None = None) -> Fidelity:
    check = FidelityCheck(loaded, IDS)
    check.run_first(LoadProgress(), num_threads=2, max_kl=max_kl)
    return check.result()


def beside(loaded: LoadedModel, is_busy: Callable[[], bool] = idle) -> Fidelity:
    check = FidelityCheck(loaded, IDS)
    check.run_beside(is_busy, 2)
    check.join()
    return check.result()


def test_before_it_is_ready_and_beside_requests_the_result_is_one(loaded: LoadedModel) -> None:
    one, other = first(loaded), beside(loaded)
    assert one.state == other.state == "done"
    assert one.kl_mean_nats == pytest.approx(other.kl_mean_nats, rel=1e-6)
    assert one.top1_ratio == other.top1_ratio


def test_requests_change_when_it_ends_and_not_what_it_finds(loaded: LoadedModel) -> None:
    assert beside(loaded, lambda: True).kl_mean_nats == pytest.approx(beside(loaded).kl_mean_nats, rel=1e-6)


def test_the_threads_of_torch_are_as_many_afterwards(loaded: LoadedModel) -> None:
    before = torch.get_num_threads()
    first(loaded)
    assert torch.get_num_threads() == before


def test_a_limit_that_is_kept_is_no_error(loaded: LoadedModel) -> None:
    kl = first(loaded).kl_mean_nats
    assert kl is not None
    assert first(loaded, max_kl=kl * 1.001).state == "done"


def test_a_limit_that_is_passed_is_told_with_value_rule_and_remedy(loaded: LoadedModel) -> None:
    kl = first(loaded).kl_mean_nats
    assert kl is not None
    message = rf"w8a16 moves .* by {kl:.6g} nats .*256 tokens.*--max-kl allows .*; use a recipe with more bits"
    with pytest.raises(FidelityError, match=message):
        first(loaded, max_kl=kl * 0.999)


def test_of_an_unquantized_model_nothing_is_read(folder: Path) -> None:
    loaded = load(folder, "none")
    (folder / SINGLE_NAME).unlink()
    assert first(loaded, max_kl=0) == beside(loaded) == UNQUANTIZED


def test_without_the_original_it_is_unavailable_and_a_limit_is_an_error(folder: Path, loaded: LoadedModel) -> None:
    (folder / SINGLE_NAME).unlink()
    found = beside(loaded)
    assert (found.state, found.kl_mean_nats) == ("unavailable", None)
    assert SINGLE_NAME in found.reason
    with pytest.raises(FidelityError, match=r"m could not be compared with its original: .*--fidelity background"):
        first(loaded, max_kl=1)


def test_a_shard_that_is_cut_fails_the_comparison_and_says_why(folder: Path, loaded: LoadedModel) -> None:
    with (folder / SINGLE_NAME).open("r+b") as file:
        file.truncate(5000)
    found = beside(loaded)
    assert found.state == "failed"
    assert SINGLE_NAME in found.reason


def test_one_that_is_stopped_ends_at_once(loaded: LoadedModel) -> None:
    check = FidelityCheck(loaded, IDS)
    asked, may_go_on = threading.Event(), threading.Event()

    def is_busy() -> bool:
        asked.set()
        return not may_go_on.wait(TIMEOUT_S)

    check.run_beside(is_busy, 1)
    assert asked.wait(TIMEOUT_S)
    check.stop()
    may_go_on.set()
    check.join()
    assert check.result().state == "stopped"


def test_beside_requests_one_block_is_computed_at_a_time() -> None:
    crew = ModestCrew(4, lambda: True)
    running, most, lock = 0, 0, threading.Lock()

    def work(_first: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        torch.ones(100, 100).mm(torch.ones(100, 100))
        with lock:
            running -= 1

    with closing(crew):
        crew.run(work, range(20))
    assert most == 1


def test_threads_beside_requests_have_a_low_priority_and_one_thread_of_torch() -> None:
    crew, found = ModestCrew(2, idle), set[tuple[int, int]]()

    def work(_first: int) -> None:
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        found.add((priority, torch.get_num_threads()))

    with closing(crew):
        crew.run(work, range(8))
    assert found == {(10, 1)}
    assert os.getpriority(os.PRIO_PROCESS, 0) < 10


def test_a_crew_does_each_part_once_and_passes_on_an_error() -> None:
    with closing(HurriedCrew(3)) as crew:
        done: list[int] = []
        crew.run(done.append, range(0, 50, 5))
        assert sorted(done) == list(range(0, 50, 5))

        def fail(first: int) -> None:
            raise ValueError(f"part {first}")

        with pytest.raises(ValueError, match="part 3"):
            crew.run(fail, range(3, 4))


def test_a_stopped_crew_does_nothing_more() -> None:
    crew = ModestCrew(1, idle)
    crew.stop()
    with closing(crew), pytest.raises(Stopped):
        crew.run(lambda _first: pytest.fail("it worked"), range(3))
