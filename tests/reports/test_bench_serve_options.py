"""What `bench serve` is asked to measure, and the refusal of what it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import SettingError
from service.invocation import read_invocation, read_serve_bench
from service.reports.bench_serve_options import KEY_VARIABLE, MAX_TEXT_CHARACTERS, Load, ServeBench
from service.reports.bench_text import DEFAULT_TEXT

URL, OTHER_URL = "http://127.0.0.1:8001", "http://127.0.0.1:8002"
KEY = "a-key-that-nobody-may-see"


def _read(*arguments: str, **environment: str) -> ServeBench:
    return read_serve_bench([f"--url={URL}", *arguments], environment)[0]


def test_the_defaults_are_two_closed_loops() -> None:
    bench = _read()
    assert bench == ServeBench(urls=(URL,), api_keys=(None,))
    assert bench.loads == (Load(1, None), Load(8, None))
    assert (bench.num_requests, bench.duration_s, bench.text) == (None, 10.0, DEFAULT_TEXT)


def test_everything_can_be_chosen(tmp_path: Path) -> None:
    text, key = tmp_path / "text", tmp_path / "key"
    text.write_text("Some words.", encoding="utf-8")
    key.write_text(f"{KEY}\n", encoding="utf-8")
    bench, as_json = read_serve_bench(
        [
            *("--url", f"{URL}/", "--url", OTHER_URL, "--clients", "1, 4", "--rate", "0.5,20", "--requests", "9"),
            *("--blocks=3", "--prompt-tokens=5", "--max-tokens=7", "--seed=11", "--timeout=2.5", "--json"),
            *(f"--text={text}", f"--api-key-file={key}", f"--output={tmp_path / 'a'}", f"--plot={tmp_path / 'b.png'}"),
        ],
        {},
    )
    assert as_json
    assert bench == ServeBench(
        urls=(URL, OTHER_URL),
        loads=(Load(1, None), Load(4, None), Load(None, 0.5), Load(None, 20.0)),
        num_requests=9,
        num_blocks=3,
        num_prompt_tokens=5,
        max_tokens=7,
        seed=11,
        timeout_s=2.5,
        text="Some words.",
        api_keys=(KEY, KEY),
        output=tmp_path / "a",
        plot=tmp_path / "b.png",
    )


def test_a_rate_alone_is_an_open_loop_alone() -> None:
    assert _read("--rate=3").loads == (Load(None, 3.0),)


def test_keys_come_from_the_variable_and_are_shown_nowhere() -> None:
    bench = _read(f"--url={OTHER_URL}", **{KEY_VARIABLE: f"{KEY}, {KEY}2"})
    assert bench.api_keys == (KEY, f"{KEY}2")
    assert KEY not in repr(bench)
    for keys in (f"{KEY},{KEY},{KEY}", f"{KEY} {KEY}", f"{KEY}\x1b"):
        with pytest.raises(SettingError, match=f"^{KEY_VARIABLE}: ") as refused:
            _read(f"--url={OTHER_URL}", **{KEY_VARIABLE: keys})
        assert KEY not in str(refused.value)


def test_the_variable_of_the_key_stops_no_service() -> None:
    assert read_invocation([], {KEY_VARIABLE: KEY}).settings == read_invocation([], {}).settings


def test_a_long_text_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("é" * (MAX_TEXT_CHARACTERS + 1), encoding="utf-8")
    assert len(_read(f"--text={path}").text) == MAX_TEXT_CHARACTERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"--url={URL}", f"--url {URL}: given twice; name another server"),
        (f"--url={OTHER_URL} --url=http://c", "--url: given 3 times; name one server, or two to compare"),
        (
            "--url=127.0.0.1:8000",
            "--url 127.0.0.1:8000: must be http:// or https://, a host, and a port .*; write http:",
        ),
        ("--url=ftp://a", "--url ftp://a: must be http:// or https://"),
        ("--url=http://", "--url http://: must be"),
        ("--url=http://a:0", "--url http://a:0: must be"),
        ("--url=http://a:99999", "--url http://a:99999: must be .* from 1 to 65535"),
        ("--url=http://a?key=5", "--url .*: must be"),
        ("--url=http://[::1", "--url .*: must be"),
        (f"--url=http://me:{KEY}@host", "--url: holds a user name; keys come from --api-key-file or PENNYWEIGHT_BENCH"),
        ("--clients=0", "--clients 0: must be a whole number from 1 to 1024; correct it"),
        ("--clients=1.5", "--clients 1.5: must be a whole number"),
        ("--clients=2,2", "--clients 2,2: an entry stands there twice; give each once"),
        (f"--clients={','.join(map(str, range(1, 18)))}", "--clients: 17 entries, it must be at most 16; run it in"),
        ("--rate=0", "--rate 0: must be a number from 0.01 to 1000"),
        ("--rate=nan", "--rate nan: must be a number"),
        ("--rate=inf", "--rate inf: must be a number"),
        ("--requests=1", "--requests 1: must be a whole number from 2 to 1000000"),
        ("--duration=0", "--duration 0: must be a number from 0.1 to 3600"),
        ("--duration=5 --requests=5", "--requests: not allowed with argument --duration"),
        ("--blocks=0", "--blocks 0: must be"),
        ("--prompt-tokens=-1", "--prompt-tokens -1: must be"),
        ("--max-tokens=1e3", "--max-tokens 1e3: must be a whole number"),
        ("--max-tokens=1_0", "--max-tokens 1_0: must be a whole number"),
        (f"--seed={2**63}", "--seed 9223372036854775808: must be"),
        ("--timeout=x", "--timeout x: must be a number"),
        ("--text=/nowhere/text", r"--text /nowhere/text: cannot be read \(No such file or directory\); give a file"),
        ("--text=/", "--text /: cannot be read"),
        ("--text=/dev/null", "--text /dev/null: is empty; give a text of some pages"),
        ("--api-key-file=/nowhere/key", r"--api-key-file /nowhere/key: cannot be read \(No such file"),
        (
            "--api-key-file=/dev/null",
            "--api-key-file /dev/null: 0 keys for 1 servers; give one for all, or one for each",
        ),
        ("--plot=figures.pdf", r"--plot figures.pdf: must end in \.png; name it so"),
        ("--plot=/nowhere/figures.png", "--plot /nowhere/figures.png: must be a file in a folder that exists"),
        ("--output=/", "--output /: must be a file"),
        ("--threads=5", "unrecognized arguments: --threads=5; `pennyweight bench serve --help`"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_value_rule_and_remedy(arguments: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as refused:
        _read(*arguments.split())
    assert str(refused.value).isprintable()


def test_a_text_that_is_no_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"abc\xff")
    with pytest.raises(SettingError, match="must be UTF-8, and is not; convert it"):
        _read(f"--text={path}")


def test_a_key_in_two_places_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=f"and {KEY_VARIABLE}: keys in two places; keep one") as refused:
        _read(f"--api-key-file={tmp_path}/key", **{KEY_VARIABLE: KEY})
    assert KEY not in str(refused.value)
