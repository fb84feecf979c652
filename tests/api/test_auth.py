"""API keys: which requests they open, what becomes of others, and which keys are none."""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from service.access import read_access
from service.api.auth import MAX_KEYS, KeyRing, parse_keys
from service.errors import SettingError, Unauthorized
from service.settings import Settings
from tests.api.conftest import MAX_BODY_BYTES
from tests.api.support import RunningService, assert_error, run_service
from tests.models import write_checkpoint

ALICE, BOB, SCRAPER = "a1B2c3D4e5F6g7H8", "bob-0123456789abcdef", "scraper-0123456789"
ROUTES = {
    # method and path: whether a client needs a key
    ("POST", "/v1/completions"): True,
    ("POST", "/v1/chat/completions"): True,
    ("POST", "/generate"): True,
    ("POST", "/tokenize"): True,
    ("POST", "/detokenize"): True,
    ("GET", "/v1/models"): True,
    ("GET", "/v1/models/{model_id}"): True,
    ("GET", "/v1/quantization"): True,
    ("GET", "/livez"): False,
    ("GET", "/readyz"): False,
    ("GET", "/version"): False,
}
GUARDED = [route for route, needs_key in ROUTES.items() if needs_key]
WRONG: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "empty": [("Authorization", "")],
    "scheme only": [("Authorization", "Bearer")],
    "another": [("Authorization", f"Bearer {ALICE}x")],
    "a part": [("Authorization", f"Bearer {ALICE[:-1]}")],
    "another case": [("Authorization", f"Bearer {ALICE.lower()}")],
    "basic": [("Authorization", f"Basic {ALICE}")],
    "bare": [("Authorization", ALICE)],
    "two": [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {ALICE}")],
    "two in one": [("Authorization", f"Bearer {ALICE}, Bearer {ALICE}")],
    "not ASCII": [("Authorization", "Bearer \xe9\xff")],
    "long": [("Authorization", "Bearer " + "a" * 10_000)],
    "name": [("Authorization", f"Bearer alice:{ALICE}")],
    "of the metrics": [("Authorization", f"Bearer {SCRAPER}")],
    "cookie": [("Cookie", f"api_key={ALICE}")],
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service with two keys and one for its metrics."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# the team\nalice:{ALICE}\n\n  {BOB}  \n", encoding="utf-8")
    (folder / "metrics").write_text(SCRAPER, encoding="utf-8")
    settings = {
        "model": str(write_checkpoint("llama", folder / "tiny")),
        "quantize": "none",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "kv_memory": 2**24,
        "max_body_bytes": MAX_BODY_BYTES,
        "api_keys_file": str(folder / "keys"),
        "metrics_key_file": str(folder / "metrics"),
    }
    with run_service(settings) as service:
        yield service


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _send(guarded: RunningService, method: str, path: str, headers: Any) -> httpx.Response:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return guarded.client.request(method, path, headers=raw, json={"prompt": "The sea", "max_tokens": 1})


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
def test_a_route_that_does_work_is_closed_without_a_key(
    guarded: RunningService, route: tuple[str, str], headers: list[tuple[str, str]]
) -> None:
    response = _send(guarded, *route, headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="pennyweight"'
    assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
    assert ALICE not in response.text


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "OPTIONS", "BREW"])
@pytest.mark.parametrize("path", [path for _, path in GUARDED])
def test_no_method_tells_more_without_a_key(guarded: RunningService, method: str, path: str) -> None:
    assert guarded.client.request(method, path).status_code == 401


@pytest.mark.parametrize("route", [route for route in ROUTES if route not in GUARDED], ids=" ".join)
def test_a_probe_is_open(guarded: RunningService, route: tuple[str, str]) -> None:
    assert guarded.client.request(*route).status_code == 200


