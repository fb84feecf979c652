"""Bad inputs by the thousand: each is refused or answered, and after each one a known text is still the same."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

import service
from tests.api.support import RunningService
from tests.reliability.catalogue import KINDS, Case, cases, names
from tests.reliability.conftest import KEY
from tests.reliability.wire import Answer, Peer, request

pytestmark = pytest.mark.reliability

SEED, NIGHTLY_SEED = 6, 1122
NUM_CASES, NUM_NIGHTLY_CASES = 1500, 40_000
MAX_ERROR_BYTES = 4096
MAX_GROWTH_BYTES = 64 * 2**20
"""Of the process, over all cases: caches have their caps, and what they may hold fits in here several times."""
CANARY = request(
    "POST",
    "/generate",
    json.dumps({"prompt": "The sea", "max_tokens": 4, "temperature": 0, "ignore_eos": True}),
    {"X-Request-ID": "same"},
    key=KEY,
)
OURS = [str(Path(service.__file__).parent), sys.prefix, "site-packages", "Traceback (most recent", '.py"', KEY]
"""What an error says nothing of."""
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


class Watch:
    """Sees whom this process connects to and which files it opens; an audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self._port = 0
        self._is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def start(self, port: int) -> None:
        """From now on."""
        self._port, self._is_on = port, True
        self.seen.clear()

    def stop(self) -> list[str]:
        """What should not have happened."""
        self._is_on = False
        return self.seen

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "socket.connect" and arguments[1] != ("127.0.0.1", self._port):
            self.seen.append(f"connects to {arguments[1]}")
        elif event in ("socket.getaddrinfo", "subprocess.Popen") and arguments[0] not in ("127.0.0.1", sys.executable):
            self.seen.append(f"{event} {arguments[0]}")
        elif event == "open" and any(word in str(arguments[0]) for word in ("passwd", "win.ini", "meta-data", ".png")):
            self.seen.append(f"opens {arguments[0]}")


WATCH = Watch()


@pytest.fixture
def peers(keyed: RunningService) -> Iterator[tuple[Peer, Peer]]:
    """One for the canary, one for what is bad."""
    with Peer(keyed.port) as good, Peer(keyed.port) as bad:
        yield good, bad


def tokens_of(answer: Answer | None) -> list[int]:
    assert answer is not None
    assert answer.status == 200, answer
    ids: list[int] = json.loads(answer.body)["token_ids"]
    return ids


def is_clean_error(answer: Answer) -> None:
    """An envelope that tells nothing of the inside of the service."""
    text = answer.body.decode("ascii")
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.body) <= MAX_ERROR_BYTES
    assert not any(word in text for word in OURS)
    assert not ADDRESS.search(error["message"])
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])


def check(case: Case, answer: Answer | None) -> None:
    if answer is None:
        assert not case.statuses, "the connection was closed"
        return
    if case.statuses:
        assert answer.status in case.statuses, answer
    assert answer.status < 500 or answer.status == 501, answer
    if answer.status >= 400 and case.method != "HEAD" and answer.body:
        is_clean_error(answer)
    if case.verify is not None:
        case.verify(answer)


def try_case(case: Case, good: Peer, bad: Peer) -> tuple[Answer | None, list[int]]:
    """The answer to what is bad, and the canary's tokens beside or after it."""
    if case.is_beside:
        good.send(CANARY)
        answer = bad.ask(case.request, case.method)
        return answer, tokens_of(good.receive("POST"))
    if case.is_raw:
        bad.close()
        bad.send(case.request)
        bad.end()
        answer = bad.receive()
        bad.close()
    else:
        answer = bad.ask(case.request, case.method)
    return answer, tokens_of(good.ask(CANARY, "POST"))


def run(keyed: RunningService, peers: tuple[Peer, Peer], *, seed: int, number: int) -> Counter[str]:
    """Try cases; how many answers there were of each kind and status."""
    good, bad = peers
    canary = tokens_of(good.ask(CANARY, "POST"))
    told: Counter[str] = Counter()
    process = psutil.Process()
    before = None
    for index, (name, case) in enumerate(cases(seed, number)):
        if index == number // 10:  # by now everything has been used once
            before = process.memory_info().rss
        WATCH.start(keyed.port)
        try:
            answer, tokens = try_case(case, good, bad)
            assert not WATCH.stop()
            check(case, answer)
            assert tokens == canary
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{name}: {case.label}: {error}") from error
        finally:
            WATCH.stop()
        told[f"{name.partition(' ')[0]} {'closed' if answer is None else answer.status}"] += 1
    assert before is not None
    assert process.memory_info().rss - before < MAX_GROWTH_BYTES
    return told


def series(keyed: RunningService) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """All series that a scrape has."""
    families = text_string_to_metric_families(keyed.client.get("/metrics").text)
    return {(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples}


def check_series(keyed: RunningService, routes: set[str]) -> None:
    """The labels that requests could choose have values of a closed set."""
    for name, labels in series(keyed):
        if name == "pennyweight_requests_total":
            told = dict(labels)
            assert told["route"] in routes
            assert re.fullmatch(r"[1-5][0-9]{2}", told["status"])


@pytest.mark.parametrize(
    ("seed", "number"),
    [(SEED, NUM_CASES), pytest.param(NIGHTLY_SEED, NUM_NIGHTLY_CASES, marks=pytest.mark.nightly)],
    ids=["sample", "whole"],
)
def test_no_bad_input_changes_what_a_good_one_gets(
    keyed: RunningService, peers: tuple[Peer, Peer], seed: int, number: int
) -> None:
    told = run(keyed, peers, seed=seed, number=number)
    assert told.total() == number
    assert {kind.partition(" ")[0] for kind in KINDS} == {name.partition(" ")[0] for name in told}
    num_refused = sum(count for name, count in told.items() if not name.endswith(" 200"))
    assert num_refused > number / 2
    shown = keyed.client.get("/openapi.json").json()["paths"]
    known = {path.replace("{model_id}", "{model_id:path}") for path in shown}
    known |= {"/openapi.json", "/", "/web/page.json", "/web/{name}", "unknown"}
    check_series(keyed, known)
    assert keyed.metric("requests_running") == 0
    assert keyed.metric("kv_utilization_ratio") == 0


def test_names_that_never_come_twice_add_no_series(keyed: RunningService, peers: tuple[Peer, Peer]) -> None:

    _, bad = peers

    def send(seed: int) -> None:
        for index in range(60):
            case = names(random.Random(f"{seed}/{index}"))
            check(case, bad.ask(case.request, case.method))

    send(1)
    before = series(keyed)
    send(2)
    assert series(keyed) == before


def test_a_seed_repeats_its_cases() -> None:
    assert [case.request for _, case in cases(3, 200)] == [case.request for _, case in cases(3, 200)]
    assert [case.request for _, case in cases(3, 200)] != [case.request for _, case in cases(4, 200)]
