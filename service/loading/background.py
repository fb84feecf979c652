"""Threads for the products of a comparison: as quick as they can be, or beside a service that answers.

Each has one thread of torch. Threads of torch's own, which meet after every operation, would make those of an engine
wait, and wait themselves where a machine has other work.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import torch

_NICENESS: Final = 10
"""Gives way to what answers, and still gets to give the interpreter back where other work has the cores."""
_REST: Final = 8
"""While requests are computed, so many times as long as it works: a ninth of one core."""


class Stopped(Exception):
    """The work is to end before it is done."""


class HurriedCrew:
    """Works with all threads all of the time; until it is closed, the calling thread has one thread of torch too."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._num_torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="fidelity", initializer=torch.set_num_threads, initargs=(1,)
        )

    def run(self, work: Callable[[int], None], firsts: range) -> None:
        """See `deferred.Crew.run`."""
        for _ in self._pool.map(work, firsts):
            pass

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        torch.set_num_threads(self._num_torch_threads)


class ModestCrew:
    """Works at a low priority, and while requests are computed with one thread for a part of its time.

    Args:
        num_threads: that work while nothing else is to be done.
        is_busy: whether requests are being computed; asked for each block.
    """

    def __init__(self, num_threads: int, is_busy: Callable[[], bool]) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fidelity", initializer=be_modest)
        self.num_threads = num_threads
        self._is_busy = is_busy
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._returned_at: float | None = None  # what follows is work of the calling thread

    def stop(self) -> None:
        """Have the work end with `Stopped`, within one block."""
        self._stopping.set()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def run(self, work: Callable[[int], None], firsts: range) -> None:
        """See `deferred.Crew.run`.

        Raises:
            Stopped: `stop` was called.
        """
        if self._returned_at is not None:
            self._rest(time.thread_time() - self._returned_at)
        for _ in self._pool.map(partial(self._work, work), firsts):
            pass
        self._returned_at = time.thread_time()

    def _work(self, work: Callable[[int], None], first: int) -> None:
        if not self._is_busy():
            self._check()
            work(first)
            return
        with self._turn:
            self._check()
            started = time.thread_time()
            work(first)
            self._rest(time.thread_time() - started)

    def _rest(self, worked_s: float) -> None:
        if self._is_busy():
            self._stopping.wait(_REST * worked_s)
        self._check()

    def _check(self) -> None:
        if self._stopping.is_set():
            raise Stopped


def be_modest() -> None:
    """Give the calling thread a low priority, and one thread for torch's operations."""
    torch.set_num_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
