"""Bad inputs by kind: each function makes one case from the numbers that it is given, so that a seed repeats it.

The kinds are those of the reliability catalogue in `docs/reliability.md` that arrive over HTTP.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.reliability.conftest import KEY
from tests.reliability.fields import ROUTES, Place, all_places
from tests.reliability.values import (
    FORMS,
    HOSTS,
    KEYS,
    LITERALS,
    METHODS,
    MIXED,
    RAW,
    SCRIPTS,
    TARGETS,
    TEXTS,
)
from tests.reliability.wire import Answer, request

REFUSED = frozenset({400, 404, 413})
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PUBLIC = ("/livez", "/readyz", "/version", "/metrics", "/openapi.json", "/", "/web/page.json")
"""Routes that need no key."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One bad input.

    Attributes:
        request: bytes to send.
        statuses: of the answer, any of these; an empty set if the service may also close the connection.
        is_raw: on a connection of its own, that is half-closed behind it.
        is_beside: sent while the canary is being computed.
        verify: looks at an answer, beyond what holds for all of them.
    """

    label: str
    request: bytes
    statuses: frozenset[int] = REFUSED | {200}
    method: str = "POST"
    is_raw: bool = False
    is_beside: bool = False
    verify: Callable[[Answer], None] | None = None


Maker = Callable[[random.Random], Case]


@cache
def _places() -> tuple[Place, ...]:
    return tuple(all_places())


def _post(route: str, body: Any, **headers: str) -> bytes:
    text = body if isinstance(body, str) else json.dumps(body)
    return request("POST", route, text, headers, key=KEY)


def bounds(random: random.Random) -> Case:
    """S1: any value at any place of any request."""
    place, literal = random.choice(_places()), random.choice(LITERALS)
    body = json.dumps(place.body("\x01")).replace('"\\u0001"', literal)
    return Case(label=f"{place} = {literal[:40]}", request=_post(place.route, body))


def mixtures(random: random.Random) -> Case:
    """S2: several sampling fields at once."""
    route = random.choice((COMPLETIONS, CHAT, "/generate"))
    fields = {name: random.choice(MIXED[name]) for name in random.sample(sorted(MIXED), random.randint(2, 9))}
    body = ROUTES[route][1] | fields
    return Case(label=f"{route} {fields}"[:300], request=_post(route, body), verify=_obeys(body))


def _obeys(body: dict[str, Any]) -> Callable[[Answer], None]:
    def verify(answer: Answer) -> None:
        if answer.status != 200 or body.get("stream"):
            return
        told = json.loads(answer.body)
        choices = told.get("choices") or told.get("results") or [told]
        num_tokens = told["usage"]["completion_tokens"] if "usage" in told else len(choices[0]["token_ids"])
        assert len(choices) == (body.get("n") or 1)
        assert num_tokens <= len(choices) * (32 if body.get("max_tokens") is None else body["max_tokens"])

    return verify


def raw(random: random.Random) -> Case:
    """S3: bytes that are no request, or no usual one."""
    if random.random() < 0.3:
        size = random.choice((1, 10, 100, 5000))
        return Case(label=f"{size} random bytes", request=random.randbytes(size), statuses=frozenset(), is_raw=True)
    name = random.choice(sorted(RAW))
    data = RAW[name]
    if random.random() < 0.3 and data:
        at = random.randrange(len(data))
        data = data[:at] + random.randbytes(random.randint(0, 3)) + data[at + random.randint(0, 2) :]
        name += f", changed at {at}"
    return Case(label=name, request=data, statuses=frozenset(), is_raw=True)


def templates(random: random.Random) -> Case:
    """S4: what reaches for the chat template, or through it."""
    hostile = random.choice(TEXTS[:8]) * random.choice((1, 1, 50))
    if random.random() < 0.4:
        name = random.choice(
            ("chat_template", "chat_template_kwargs", "add_generation_prompt", "documents", "tokenize", "return_dict")
        )
        body = ROUTES[CHAT][1] | {name: random.choice((hostile, {"messages": []}, True, [hostile]))}
        return Case(label=f"{name} in a request", request=_post(CHAT, body), statuses=REFUSED)
    message = {"role": random.choice(("user", "system", "assistant")), "content": hostile}
    if random.random() < 0.3:
        message["name"] = hostile[:256]
    route = random.choice((CHAT, "/tokenize"))
    body = {"messages": [message] * random.choice((1, 2, 30))} | ({"max_tokens": 1} if route == CHAT else {})
    return Case(label=f"{route} {message}"[:200], request=_post(route, body))


def grammars(random: random.Random) -> Case:
    """S5: schemas, expressions and grammars that are wrong, huge, deep or costly."""
    number = random.randrange(10**6)
    depth = random.choice((10, 63, 64, 65, 150, 1000))
    deep: Any = {"type": "integer"}
    for _ in range(min(depth, 190)):
        deep = {"type": "array", "items": deep}
    schemas: tuple[dict[str, Any], ...] = (
        *(deep, {"type": "nonsense"}, {"type": 5}, {"$ref": "#"}, {"$ref": "http://a.example/b"}, {"$ref": "#/a/b"}),
        *({"pattern": "(a+)+$", "type": "string"}, {"type": "string", "maxLength": 10**9}, {"multipleOf": 0}),
        *({"enum": []}, {"const": f"{number}"}, {"properties": {f"p{number}": {"type": "string"}}, "type": "object"}),
        *({"minItems": 10**9, "type": "array"}, {"allOf": [{"type": "string"}, {"type": "integer"}]}, {"not": {}}),
        *({f"x{i}": 0 for i in range(3000)}, {"type": "object", "required": [str(i) for i in range(500)]}),
        {
            "definitions": {"a": {"$ref": "#/definitions/b"}, "b": {"$ref": "#/definitions/a"}},
            "$ref": "#/definitions/a",
        },
    )
    expressions = (
        "(",
        "[",
        "a{1,1000000000}",
        "(a+)+$",
        "(?=a)",
        "\\1",
        "(?P<a>",
        "a" * 5000,
        f"x{number}",
        "(a|aa)*b",
    )
    laws = (
        "start: ",
        "start: start",
        "a: b",
        "start: /(/",
        "%import common.INT",
        f'start: "{number}"',
        "start: " + "a " * 900,
    )
    kind = random.randrange(3)
    if kind == 0:
        schema = random.choice(schemas)
        fields: dict[str, Any] = {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        }
    else:
        fields = {"regex": random.choice(expressions)} if kind == 1 else {"grammar": random.choice(laws)}
    route = random.choice((COMPLETIONS, CHAT, "/generate"))
    return Case(label=f"{route} {fields}"[:200], request=_post(route, ROUTES[route][1] | fields))


_ALL_ROUTES = (*ROUTES, "/v1/models", "/v1/models/talker", "/v1/quantization", "/docs", *PUBLIC)


def routes(random: random.Random) -> Case:
    """S6: every route without a key that is right, in all spellings."""
    route, form = random.choice(_ALL_ROUTES), random.choice(FORMS)
    method, path = random.choice(METHODS), form.format(route)
    headers = random.choice(KEYS) | {"Host": random.choice(HOSTS)}
    body = json.dumps(ROUTES[route][1]) if route in ROUTES and method == "POST" else ""
    statuses = {400, 401, 404, 405, 413, 431}
    is_open = path.partition("?")[0].partition("#")[0] in PUBLIC or form.startswith("http://")
    if route in PUBLIC and (is_open or form.startswith(("http:", "/x", "/."))):
        statuses.add(200)
    return Case(
        label=f"{method} {path} {headers}"[:300],
        request=request(method, path, body, headers),
        statuses=frozenset(statuses),
        method=method,
    )


def targets(random: random.Random) -> Case:
    """S7: addresses and files in every text; the runner watches for connections and opened files."""
    place = random.choice([place for place in _places() if place.schema.get("type", "string") == "string"])
    target = random.choice(TARGETS)
    return Case(label=f"{place} = {target}", request=_post(place.route, place.body(target)))


def neighbours(random: random.Random) -> Case:
    """S8: hostile parameters, beside a request that must not feel them, with its id."""
    case = mixtures(random) if random.random() < 0.7 else grammars(random)
    body = case.request.replace(b"\r\n", b"\r\nX-Request-ID: same\r\n", 1)
    return Case(label=f"beside: {case.label}", request=body, is_beside=True, verify=case.verify)


def texts(random: random.Random) -> Case:
    """S9: texts of all scripts, and texts that look like control tokens."""
    if random.random() < 0.3:
        text = random.choice(TEXTS)
    else:
        first = random.choice(SCRIPTS)
        text = "".join(chr(first + random.randrange(64)) for _ in range(random.choice((1, 4, 12))))
        text = text.encode("utf-8", "replace").decode()
    kind = random.randrange(3)
    if kind == 0:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "return_token_strs": True}
        return Case(label=f"/tokenize {text!r}", request=_post("/tokenize", body), verify=_has_no_typed_control_token)
    if kind == 1:
        body = {"prompt": text, "max_tokens": 8, "stream": True, "temperature": 2}
        return Case(label=f"stream {text!r}", request=_post(COMPLETIONS, body), verify=_is_clean_stream)
    return Case(label=f"/tokenize {text!r}", request=_post("/tokenize", {"prompt": text}))


def _has_no_typed_control_token(answer: Answer) -> None:
    """The template writes one token that begins the text, two of the turn, and one of the answer's turn."""
    if answer.status == 200:
        names = json.loads(answer.body)["token_strs"]
        assert sum(name in ("<|endoftext|>", "<|turn|>", "<|end|>") for name in names) == 4, names


