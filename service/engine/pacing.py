"""How many prompt tokens a step may hold, so that sequences that decode wait no longer than they should. No torch."""

from __future__ import annotations

from typing import NamedTuple

from service.engine.stats import StepStats

_WEIGHT = 0.2
"""Of a new sample in an average; the first ones weigh more."""
_MOST_TIMES_AVERAGE = 2.0
"""A step can be slowed down by anything on the machine, so a longer sample counts as this many times the average."""
_LEAST_SHARE = 0.1
"""Of a step's time is put down to its prompt tokens, even if decodes alone took as long before."""

STEP_LIMIT_FACTOR = 10
"""A step that takes so many times as long as the longest one should is stuck: memory that swaps, machines that are
shared and tokens far back in a long context are slower than the average, each by two or three times."""


class StepSize(NamedTuple):
    """What a step may hold at most: prompt tokens, and how many times the decodes of a measured one."""

    num_prompt_tokens: int
    num_rounds: int


class StepPacer:
    """Predicts `seconds = decode step + prompt tokens * seconds per prompt token` from the steps so far.

    The budget is for the prompts alone: of a budget for the whole step a slow model's decodes would leave them
    nothing, and a prompt would take many times as long as alone. So both halves wait for each other, no more.

    Args:
        budget_s: by how much prompts should prolong a step that decodes, at most.
        least_tokens: prompt tokens that a step may hold in any case, so that prompts get on.
    """

    def __init__(self, budget_s: float, *, least_tokens: int) -> None:
        self._budget_s = budget_s
        self._least_tokens = least_tokens
        self._decode_s = _Average()
        self._token_s = _Average()
        self._assumed_token_s = 0.0

    def observe(self, stats: StepStats) -> None:
        """Learn from a step; one with very few prompt tokens tells little about what each of them takes."""
        if stats.kind == "decode":
            self._decode_s.add(stats.seconds)
        elif self._token_s.value is None or stats.num_prompt_tokens >= self._least_tokens:
            seconds = max(stats.seconds - (self._decode_s.value or 0.0), _LEAST_SHARE * stats.seconds)
            self._token_s.add(seconds / stats.num_prompt_tokens)

    def most_prompt_tokens(self) -> int | None:
        """Prompt tokens of a step that also decodes; None while nothing is known."""
        if not self._token_s.value:
            return None
        return max(self._least_tokens, int(self._budget_s / self._token_s.value))

    def assume(self, token_s: float) -> None:
        """Take so long for a prompt token in `longest_s`, until a step has shown it."""
        self._assumed_token_s = token_s

    def longest_s(self, size: StepSize) -> float:
        """Seconds that the longest step takes at the speed of the steps so far."""
        token_s = self._token_s.value or self._assumed_token_s
        return size.num_prompt_tokens * token_s + size.num_rounds * (self._decode_s.value or 0.0)


class _Average:
    """An exponential average that a single long sample hardly moves."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._num_samples = 0

    def add(self, sample: float) -> None:
        self._num_samples += 1
        if not self.value:
            self.value = sample
            return
        weight = max(_WEIGHT, 1 / self._num_samples)
        self.value += weight * (min(sample, _MOST_TIMES_AVERAGE * self.value) - self.value)
