"""Renders chat templates in a process of its own, which `service.api.templates` starts and nothing imports.

A template is a program of whoever made the model. Each rendering runs in a fork of this process with limits of
time and memory, which the kernel enforces, so that a template that loops or grows ends itself and nothing else.
The limit of memory holds for this process as well, so that it compiles what a fork has compiled before it.

Standard input is a socket. First come 8 bytes of length and JSON: a `TemplateSource` and the limits. Then come
connections, one for each rendering: the messages as JSON until end of file; back come one byte, `+` or `-`, and the
rendered text or why there is none, in UTF-8. No answer at all means that a limit was reached.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template, mark_control_tokens, render_jinja_template

_MAX_REASON_CHARACTERS = 200
_NOTHING = re.compile("(?!)")
_STATM = Path("/proc/self/statm")


def main() -> None:
    """Serve until the other end of standard input closes."""
    with socket.socket(fileno=sys.stdin.fileno()) as control, control.makefile("rb", buffering=0) as stream:
        source = json.loads(_read(stream.read, int.from_bytes(_read(stream.read, 8), "big")))
        num_bytes = int(_STATM.read_text().split()[0]) * resource.getpagesize() + source["limit_bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        _compile_ahead(source["template"], source["limit_s"])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel clears away forks that have ended
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            with socket.socket(fileno=descriptors[0]) as connection:
                _fork(partial(_answer, connection, source), source["limit_s"])


def _read(read: Callable[[int], bytes | None], size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = read(size - len(data))
        if not piece:
            sys.exit(0)  # the service ended before it had sent all
        data += piece
    return data


def _fork(work: Callable[[], object], limit_s: float) -> int:
    """Do work in a fork that ends after `limit_s`; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # ends the fork, whatever it is doing
        work()
        status = 0
    finally:
        os._exit(status)


def _compile_ahead(template: str, limit_s: float) -> None:
    """Compile the template once for all forks, if a fork shows that this ends: it computes what is constant."""
    if os.waitpid(_fork(partial(_compile_jinja_template, template), limit_s), 0)[1] == 0:
        _compile_jinja_template(template)


def _answer(connection: socket.socket, source: dict[str, Any]) -> None:
    with connection.makefile("rb") as stream:
        messages = json.loads(stream.read())
    try:
        answer = b"+" + _render(messages, source).encode()
    except MemoryError:
        return
    except Exception as error:  # noqa: BLE001 - a template may raise anything, and all of it is the client's to know
        answer = b"-" + _reason(error).encode()
    connection.sendall(answer)


def _render(messages: list[dict[str, str]], source: dict[str, Any]) -> str:
    """Render a chat; control tokens that stand in messages are marked, so that they are encoded as plain text."""
    if mark_control_tokens(messages, _NOTHING) != messages:
        raise TemplateError("the messages hold a character that marks control tokens, U+F0000 or U+F0001")
    longest_first = sorted(source["control_tokens"], key=len, reverse=True)
    control_tokens = re.compile("|".join(map(re.escape, longest_first))) if longest_first else _NOTHING
    rendered: Any = render_jinja_template(
        [mark_control_tokens(messages, control_tokens)],
        chat_template=source["template"],
        add_generation_prompt=True,
        **source["special_tokens"],
    )
    text: str = rendered[0][0]  # of one chat, the prompt
    return text


def _reason(error: Exception) -> str:
    """What a template says when it refuses, or which error it made: one line of printable characters."""
    name = "" if type(error) is TemplateError else type(error).__name__
    reason = ": ".join(filter(None, (name, str(error))))
    words = "".join(character if character.isprintable() else " " for character in reason).split()
    return " ".join(words)[:_MAX_REASON_CHARACTERS]


if __name__ == "__main__":
    main()
