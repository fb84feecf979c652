"""How much of the service one client may use: requests in a time, and requests at once."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.errors import TooManyRequests

MAX_RATE = 100_000
"""Requests of one window at most: each is remembered until it leaves the window."""


def parse_rates(text: str) -> list[RateLimitItem]:
    """Rates such as `60/minute` or `5/second; 1000/day`.

    Raises:
        ValueError: another form, no request, or more than `MAX_RATE`.
    """
    rates = parse_many(text)
    if not all(1 <= rate.amount <= MAX_RATE for rate in rates):
        raise ValueError(f"must allow 1 to {MAX_RATE} requests in each window")
    return rates


class _Windows(MemoryStorage):
    """Moving windows on the monotonic clock, which a change of the date cannot close for a day.

    The times of the last requests of each client and rate, as many as the rate allows: clients are those
    with a key, so that memory is bounded. There is nothing to expire, and no thread that would.
    """

    STORAGE_SCHEME = ["monotonic"]  # noqa: RUF012 - as the library declares it

    def __init__(self) -> None:
        super().__init__()
        self._times: dict[str, deque[float]] = {}

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Remember a request, if the window has room."""
        _, num_entries = self.get_moving_window(key, limit, expiry)
        if num_entries + amount > limit:
            return False
        self._times.setdefault(key, deque(maxlen=limit)).extend([time.monotonic()] * amount)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When its oldest request came, and how many there are."""
        now = time.monotonic()
        times = self._times.get(key, deque())
        while times and times[0] <= now - expiry:
            times.popleft()
        return (times[0] if times else now), len(times)


class ClientLimits:
    """Counts the requests of each client; used on the event loop only.

    Windows move: in no stretch of time are more requests taken than the rate says, where windows that stand
    fixed let twice as many pass around their border. A refused request counts for nothing.

    Args:
        rates: all of them hold, for each client by itself.
        max_concurrent: requests of a client that are answered at the same time; None is any number.
    """

    def __init__(self, rates: Sequence[RateLimitItem] = (), *, max_concurrent: int | None = None) -> None:
        self._rates = tuple(rates)
        self._max_concurrent = max_concurrent
        self._windows = MovingWindowRateLimiter(_Windows())
        self._num_open: Counter[str] = Counter()

    @contextmanager
    def hold(self, client: str) -> Iterator[None]:
        """Take a request of a client, until it is answered.

        Raises:
            TooManyRequests: the client must wait.
        """
        self._check(client)
        for rate in self._rates:
            self._windows.hit(rate, client)
        self._num_open[client] += 1
        try:
            yield
        finally:
            self._num_open[client] -= 1

    def _check(self, client: str) -> None:
        if self._max_concurrent is not None and self._num_open[client] >= self._max_concurrent:
            raise TooManyRequests(
                f"{self._num_open[client]} requests of this client are being answered, its limit; "
                "wait for one of them to end",
                reason="concurrency_limit",
                retry_after_s=1,
            )
        full = [rate for rate in self._rates if not self._windows.test(rate, client)]
        if full:
            free_at = max(self._windows.get_window_stats(rate, client).reset_time for rate in full)
            raise TooManyRequests(
                f"{full[0].amount} requests of this client came in {full[0].get_expiry()} s, its limit; "
                "retry after the seconds that Retry-After names",
                reason="rate_limit",
                retry_after_s=max(1, math.ceil(free_at - time.monotonic())),
            )