def test_every_route_is_known_to_be_open_or_closed(guarded: RunningService) -> None:
    paths = guarded.client.get("/openapi.json").json()["paths"]
    listed = {(method.upper(), path): "security" in o for path, found in paths.items() for method, o in found.items()}
    assert listed == ROUTES | {("GET", "/metrics"): True}  # with a key of its own


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {ALICE}")],
        [("authorization", f"bearer {ALICE}")],
        [("AUTHORIZATION", f"BEARER  {BOB}")],
        [("X-API-Key", BOB)],
        [("Authorization", "Basic abc"), ("X-API-Key", ALICE)],
    ],
    ids=["bearer", "lower case", "upper case", "header of its own", "beside another scheme"],
)
def test_a_key_opens_every_route(guarded: RunningService, headers: list[tuple[str, str]]) -> None:
    assert _send(guarded, "POST", "/v1/completions", headers).status_code == 200
    assert _send(guarded, "GET", "/v1/models", headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/v1/models", "a/?x="),
        ("/v1/models", "localhost/livez"),
        ("//v1/models", "localhost"),
        ("/livez/../v1/models", "localhost"),
        ("/v1/models;/livez", "localhost"),
        ("/%76%31/models", "localhost"),
        ("/v1%2fmodels", "localhost"),
        ("http://localhost/v1/models", "localhost"),
        ("/v1/models?/livez", "localhost"),
        ("@evil.com/v1/models", "localhost"),
        ("/V1/models", "localhost"),
        ("/v1/models/", "localhost"),
    ],
)
def test_no_spelling_of_a_path_goes_round_the_keys(guarded: RunningService, path: str, host: str) -> None:
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as peer:
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"401", b"404", b"307"), answer
    assert b'"owned_by"' not in answer


def test_a_wrong_key_is_told_before_anything_else_is_looked_at(guarded: RunningService) -> None:
    body = "{" * (2 * MAX_BODY_BYTES)
    response = guarded.client.post("/v1/completions", content=body, headers=_bearer("x" * 20))
    assert_error(response, 401, param=None, code="invalid_api_key", message="none of this service's")
    assert guarded.client.post("/v1/completions", content=body, headers=_bearer(ALICE)).status_code == 413


def test_a_body_is_not_waited_for_without_a_key(guarded: RunningService) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50000"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as peer:
        peer.sendall(f"{head}\r\n\r\n".encode())  # and nothing of it
        assert peer.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_metrics_have_a_key_of_their_own(guarded: RunningService) -> None:
    assert guarded.client.get("/metrics", headers=_bearer(SCRAPER)).status_code == 200
    for key in (ALICE, "x" * 20):
        response = guarded.client.get("/metrics", headers=_bearer(key))
        assert_error(response, 401, param=None, code="invalid_api_key", message="none of this service's")
    assert guarded.client.get("/metrics").status_code == 401


