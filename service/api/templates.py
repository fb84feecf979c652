"""Chat templates: messages to the text that a model was trained on, rendered in a process that may be killed.

messages -> connection -> template_worker -> fork -> marked text -> TextCodec.encode_chat
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from service.api.worker_process import AnswerTooLong, WorkerProcess
from service.errors import InvalidRequest, PromptTooLong

_RENDERING_LIMIT_S = 2.0
_RENDERING_LIMIT_BYTES = 256 * 2**20
_MAX_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSource:
    """What a tokenizer knows of chats.

    Attributes:
        template: Jinja.
        special_tokens: variables of the template, such as `bos_token`.
        control_tokens: texts that are tokens only where the template itself writes them.
    """

    template: str
    special_tokens: Mapping[str, str]
    control_tokens: Sequence[str]


class ChatTemplate:
    """A model's chat template. Owned by the event loop; the worker starts with the first rendering.

    Args:
        max_characters: longer chats are refused.
    """

    def __init__(self, source: TemplateSource, *, max_characters: int) -> None:
        self._knows_developer = "developer" in source.template
        self._max_characters = max_characters
        limits = {"limit_s": _RENDERING_LIMIT_S, "limit_bytes": _RENDERING_LIMIT_BYTES}
        self._worker = WorkerProcess(
            "template_worker.py", purpose="renders chat templates", source=lambda: asdict(source) | limits
        )

    async def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for a chat, in which control tokens of messages are marked; `TextCodec.encode_chat` reads it.

        Role `developer` becomes `system` where the template has no word for it.

        Raises:
            PromptTooLong: more characters than the context can hold.
            InvalidRequest: the template refuses the messages, or takes too much time or memory for them.
        """
        num_characters = sum(len(message["content"]) for message in messages)
        if num_characters > self._max_characters:
            raise self._too_long(str(num_characters))
        if not self._knows_developer:
            messages = [{**m, "role": "system" if m["role"] == "developer" else m["role"]} for m in messages]
        max_bytes = 1 + _MAX_BYTES_PER_CHARACTER * self._max_characters
        try:
            answer = await self._worker.ask(json.dumps(list(messages)).encode(), max_answer_bytes=max_bytes)
        except AnswerTooLong as error:
            raise self._too_long(f"more than {self._max_characters}") from error
        if answer.startswith(b"+"):
            return answer[1:].decode()
        if answer:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {answer[1:].decode()}; change them",
                param="messages",
                code="template_error",
            )
        raise InvalidRequest(
            f"the model's chat template needs more than {_RENDERING_LIMIT_S:g} s or "
            f"{_RENDERING_LIMIT_BYTES // 2**20} MiB for these messages; change them, or send a prompt to "
            "/v1/completions",
            param="messages",
            code="template_limit",
        )

    def close(self) -> None:
        """End the worker; the next rendering starts another."""
        self._worker.close()

    def _too_long(self, num_characters: str) -> PromptTooLong:
        return PromptTooLong(
            f"the chat has {num_characters} characters; the context holds at most {self._max_characters}; shorten it",
            param="messages",
            code="context_length_exceeded",
        )
