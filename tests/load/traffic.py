"""What the clients of a load test ask for, drawn from a seed, and what must come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice, takewhile
from string import ascii_letters
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from tests.load.oracle import generate
from tests.models import BLOCK_TOKEN_ID, FAULT_TOKEN_IDS, NAN_TOKEN_ID, OOM_TOKEN_ID, RAISE_TOKEN_ID, VOCAB_SIZE

MAX_TOKENS = 80
"""New tokens of a text at most."""
SHORT_TOKENS, TIDE = 24, (200, 50)
"""Texts are short but for so many of so many requests in a row, which together grow beyond the KV memory."""
MAX_CHOICES = 2
NUM_STEMS, STEM_TOKENS, MAX_TAIL_TOKENS = 6, 40, 40
"""Prompts begin with one of a few stems, so that they share KV blocks."""
FAULT_SHARE = 0.1
"""Of the prompts, where there are faults at all."""
END_TOKEN_ID = 0
HARMLESS = [token_id for token_id in range(10, VOCAB_SIZE) if token_id not in FAULT_TOKEN_IDS]
FAULTS = {RAISE_TOKEN_ID: "engine_error", OOM_TOKEN_ID: "engine_error", NAN_TOKEN_ID: "engine_nonfinite"}
"""Tokens in prompts, and the codes of the errors that they bring."""
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 50, "frequency_penalty": 0.5, "presence_penalty": -0.5},
]


class Manner(Enum):
    """How a client reads, and how long it stays."""

    WHOLE = "reads the whole answer"
    STREAM = "reads a stream to its end"
    CLOSE = "closes a stream after some events"
    ABORT = "goes away before it has an answer"


@dataclass(frozen=True, slots=True)
class Text:
    """What one choice is to hold, or holds.

    Attributes:
        token_ids: None where an answer has none.
        logprobs: of these tokens, by the model's own logits; None where they are not known.
        end: finish reason, or code of the error that ended it.
    """

    text: str
    token_ids: list[int] | None
    logprobs: list[float] | None
    end: str | None


@dataclass(slots=True)
class Case:
    """A prompt with its parameters.

    Attributes:
        full: token ids of each choice when nothing ends it before `MAX_TOKENS`.
        error: code of the error that follows them, for each choice; None for none.
        logprobs: of the tokens of a greedy text.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    full: list[list[int]] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    logprobs: list[float] | None = None

    @property
    def num_known(self) -> int:
        """Tokens up to which all choices are known."""
        lengths = [MAX_TOKENS if error else len(full) for full, error in zip(self.full, self.errors, strict=True)]
        return min(lengths)

    @property
    def is_greedy(self) -> bool:
        return self.sampling == {"temperature": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one client sends, and what it does then.

    Attributes:
        is_native: sent to `/generate`, whose answers have token ids; else to `/v1/completions`.
        num_events: read before a client closes its stream.
        patience_s: how long a client waits that goes away before it has an answer.
    """

    case: Case
    is_native: bool
    manner: Manner
    max_tokens: int
    num_choices: int
    ignore_eos: bool
    stop: str | None
    stop_token_id: int | None
    wants_logprobs: bool
    num_events: int
    patience_s: float

    @property
    def route(self) -> str:
        return "/generate" if self.is_native else "/v1/completions"

    @property
    def is_streamed(self) -> bool:
        return self.manner in (Manner.STREAM, Manner.CLOSE)

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        fields: dict[str, Any] = {
            "token_ids" if self.is_native else "prompt": self.case.prompt,
            "max_tokens": self.max_tokens,
            "n": self.num_choices,
            "ignore_eos": self.ignore_eos,
            "stream": self.is_streamed,
        }
        if self.stop is not None:
            fields["stop"] = self.stop
        if self.stop_token_id is not None:
            fields["stop_token_ids"] = [self.stop_token_id]
        if self.wants_logprobs:
            fields["logprobs"] = True if self.is_native else 1
        return self.case.sampling | fields

    def errors(self) -> set[str]:
        """Codes of the errors that its choices meet; one of them ends it."""
        return {error for full, error in self._choices() if error is not None and not self._ends_within(full)}

    def expected(self, tokenizer: Tokenizer) -> list[Text]:
        """Its choices, if all of them end well."""
        return [self._text(full, tokenizer) for full, _ in self._choices()]

    def _choices(self) -> Iterator[tuple[list[int], str | None]]:
        return islice(zip(self.case.full, self.case.errors, strict=True), self.num_choices)

    def _ends_within(self, full: list[int]) -> bool:
        return self.max_tokens <= len(full) or len(self._until_stopped(full)) < len(full)

    def _until_stopped(self, full: list[int]) -> list[int]:
        """The tokens before one that stops it, at most `max_tokens`."""
        stops = {self.stop_token_id} if self.ignore_eos else {self.stop_token_id, END_TOKEN_ID}
        return list(takewhile(lambda token: token not in stops, full[: self.max_tokens]))

    def _text(self, full: list[int], tokenizer: Tokenizer) -> Text:
        tokens = self._until_stopped(full)
        end = "length" if len(tokens) == self.max_tokens else "stop"
        text = tokenizer.decode(tokens)
        if self.stop is not None and self.stop in text:
            text, end = text[: text.index(self.stop)], "stop"
            beginnings = (tokens[:count] for count in range(1, len(tokens) + 1))
            tokens = next(some for some in beginnings if self.stop in tokenizer.decode(some))
        return Text(text, tokens, self.case.logprobs, end)


class Traffic:
    """Draws requests from a seed.

    Attributes:
        cases: distinct prompts with parameters, half of them greedy; of sampled ones it is to be found out what they
            give alone.
    """

    def __init__(self, seed: int, model: PreTrainedModel, tokenizer: Tokenizer, *, num_cases: int, has_faults: bool):
        self._random = random.Random(seed)
        self._model = model
        self._tokenizer = tokenizer
        self._has_faults = has_faults
        self._stems = [self._tokens(STEM_TOKENS) for _ in range(NUM_STEMS)]
        self.cases = [self._greedy() if i % 2 == 0 else self._sampled() for i in range(num_cases)]

    def requests(self, count: int) -> list[Request]:
        """Draw so many requests, once all cases are known."""
        self.cases = [case for case in self.cases if case.num_known > 0]
        return [self._request(is_long=number % TIDE[0] < TIDE[1]) for number in range(count)]

    def alone(self, case: Case, choice: int) -> Request:
        """The request that tells what a choice of a sampled case is."""
        sampling = case.sampling | {"seed": case.sampling["seed"] + choice}
        return Request(
            case=Case(case.prompt, sampling),
            is_native=True,
            manner=Manner.STREAM,
            max_tokens=MAX_TOKENS,
            num_choices=1,
            ignore_eos=True,
            stop=None,
            stop_token_id=None,
            wants_logprobs=False,
            num_events=0,
            patience_s=0,
        )

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(HARMLESS, k=count)

    def _prompt(self) -> list[int]:
        stem = self._random.choice(self._stems)[: self._random.choice([0, 7, 16, 33, STEM_TOKENS, STEM_TOKENS])]
        last = 1 + ord(self._random.choice(ascii_letters))  # a whole character, whatever comes before
        return [*stem, *self._tokens(self._random.randrange(MAX_TAIL_TOKENS)), last]

    def _greedy(self) -> Case:
        case = Case(self._prompt(), {"temperature": 0})
        if self._has_faults and self._random.random() < FAULT_SHARE:
            fault, code = self._random.choice([*FAULTS.items()])
            case.prompt.insert(self._random.randrange(len(case.prompt) + 1), fault)
            tokens: list[int] = []
            errors: list[str | None] = [code]
        else:
            tokens, case.logprobs = generate(self._model, case.prompt, MAX_TOKENS)
            errors = [None]
        case.full, case.errors = [tokens] * MAX_CHOICES, errors * MAX_CHOICES
        return case

    def _sampled(self) -> Case:
        sampling = self._random.choice(SAMPLING) | {"seed": self._random.randrange(2**32)}
        faults = [BLOCK_TOKEN_ID] if self._has_faults else FAULT_TOKEN_IDS  # which no text meets
        return Case(self._prompt(), sampling | {"logit_bias": {str(token_id): -100 for token_id in faults}})

    def _request(self, *, is_long: bool) -> Request:
        draw = self._random
        case = draw.choice(self.cases)
        longest = min(case.num_known, MAX_TOKENS if is_long else SHORT_TOKENS)
        full = draw.choice(case.full)
        return Request(
            case=case,
            is_native=draw.random() < 0.6,
            manner=draw.choices([*Manner], [35, 35, 15, 15])[0],
            max_tokens=longest if is_long else draw.randint(1, longest),
            num_choices=MAX_CHOICES if draw.random() < 0.2 else 1,
            ignore_eos=draw.random() < 0.5,
            stop=self._stop(full) if draw.random() < 0.2 else None,
            stop_token_id=draw.choice(full) if full and draw.random() < 0.1 else None,
            wants_logprobs=draw.random() < 0.2,
            num_events=draw.randint(1, 8),
            patience_s=draw.uniform(0, 0.3),
        )

    def _stop(self, full: list[int]) -> str | None:
        """Some characters of a text, of one or two tokens."""
        beginning = self._random.randrange(max(len(full), 1))
        text = self._tokenizer.decode(full[beginning : beginning + 2])[:3]
        return text if text.isascii() and text else None
