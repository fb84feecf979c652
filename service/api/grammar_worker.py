"""Tries grammars in a process of its own, which `service.api.grammars` starts and nothing imports.

A grammar is a program of whoever sent it: one may take minutes and gigabytes to compile, or more stack than a
thread has, which ends the process. `service.api.worker_loop` runs each trial in a fork with limits.
The source is that of `Matchers` and the limits, a request a grammar; back comes `+` if it can be compiled and has a
first mask, or `-` and why not.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from functools import partial
from typing import Any

from service.api.matchers import Matchers
from service.api.worker_loop import Answer, limit_memory, serve
from service.errors import GrammarError

_STACK_BYTES = 2**20
"""An eighth of what threads of a service have, so that what fits here fits there with room to spare."""
_NICENESS = 10
"""The engine goes first."""


def _prepare(source: dict[str, Any]) -> Answer:
    os.nice(_NICENESS)
    matchers = Matchers.from_source(source)
    try:
        matchers.tokenizer()
    except GrammarError as error:
        answer = b"-" + str(error).encode()
        return lambda _: answer
    limit_memory(source["limit_bytes"])
    return partial(_answer, matchers, source["cpu_limit_s"])


def _answer(matchers: Matchers, cpu_limit_s: float, request: bytes) -> bytes:
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what ends for want of memory says so at length
    try:
        matchers.compile(request.decode()).mask()
    except GrammarError as error:
        return b"-" + str(error).encode()
    return b"+"


if __name__ == "__main__":
    serve(_prepare)
