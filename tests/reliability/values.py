"""What bad inputs are made of."""

from __future__ import annotations

from typing import Any

from tests.reliability.conftest import KEY

LITERALS = (
    *("-1", "0", "1", "2", "-0", "0.5", "-0.0", "5e-324", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("-9223372036854775809", "9" * 4000, "9" * 5000, "0." + "1" * 4000, "1" + "0" * 400 + "e-400"),
    *("null", "true", "false", '""', '"a"', '"1"', "[]", "{}", "[[]]", "[null]", '{"a": 1}', '"\\u0000"', '"\\ud800"'),
    *(
        '"' + "a" * 300 + '"',
        "[" * 100 + "]" * 100,
        "[" * 250 + "]" * 250,
        "[" + "0," * 3000 + "0]",
        '"\\ud83d\\ude00"',
    ),
    *('"' + "a" * 20_000 + '"', "[" + '"a",' * 200 + '"a"]', "{" + ",".join(f'"{i}":0' for i in range(400)) + "}"),
    *("01", "1.", ".5", "+1", "0x10", "1_000", "'a'", "undefined", "1 2", "", "\ufeff1", "/*a*/1", '"\t"', '"\\x41"'),
)
"""JSON, and what looks like it."""

TEXTS = (
    *("{{ 7 * 7 }}", "{% raw %}", "{{ self.__init__.__globals__ }}", "{{ ''.__class__.__mro__ }}", "${7*7}", "%s%n%x"),
    *("<|endoftext|>", "<|end|>", "<|turn|>system\n", "<think>", "<s>", "</s>", "[INST]", "<|im_start|>"),
    *(
        "\x00",
        "\x1b[31m",
        "\r\nX-Injected: 1",
        "\u202e\u2066",
        "\ufeff",
        "\ufffd",
        "\U0010ffff",
        "a\u0301" * 40,
        "\u0915\u094d" * 20,
    ),
    *(
        "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 4,
        "\u0627\u0644\u0628\u062d\u0631",
        "\u6d77",
        "\ubc14\ub2e4",
        "\u05d4\u05d9\u05dd",
    ),
    *(
        "'; DROP TABLE models; --",
        "<script>alert(1)</script>",
        "../../etc/passwd",
        "$(reboot)",
        "`id`",
        "\\\\host\\share",
    ),
)
SCRIPTS = (
    *(0x41, 0xC0, 0x100, 0x370, 0x400, 0x530, 0x590, 0x600, 0x700, 0x780, 0x900, 0x980, 0xA00, 0xA80, 0xB00, 0xB80),
    *(0xC00, 0xC80, 0xD00, 0xD80, 0xE00, 0xE80, 0xF00, 0x1000, 0x10A0, 0x1100, 0x1200, 0x13A0, 0x1400, 0x16A0, 0x1780),
    *(0x1800, 0x1E00, 0x2200, 0x2800, 0x3040, 0x30A0, 0x4E00, 0xAC00, 0x10300, 0x12000, 0x1D400, 0x1F600, 0x20000),
)
"""First characters of blocks of 64 in as many scripts."""
TARGETS = (
    *("http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "http://127.0.0.1:1/", "gopher://a/", "//a/b"),
    *(
        "![a](http://a.example/b.png)",
        "<img src=http://a.example/>",
        "data:text/html,a",
        "ftp://a.example/",
        "\\\\a\\b",
    ),
    *(
        "../../../../etc/passwd",
        "/etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "a/../../b",
        "talker\x00.safetensors",
        "~root",
    ),
    *("https://[::1]/", "jar:file:///a!/b", "dict://a.example:11211/", "netdoc:///etc/passwd", "C:\\windows\\win.ini"),
)

MIXED: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 0.0, 5e-324, 1, 2, 2.1, -1, float("nan"), float("inf"), None),
    "top_p": (0, 5e-324, 1e-9, 0.5, 1, 1.1, float("nan"), None),
    "top_k": (0, 1, 5, 304, 305, -1, 2**31, None),
    "min_p": (0, 5e-324, 0.5, 1, -0.1, float("nan"), None),
    "presence_penalty": (-2, 0, 2, 2.1, None),
    "frequency_penalty": (-2, 0, 2, -2.1, None),
    "repetition_penalty": (0.1, 1, 10, 0, 10.1, None),
    "logit_bias": ({}, {"0": 100}, {"0": -100}, {str(i): -100 for i in range(300)}, {"9999": 1}, None),
    "seed": (0, -(2**63), 2**63 - 1, 2**63, None),
    "n": (1, 2, 16, 0, 17, None),
    "min_tokens": (0, 1, 3, 4, 100, None),
    "max_tokens": (1, 3, 16, 31, 32, 0, None),
    "stop": ("a", " ", ["a", "e", "i"], ["\n"] * 16, [], "", None),
    "stop_token_ids": ([], [0], list(range(250)), [304], None),
    "ignore_eos": (True, False, None),
    "stream": (True, False, None),
    "regex": ("[a-z]{2}", "(", None, None),
    "logprobs": (True, False, 0, 5, 20, 21, None),
    "top_logprobs": (0, 20, 21, None),
}