def _is_clean_stream(answer: Answer) -> None:
    if answer.status == 200:
        events = answer.body.decode("utf-8").split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def names(random: random.Random) -> Case:
    """S10: methods, paths, models, ids and client names that never come twice."""
    word = "".join(random.choices(string.ascii_letters + string.digits, k=24))
    kind = random.randrange(5)
    if kind == 0:
        return Case(label=f"method {word}", request=request(word.upper(), "/livez"), statuses=frozenset({405}))
    if kind == 1:
        data = request("GET", f"/v1/{word}/{word}", key=KEY)
        return Case(label=f"path {word}", request=data, statuses=frozenset({404}), method="GET")
    if kind == 2:
        data = request("GET", f"/v1/models/{word}", key=KEY)
        return Case(label=f"model {word}", request=data, statuses=frozenset({404}), method="GET")
    if kind == 3:
        body = ROUTES[COMPLETIONS][1] | {"model": word, "user": word}
        return Case(label=f"model {word}", request=_post(COMPLETIONS, body), statuses=frozenset({404}))
    odd = random.choice((word, word + "\x7f", word + "\u00e9", "a b", "", word * 20, "%0d%0a" + word))
    headers = {"X-Request-ID": odd, "User-Agent": word, "traceparent": word, "X-Forwarded-For": word}
    data = request("POST", COMPLETIONS, json.dumps(ROUTES[COMPLETIONS][1]), headers, key=KEY)
    return Case(label=f"id {odd!r}", request=data, statuses=frozenset({200, 400}))


KINDS: dict[str, Maker] = {
    "S1 bounds": bounds,
    "S2 mixtures": mixtures,
    "S3 raw bytes": raw,
    "S4 templates": templates,
    "S5 grammars": grammars,
    "S6 routes": routes,
    "S7 targets": targets,
    "S8 neighbours": neighbours,
    "S9 texts": texts,
    "S10 names": names,
}


def cases(seed: int, number: int) -> Iterator[tuple[str, Case]]:
    """So many cases, the kinds in turn; each with the name that repeats it."""
    kinds = list(KINDS)
    for index in range(number):
        kind = kinds[index % len(kinds)]
        yield f"{kind}, seed {seed}, case {index}", KINDS[kind](random.Random(f"{seed}/{kind}/{index}"))
