"""Whether a grammar can be served: it is tried in a process that may be killed before the engine sees it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from service.api.grammar_schemas import Constraint
from service.api.worker_process import WorkerProcess
from service.errors import GrammarError, InvalidRequest

if TYPE_CHECKING:
    from service.api.matchers import Matchers

_CPU_LIMIT_S = 0.5
"""Of a compilation with the first mask: an ordinary schema takes 1 to 10 ms, one with 2,000 properties 0.15 s."""
_LIMIT_S = 5.0
"""Of the same on the clock of a machine that has other work."""
_LIMIT_BYTES = 32 * 2**20
"""Of the same: an ordinary schema takes less than 1 MiB. Each sequence that is computed holds so much."""
_MAX_SOUND = 128
"""Grammars that are not tried again, those that were used last."""
_MAX_ANSWER_BYTES = 2**12


class GrammarChecker:
    """Tries grammars. Owned by the event loop; its process starts with the first one."""

    def __init__(self, matchers: Matchers) -> None:
        limits = {"limit_s": _LIMIT_S, "limit_bytes": _LIMIT_BYTES, "cpu_limit_s": _CPU_LIMIT_S}
        self._matchers = matchers
        self._worker = WorkerProcess(
            "grammar_worker.py", purpose="tries grammars", source=lambda: matchers.source() | limits
        )
        self._sound: OrderedDict[str, None] = OrderedDict()

    async def check(self, constraint: Constraint) -> str:
        """The grammar of a constraint, which compiles within the limits.

        Raises:
            InvalidRequest: it is wrong, or it takes more.
        """
        try:
            grammar = self._matchers.grammar_of(constraint)
        except GrammarError as error:
            raise _refusal(constraint, str(error)) from error
        if grammar not in self._sound:
            answer = await self._worker.ask(grammar.encode(), max_answer_bytes=_MAX_ANSWER_BYTES)
            if answer[:1] == b"-":
                raise _refusal(constraint, answer[1:].decode())
            if not answer:
                limits = f"more than {_CPU_LIMIT_S:g} s or {_LIMIT_BYTES // 2**20} MiB, or is too deep"
                raise _refusal(constraint, f"it takes {limits}", code="grammar_limit")
        self._sound[grammar] = None
        self._sound.move_to_end(grammar)
        if len(self._sound) > _MAX_SOUND:
            self._sound.popitem(last=False)
        return grammar

    def close(self) -> None:
        """End the process; the next grammar starts another."""
        self._worker.close()


def _refusal(constraint: Constraint, reason: str, *, code: str = "invalid_grammar") -> InvalidRequest:
    name = {"json_schema": "the JSON schema", "regex": "the expression", "grammar": "the grammar"}[constraint.kind]
    return InvalidRequest(f"{name} cannot be compiled: {reason}; change it", param=constraint.param, code=code)
