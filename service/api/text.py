"""Text to token ids and back: the only user of the tokenizer.

prompt text -> encode -> engine -> token ids -> Detokenizer -> StopMatcher -> text of a choice
chat -> ChatTemplate -> encode_chat -> engine -> ...
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from service.api.templates import ChatTemplate, TemplateSource
from service.errors import InvalidRequest, PromptTooLong

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_PRIMER_TOKENS = (4, 16)
"""Fewest and most prompt tokens that give a Detokenizer its context."""
_MAX_CONTEXT_TOKENS = 8
"""Of pieces that are out; with more a Detokenizer forgets all but the last, which takes another decoding."""
_MAX_WINDOW_TOKENS = 256
"""A Detokenizer holds back bytes that are no character for so many tokens at most."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """A model's tokenizer, with the bound that keeps its cost in proportion to the context.

    Args:
        tokenizer: as the model's files define it; its own truncation and padding are switched off.
        context_length: tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, context_length: int) -> None:
        backend: Tokenizer = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.tokenizer = backend
        self._chat_tokenizer: Any = tokenizer
        self._context_length = context_length
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        # In byte-level and sentencepiece vocabularies no token is longer in a text than in the vocabulary.
        self.max_characters = context_length * max(map(len, backend.get_vocab(with_added_tokens=True)))

    async def encode(self, text: str, *, param: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, by default with the special tokens that the model wants; off the event loop.

        Raises:
            PromptTooLong: more characters than the context can hold whatever they are; nothing was tokenized.
        """
        if len(text) > self.max_characters:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters; {self._context_length} tokens, the context, hold at most "
                f"{self.max_characters}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        encoding = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return encoding.ids

    async def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of what `ChatTemplate.render` gave; special tokens are those that the template wrote, and no other.

        Raises:
            InvalidRequest: a message spells a control token that this tokenizer cannot write as plain text.
        """
        try:
            return await asyncio.to_thread(self._encode_rendered, rendered)
        except ValueError as error:
            raise InvalidRequest(
                f"the messages hold a control token that the tokenizer cannot take as plain text ({error}); remove it",
                param="messages",
                code="control_token",
            ) from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def names(self, token_ids: Sequence[int]) -> list[str | None]:
        """How the vocabulary spells token ids; None for one that it does not have."""
        return [self.tokenizer.id_to_token(token_id) for token_id in token_ids]

    def chat_template(self) -> ChatTemplate | None:
        """What renders chats; None if the model has no chat template."""
        try:
            template: str = self._chat_tokenizer.get_chat_template()
        except ValueError:
            return None
        source = TemplateSource(
            template=template,
            special_tokens=self._chat_tokenizer.special_tokens_map,
            control_tokens=self._control_tokens(template),
        )
        return ChatTemplate(source, max_characters=self.max_characters)

    def _control_tokens(self, template: str) -> list[str]:
        """Special tokens, and other added tokens that the model's files name or the template writes.

        Newlines and blanks may be added tokens; templates write them as ordinary text.
        """
        added = self._chat_tokenizer.added_tokens_decoder.values()
        named = self._chat_tokenizer.chat_control_tokens
        if named is None:
            named = [token.content for token in added if token.content in template and not token.content.isspace()]
        return [token.content for token in added if token.special or token.content in named]

    def _encode_rendered(self, rendered: str) -> list[int]:
        encoding = self._chat_tokenizer(rendered, add_special_tokens=False, sanitize_control_tokens=True)
        ids: list[int] = encoding["input_ids"]
        return ids


def encode_probe(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, vocab_size: int, length: int
) -> list[int]:
    """Token ids of some texts, about as many of each; what a model wants in front of a text stands in front of all.

    Args:
        vocab_size: of the model; tokens behind it are left out.
        length: of the result, unless the texts are shorter.
    """
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    ids: list[int] = []
    for number, text in enumerate(texts, 1):
        part = backend.encode(text, add_special_tokens=number == 1).ids
        known = [token_id for token_id in part if token_id < vocab_size]
        ids += known[: length * number // len(texts) - len(ids)]
    return ids


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Token ids of the special tokens that a model wants in front of any text, and those of a text of any length."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    framed = backend.encode("a")
    is_prefix = takewhile(lambda item: item[1], zip(framed.ids, framed.special_tokens_mask, strict=True))
    return [token_id for token_id, _ in is_prefix], backend.encode(text, add_special_tokens=False).ids


class Detokenizer:
    """Token ids to text as they come; all pieces together are the text of all ids.

    Decoding a token needs the ones before it (leading spaces, characters of several tokens), so a window
    of ids is decoded with each push: those of the last pieces, and those that followed. A trailing U+FFFD
    may be the beginning of a character and is held back.

    Args:
        prompt_ids: what the text continues; an empty prompt gives the text as if nothing stood before it.
    """

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._decode = partial(codec.decode, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        fewest, most = _PRIMER_TOKENS
        # Special tokens have no text, so that those before and after them are decoded as one.
        shown = list(islice((i for i in reversed(prompt_ids) if i not in codec.special_ids), most))[::-1]
        for count in range(fewest, most + 1):
            self._ids = shown[-count:]
            primer = self._decode(self._ids)
            if primer and not primer.startswith(_REPLACEMENT):
                break  # begins with a whole character
        self._num_sent = len(primer)
        self._num_context = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids settle; may be empty."""
        self._ids.extend(token_ids)
        text = self._decode(self._ids)
        is_long = len(self._ids) - self._num_context > _MAX_WINDOW_TOKENS
        if text.endswith(_REPLACEMENT) and not is_long:
            settled = text.rstrip(_REPLACEMENT)
            piece = settled[self._num_sent :]
            self._num_sent += len(piece)
            return piece
        piece = text[self._num_sent :]
        if piece or is_long:
            if len(self._ids) > _MAX_CONTEXT_TOKENS:
                del self._ids[: self._num_context]
                text = self._decode(self._ids)
            self._num_context = len(self._ids)
            self._num_sent = len(text)
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._decode(self._ids)[self._num_sent :]
        self._num_sent += len(piece)
        return piece


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, whatever the pieces are.

    A character is released when no stop string can begin at or before it any more, so that no part of one leaks.
    The first to be complete wins; of several complete at once, the longest.
    Source: Knuth, Morris, Pratt, Fast pattern matching in strings, 1977; constant time per character and string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._matched = [0] * len(self._stops)  # characters of each stop string at the end of the text
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is free to go; after a match, what stood before it, then nothing."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text, num_old = self._held + text, len(self._held)
        for end in range(num_old, len(text)):
            longest = self._advance(text[end])
            if longest:
                self.stopped, self._held = True, ""
                return text[: end + 1 - longest]
        num_held = max(self._matched)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, as no stop string was completed."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Read one character; the length of the longest stop string that it completes, or 0."""
        longest = 0
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._borders[index][matched - 1]
            matched += stop[matched] == character
            self._matched[index] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


class TextStream:
    """The text of one choice: detokenized, and cut at the first stop string.

    The text of the first `min_tokens` tokens is never cut: a stop string counts if it begins behind it.

    Attributes:
        num_characters: detokenized so far, also those that are held back or cut.
    """

    def __init__(
        self, codec: TextCodec, prompt_ids: Sequence[int], stops: Sequence[str], *, min_tokens: int = 0
    ) -> None:
        self._detokenizer = Detokenizer(codec, prompt_ids)
        self._matcher = StopMatcher(stops)
        self._num_uncut = min_tokens  # of the tokens to come
        self._may_cut = False
        self.num_characters = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; all that follows is dropped."""
        return self._matcher.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids set free; may be empty."""
        uncut, token_ids = token_ids[: self._num_uncut], token_ids[self._num_uncut :]
        text = self._read(uncut) if uncut else ""
        self._num_uncut -= len(uncut)
        if token_ids:
            self._may_cut = True
            text += self._matcher.push(self._read(token_ids))
        return text

    def finish(self) -> str:
        """What was held back, when no more ids come."""
        text = self._detokenizer.finish()
        return (self._matcher.push(text) if self._may_cut else text) + self._matcher.finish()

    def _read(self, token_ids: Sequence[int]) -> str:
        text = self._detokenizer.push(token_ids)
        self.num_characters += len(text)
        return text


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop` the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for _, character in pairwise(stop):
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length - 1]
        borders.append(length + (stop[length] == character))
    return borders
