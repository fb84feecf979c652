"""Renders chat templates in a process of its own, which `service.api.templates` starts and nothing imports.

A template is a program of whoever made the model; `service.api.worker_loop` runs each rendering in a fork with limits.
The source is a `TemplateSource` and the limits, a request the messages as JSON; back come one byte, `+` or `-`, and
the rendered text or why there is none, in UTF-8.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template, mark_control_tokens, render_jinja_template

from service.api.worker_loop import Answer, fork, limit_memory, one_line, serve

_NOTHING = re.compile("(?!)")


def _prepare(source: dict[str, Any]) -> Answer:
    """Compile the template once for all forks, if a fork shows that this ends: it computes what is constant."""
    limit_memory(source["limit_bytes"])
    template = source["template"]
    if os.waitpid(fork(partial(_compile_jinja_template, template), source["limit_s"]), 0)[1] == 0:
        _compile_jinja_template(template)
    return partial(_answer, source)


def _answer(source: dict[str, Any], request: bytes) -> bytes:
    try:
        return b"+" + _render(json.loads(request), source).encode()
    except MemoryError:
        return b""
    except Exception as error:  # noqa: BLE001 - a template may raise anything, and all of it is the client's to know
        return b"-" + _reason(error).encode()


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
    """What a template says when it refuses, or which error it made."""
    name = "" if type(error) is TemplateError else type(error).__name__
    return one_line(": ".join(filter(None, (name, str(error)))))


if __name__ == "__main__":
    serve(_prepare)
