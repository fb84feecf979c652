"""How much one client may use: rates that no moment of a window can exceed, and requests at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.access import read_access
from service.api.limits import MAX_RATE, ClientLimits, parse_rates
from service.errors import SettingError, TooManyRequests
from service.invocation import read_invocation
from service.settings import Settings
from tests.api.conftest import SETTINGS
from tests.api.support import RunningService, assert_error, eventually, run_service, write_faulty_checkpoint
from tests.conftest import Gate
from tests.models import BLOCK_TOKEN_ID

ALICE, BOB = "alice-0123456789abc", "bob-0123456789abcde"
HEADERS = {name: {"Authorization": f"Bearer {key}"} for name, key in (("alice", ALICE), ("bob", BOB))}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only item is the monotonic time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def _take(limits: ClientLimits, client: str = "a") -> None:
    with limits.hold(client):
        pass


def test_no_stretch_of_a_window_holds_more_than_the_rate(clock: list[float]) -> None:
    limits = ClientLimits(parse_rates("3/minute"))
    taken = []
    for second in range(300):
        clock[0] = 1000.0 + second
        try:
            _take(limits)
        except TooManyRequests:
            continue
        taken.append(second)
    assert taken == [minute * 60 + i for minute in range(5) for i in range(3)]


def test_retry_after_is_when_the_next_request_is_taken(clock: list[float]) -> None:
    limits = ClientLimits(parse_rates("2/minute"))
    _take(limits)
    clock[0] += 12.5
    _take(limits)
    with pytest.raises(TooManyRequests, match="2 requests of this client came in 60 s") as caught:
        _take(limits)
    assert caught.value.retry_after_s == 48  # of 47.5
    clock[0] += 47.4
    with pytest.raises(TooManyRequests) as caught:
        _take(limits)
    assert caught.value.retry_after_s == 1
    clock[0] += 0.2
    _take(limits)


def test_all_rates_hold_and_a_refused_request_counts_for_none(clock: list[float]) -> None:
    limits = ClientLimits(parse_rates("1/second; 3/minute"))
    taken = 0
    for tick in range(600):
        clock[0] = 1000.0 + tick / 10
        try:
            _take(limits)
        except TooManyRequests:
            continue
        taken += 1
    assert taken == 3
    with pytest.raises(TooManyRequests) as caught:
        _take(limits)
    assert caught.value.retry_after_s == 1


def test_clients_do_not_share_a_rate(clock: list[float]) -> None:
    limits = ClientLimits(parse_rates("1/hour"))
    _take(limits, "a")
    _take(limits, "b")
    for client in "ab":
        with pytest.raises(TooManyRequests):
            _take(limits, client)


def test_a_change_of_the_date_moves_no_window(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ClientLimits(parse_rates("1/minute"))
    _take(limits)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    clock[0] += 60.1
    _take(limits)


def test_requests_at_once_are_bounded_for_each_client() -> None:
    limits = ClientLimits(max_concurrent=2)
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(limits.hold("a"))
        with pytest.raises(TooManyRequests, match="2 requests of this client are being answered") as caught:
            held.enter_context(limits.hold("a"))
        assert (caught.value.code, caught.value.retry_after_s) == ("concurrency_limit_exceeded", 1)
        held.enter_context(limits.hold("b"))
    _take(limits)


def test_a_request_that_fails_gives_its_place_back() -> None:
    limits = ClientLimits(max_concurrent=1)
    with pytest.raises(RuntimeError), limits.hold("a"):
        raise RuntimeError
    _take(limits)


def test_without_limits_nothing_is_refused() -> None:
    limits = ClientLimits()
    with ExitStack() as held:
        for _ in range(1000):
            held.enter_context(limits.hold("a"))


@pytest.mark.parametrize(
    "text", ["1/second", "60/minute", "5/second;1000/day", "10 per hour", "1/2 minutes", f"{MAX_RATE}/day"]
)
def test_a_rate_is_a_number_and_a_time(text: str) -> None:
    assert Settings.model_validate({"rate_limit": text}).rate_limit == text
    assert parse_rates(text)


@pytest.mark.parametrize("text", ["", "60", "minute", "0/minute", "-1/minute", "1.5/minute", "1/moment", "100001/day"])
def test_another_rate_is_refused_with_the_rule(text: str) -> None:
    with pytest.raises(SettingError, match=r"--rate-limit .*must (be rates of 1 to 100000|have at least 1 character)"):
        read_invocation([f"--rate-limit={text}"], {})


def test_limits_come_from_the_settings() -> None:
    limits = read_access(Settings(rate_limit="1/hour", max_concurrent_requests=1), {}).limits
    _take(limits)
    with pytest.raises(TooManyRequests):
        _take(limits)


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service for two clients, each with eight requests in an hour and one at a time."""
    folder = tmp_path_factory.mktemp("limited")
    (folder / "keys").write_text(f"alice:{ALICE}\nbob:{BOB}\n", encoding="utf-8")
    model = write_faulty_checkpoint(folder / "tiny")
    limits = {"rate_limit": "8/hour", "max_concurrent_requests": 1, "api_keys_file": str(folder / "keys")}
    with run_service(SETTINGS | limits | {"model": str(model)}) as service:
        yield service


def test_a_client_over_its_rate_is_told_when_to_come_back(limited: RunningService) -> None:
    for _ in range(8):
        assert limited.client.get("/v1/models", headers=HEADERS["alice"]).status_code == 200
    before = limited.metric("requests_rejected_total", reason="rate_limit")
    response = limited.client.post("/v1/completions", json={"prompt": "a"}, headers=HEADERS["alice"])
    assert_error(
        response, 429, param=None, code="rate_limit_exceeded", message="8 requests of this client came in 3600"
    )
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert 3500 < int(response.headers["retry-after"]) <= 3600
    assert limited.metric("requests_rejected_total", reason="rate_limit") == before + 1
    assert limited.client.get("/v1/models", headers=HEADERS["bob"]).status_code == 200
    assert limited.client.get("/livez").status_code == 200


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_second_request_at_once_is_refused_until_the_first_is_answered(
    limited: RunningService, gate: Gate, stream: bool
) -> None:
    body = {"prompt": [BLOCK_TOKEN_ID], "max_tokens": 1, "stream": stream}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(limited.client.post, "/v1/completions", json=body, headers=HEADERS["bob"])
        assert gate.reached.wait(60)
        response = limited.client.get("/v1/models", headers=HEADERS["bob"])
        message = "1 requests of this client are being answered"
        assert_error(response, 429, param=None, code="concurrency_limit_exceeded", message=message)
        assert response.headers["retry-after"] == "1"
        gate.opened.set()
        assert first.result().status_code == 200
    assert eventually(lambda: limited.client.get("/v1/models", headers=HEADERS["bob"]).status_code == 200)


def test_without_keys_all_clients_count_as_one(tmp_path: Path) -> None:
    with run_service(
        SETTINGS | {"model": str(write_faulty_checkpoint(tmp_path / "tiny")), "rate_limit": "2/day"}
    ) as one:
        statuses = [one.client.get("/v1/models", headers={"X-API-Key": str(i)}).status_code for i in range(3)]
    assert statuses == [200, 200, 429]