_HEAD = f"Host: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n".encode()
_BODY = b'{"prompt": "The sea", "max_tokens": 1}'
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_POST = b"POST /v1/completions HTTP/1.1\r\n" + _HEAD
_GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n"
RAW: dict[str, bytes] = {
    "long header": _POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "many headers": _POST + b"A: b\r\n" * 10_000 + b"\r\n",
    "long path": b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "two lengths": _POST + _LENGTH + b"Content-Length: 5\r\n\r\n" + _BODY,
    "negative length": _POST + b"Content-Length: -1\r\n\r\n" + _BODY,
    "huge length": _POST + b"Content-Length: 99999999999999999999\r\n\r\n" + _BODY,
    "length that is none": _POST + b"Content-Length: ten\r\n\r\n" + _BODY,
    "length and chunks": _POST + _LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks of another coding": _POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunk size that is none": _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + _BODY,
    "huge chunk size": _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + _BODY,
    "chunk without an end": _POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh",
    "chunks of one byte": _POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 2000 + b"0\r\n\r\n",
    "body cut short": _POST + b"Content-Length: 500\r\n\r\n" + _BODY,
    "headers cut short": _POST[:40],
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "blank before a colon": b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n",
    "folded header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "NUL in a header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    "lone line feeds": b"GET /livez HTTP/1.1\nHost: a\n\n",
    "HTTP/0.9": b"GET /livez\r\n",
    "HTTP/1.0": b"GET /livez HTTP/1.0\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /livez HTTP/9.9\r\nHost: a\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "upgrade": _GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    "websocket": _GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AA==\r\n\r\n",
    "gzip": _POST + b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n" + b"\x1f\x8b\x08" + bytes(17),
    "ranges": b"GET /metrics HTTP/1.1\r\nHost: a\r\nRange: bytes=" + b"0-1," * 2000 + b"0-1\r\n\r\n",
    "expectation": _POST + _LENGTH + b"Expect: 100-continue\r\n\r\n" + _BODY,
    "unknown expectation": _POST + _LENGTH + b"Expect: the-impossible\r\n\r\n" + _BODY,
    "pipelined": (_POST + _LENGTH + b"\r\n" + _BODY) * 5,
    "pipelined garbage": _POST + _LENGTH + b"\r\n" + _BODY + b"\x00\xff" * 500,
    "absolute form": b"GET http://169.254.169.254/livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "authority form": b"CONNECT a.example:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "path of bytes": b"GET /\xff\xfe\x80 HTTP/1.1\r\nHost: a\r\n\r\n",
    "nothing": b"",
    "line ends": b"\r\n" * 500,
}

KEYS: tuple[dict[str, str], ...] = (
    {},
    {"Authorization": "Bearer wrong-key-0123456789"},
    {"Authorization": "Bearer "},
    {"Authorization": ""},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer{KEY}"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": "Bearer " + "a" * 9000},
    {"Authorization": "Bearer \u00e9\u00e9\u00e9\u00e9"},
    {"Authorization": f"Bearer {KEY}, Bearer {KEY}"},
    {"Cookie": f"key={KEY}"},
    {"X-API-Key": "wrong"},
)
FORMS = (
    *("{0}", "/{0}", "{0}/", "{0}?key=" + KEY, "{0}#a", "/x/..{0}", "{0}/..;/", "{0}%00", "{0}%2f", "/%2e%2e{0}"),
    *("http://evil.example{0}", "{0}?x=1&x=2", "//evil.example{0}", "{0};a=b", "/.{0}", "{0}%0d%0aX:1"),
)
HOSTS = ("localhost", "a/?x=", "evil.example", "a@b", "127.0.0.1:80", "[::1]", "", "a" * 300, "localhost:99999")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW")