def _hit_tokens(guarded: RunningService) -> float:
    text = guarded.client.get("/metrics", headers=_bearer(SCRAPER)).text
    lines = [line for line in text.splitlines() if line.startswith("pennyweight_prefix_cache_hit_tokens_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_clients_find_their_own_prompts_in_the_cache_and_not_those_of_others(guarded: RunningService) -> None:
    request = {"prompt": list(range(5, 69)), "max_tokens": 1, "temperature": 0}
    hits = []
    for key in (ALICE, BOB, BOB, ALICE):
        before = _hit_tokens(guarded)
        assert guarded.client.post("/v1/completions", json=request, headers=_bearer(key)).status_code == 200
        hits.append(_hit_tokens(guarded) - before)
    assert hits[:2] == [0, 0]
    assert hits[2] == hits[3] > 0


def test_a_ring_without_keys_asks_for_none() -> None:
    ring = KeyRing()
    assert not ring
    assert ring.identify(Headers()) is None
    assert ring.identify(Headers({"Authorization": "Bearer anything"})) is None


def test_keys_have_the_name_that_they_were_given_or_their_number() -> None:
    ring = parse_keys([f"alice:{ALICE}", BOB], "keys")
    assert ring.identify(Headers(_bearer(ALICE))) == "alice"
    assert ring.identify(Headers(_bearer(BOB))) == "key-2"
    with pytest.raises(Unauthorized, match="none of this service's"):
        ring.identify(Headers(_bearer(SCRAPER)))


BAD_KEYS = {
    "none": ([], "0 keys; there must be 1 to 1024"),
    "empty": ([""], "key 1: 0 characters; it must have 16 to 256"),
    "no key": (["alice:"], "key 1: 0 characters"),
    "short": ([ALICE, "a1b2c3d4e5f6g7h"], "key 2: 15 characters"),
    "long": (["a1b2c3d4" * 32 + "e"], "key 1: 257 characters"),
    "blank": (["a1b2c3d4 e5f6g7h8"], "printable ASCII"),
    "not ASCII": (["a1b2c3d4e5f6g7hé"], "printable ASCII"),
    "weak": (["abcdeabcdeabcdeabcde"], "key 1: 5 different characters; it must have 6"),
    "twice": ([ALICE, f"bob:{ALICE}"], "key 2: the same key as an earlier one"),
    "name twice": ([f"bob:{ALICE}", f"bob:{BOB}"], "key 2: the same name bob"),
    "name of a number": ([f"key-2:{ALICE}", BOB], "key 2: the same name key-2"),
    "bad name": ([f"al ice:{ALICE}"], "key 1: its name must be"),
    "too many": ([f"{number:04d}-{ALICE}" for number in range(MAX_KEYS + 1)], "1025 keys"),
}


@pytest.mark.parametrize(("words", "message"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_a_weak_key_is_refused_and_not_shown(words: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        parse_keys(words, "keys")
    assert not any(len(word) > 8 and word.rpartition(":")[2] in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("words", "num_keys"), [(["abcdef" * 2 + "abcd"], 1), (["a1b2c3d4" * 32], 1)], ids=["shortest", "longest"]
)
def test_a_key_at_the_bounds_is_taken(words: list[str], num_keys: int) -> None:
    assert parse_keys(words, "keys").identify(Headers(_bearer(words[0]))) == f"key-{num_keys}"


def test_the_variable_holds_keys_with_commas_between_them() -> None:
    access = read_access(Settings(), {"PENNYWEIGHT_API_KEYS": f"alice:{ALICE}, {BOB}"})
    assert access.keys.identify(Headers({"X-API-Key": BOB})) == "key-2"


def _settings(**changes: Any) -> Settings:
    return Settings.model_validate(changes)


def test_what_is_wrong_with_keys_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(ALICE, encoding="utf-8")
    variables = {"PENNYWEIGHT_API_KEYS": BOB}
    with pytest.raises(SettingError, match=r"--api-keys-file .* and PENNYWEIGHT_API_KEYS: keys in two places"):
        read_access(_settings(api_keys_file=path), variables)
    with pytest.raises(SettingError, match="PENNYWEIGHT_API_KEYS: key 1: 0 characters"):
        read_access(_settings(), {"PENNYWEIGHT_API_KEYS": ""})
    with pytest.raises(SettingError, match=r"--api-keys-file .*nowhere: cannot be read .No such file"):
        read_access(_settings(api_keys_file=tmp_path / "nowhere"), {})
    path.write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(SettingError, match=r"--api-keys-file .*keys: 0 keys"):
        read_access(_settings(api_keys_file=path), {})
    path.write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(SettingError, match="more than 1048576 bytes"):
        read_access(_settings(metrics_key_file=path), {})


def test_keys_are_compared_by_digest_in_constant_time() -> None:
    path = Path(__file__).parents[2] / "service" / "api" / "auth.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (identify,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "identify"]
    calls = [ast.unparse(node.func) for node in ast.walk(identify) if isinstance(node, ast.Call)]
    assert calls.count("hmac.compare_digest") == 1
    compared = [ast.unparse(node) for node in ast.walk(identify) if isinstance(node, ast.Compare)]
    assert compared == ["len(given) != 1"]


def test_a_client_is_named_in_the_log_and_its_key_is_not(
    guarded: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "service"):
        _send(guarded, "POST", "/v1/completions", [("Authorization", f"Bearer {ALICE}")])
        _send(guarded, "POST", "/v1/completions", [("Authorization", f"Bearer {ALICE}x")])
    assert any("client alice" in message for message in caplog.messages)
    assert ALICE not in json.dumps([record.__dict__ for record in caplog.records], default=str)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.5", "LOCALHOST."]
)
def test_a_loopback_service_without_keys_answers_for_this_machine(running: RunningService, host: str) -> None:
    assert running.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "a/?x="])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
def test_a_loopback_service_without_keys_is_not_used_under_another_name(
    running: RunningService, host: str, path: str
) -> None:
    response = running.client.get(path, headers={"Host": host})
    assert_error(response, 421, param=None, code="wrong_host", message="listens to this machine")


def test_a_key_or_another_address_makes_names_free(guarded: RunningService) -> None:
    headers = _bearer(ALICE) | {"Host": "api.example"}
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    assert read_access(_settings(host="0.0.0.0"), {}).own_host is None
    assert read_access(_settings(host="localhost"), {}).own_host == "localhost"
