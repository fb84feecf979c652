"""A tiny benchmark of scripted servers and of real ones: its JSON, turns, arithmetic, refusals, table and picture."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from matplotlib.image import imread
from rich.console import Console

from service.cli import main
from service.errors import BenchError, SettingError
from service.reports.bench_serve import ServeReport, measure
from service.reports.bench_serve_options import KEY_VARIABLE, Load, ServeBench
from service.reports.bench_serve_plot import draw
from service.reports.bench_serve_table import notes, print_report
from tests.api.support import run_service
from tests.floors import ROOT
from tests.reports.scripted import HUNDRED_WORDS, Handler, Reply, ScriptedServer, refusal, scripted

NUMBER = {"type": "number", "minimum": 0}
COUNT = {"type": "integer", "minimum": 0}
LATENCY = {"anyOf": [{"type": "null"}, {"type": "object", "required": ["p50", "p90", "p99"]}]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["date", "client", "options", "servers", "models", "comparisons", "quality", "seconds"],
    "properties": {
        "servers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["url", "scheme", "clients", "rate_per_s", "request_s"],
                "properties": {
                    "requests_per_s": NUMBER,
                    "output_tokens_per_s": NUMBER,
                    "time_to_first_token_s": LATENCY,
                    "inter_token_s": LATENCY,
                    "errors": COUNT,
                    "errors_by_kind": {"type": "object", "additionalProperties": COUNT},
                },
            },
        },
        "models": {"type": "array", "items": {"type": "object", "required": ["weight_bytes", "memory_bytes"]}},
        "quality": {"anyOf": [{"type": "null"}, {"type": "object", "required": ["estimate", "kl_mean_nats"]}]},
    },
}


@pytest.fixture
def twins() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted() as first, scripted(scheme="w8a16", bits=8) as second:
        yield first, second


LOADS = (Load(1, None), Load(3, None), Load(None, 100.0))
Measured = tuple[ServeReport, list[ScriptedServer], list[tuple[str, int, int]]]
"""A report, its servers, and the progress on the way."""


@pytest.fixture(scope="module")
def measured() -> Measured:
    steps: list[tuple[str, int, int]] = []
    with scripted() as first, scripted(scheme="w8a16", bits=8) as second:
        report = measure(bench_of(first, second, loads=LOADS), lambda *step: steps.append(step))
    return report, [first, second], steps


def bench_of(*servers: ScriptedServer, **fields: Any) -> ServeBench:
    usual = {"num_requests": 6, "num_prompt_tokens": 8, "max_tokens": 4, "text": HUNDRED_WORDS, "timeout_s": 20}
    return ServeBench(urls=tuple(server.url for server in servers), **{**usual, **fields})


def run(bench: ServeBench) -> ServeReport:
    return measure(bench, lambda *_: None)


def test_the_json_has_the_fields_of_its_schema(measured: Measured) -> None:
    found = json.loads(json.dumps(measured[0].as_dict(), allow_nan=False))
    jsonschema.validate(found, SCHEMA)
    del found["servers"][0]["scheme"]
    with pytest.raises(jsonschema.ValidationError, match="scheme"):
        jsonschema.validate(found, SCHEMA)


def test_every_server_has_a_row_at_every_load(measured: Measured) -> None:
    report, servers, _ = measured
    assert [(row.url, row.clients, row.rate_per_s) for row in report.servers] == [
        (server.url, *load) for load in LOADS for server in servers
    ]
    assert [(row.clients, row.rate_per_s) for row in report.comparisons] == list(LOADS)
    for row in report.servers:
        assert (row.requests, row.errors, row.errors_by_kind) == (6, 0, {})
        assert row.requests_per_s == pytest.approx(6 / row.seconds)
        assert row.output_tokens_per_s == pytest.approx(4 * row.requests_per_s)
        assert row.time_to_first_token_s is not None
        assert row.request_s is not None
        assert row.time_to_first_token_s.p50 <= row.time_to_first_token_s.p99 <= row.request_s.p99
    assert not report.has_failed


def test_servers_take_turns_and_are_never_asked_at_once(measured: Measured) -> None:
    _, servers, _ = measured
    spans = sorted((*span, number) for number, server in enumerate(servers) for span in server.spans)
    for (_, end, number), (begin, _, other) in pairwise(spans):
        assert number == other or end <= begin
    order = "".join(str(number) for *_, number in spans)
    # Two requests to warm up each; then two rounds of each load, of three requests to each, the second the other way.
    assert order == "00" + "11" + 3 * ("000" + "111" + "111" + "000")


def test_both_servers_get_the_same_prompts_and_none_twice(measured: Measured) -> None:
    first, second = (sorted(body["token_ids"] for body in server.bodies) for server in measured[1])
    assert first == second
    assert len({tuple(prompt) for prompt in first}) == len(first) == 2 + len(LOADS) * 6


def test_what_servers_hold_is_what_they_say(measured: Measured) -> None:
    first, second = measured[0].models
    assert (first.scheme, first.weight_bytes["total"], first.saving_ratio) == ("none", 2000, 0)
    assert (second.scheme, second.weight_bytes["total"], second.saving_ratio) == ("w8a16", 1000, 0.5)
    assert second.memory_bytes == {"rss": 5_000_000}


def test_progress_counts_up_to_all_blocks(measured: Measured) -> None:
    _, _, steps = measured
    counts = [num_done for _, num_done, _ in steps]
    assert counts == sorted(counts)
    assert {num_all for *_, num_all in steps} == {counts[-1]}


@pytest.mark.parametrize("is_first", [True, False])
def test_the_unquantized_server_is_the_reference(twins: tuple[ScriptedServer, ScriptedServer], is_first: bool) -> None:
    report = run(bench_of(*(twins if is_first else twins[::-1])))
    assert report.quality is not None
    assert (report.quality.reference, report.quality.other) == (twins[0].url, twins[1].url)
    assert (report.quality.kl_mean_nats, report.quality.top1_ratio) == (0, 1)
    assert report.quality.num_tokens == 100  # and a special one before, whose probability nobody tells


def test_one_server_is_compared_with_none() -> None:
    with scripted() as server:
        report = run(bench_of(server))
    assert (report.quality, report.comparisons) == (None, [])


@pytest.mark.parametrize(
    ("replies", "model", "what"),
    [
        ({}, "other", "their names"),
        ({"/tokenize": (200, json.dumps({"tokens": list(range(50))}).encode())}, "tiny", "the tokens of a text"),
    ],
    ids=["name", "tokens"],
)
def test_servers_of_different_models_are_not_compared(replies: dict[str, Reply], model: str, what: str) -> None:
    message = rf"serves '{model}', and http\S+ 'tiny': they differ in {what}; two servers are compared on one model"
    with scripted() as first, scripted(replies, model=model) as second, pytest.raises(BenchError, match=message):
        run(bench_of(first, second))
    assert first.bodies == []  # nothing was measured


def test_layers_of_another_shape_are_another_model() -> None:
    with scripted() as first, scripted() as second:
        report = second.usual("/v1/quantization", {}) | {"layers": [{"name": "layer", "shape": [20, 50]}]}
        second.replies["/v1/quantization"] = 200, json.dumps(report).encode()
        with pytest.raises(BenchError, match="they differ in their layers"):
            run(bench_of(first, second))


def test_requests_that_fit_no_context_are_refused_before_any_is_sent() -> None:
    message = (
        r"--prompt-tokens 8 and --max-tokens 121: 129 tokens, and the context of http\S+ is 128 tokens; give fewer"
    )
    with scripted() as server, pytest.raises(SettingError, match=message):
        run(bench_of(server, max_tokens=121))
    assert server.bodies == []


def test_a_text_of_few_tokens_is_refused() -> None:
    with scripted() as server, pytest.raises(SettingError, match=r"--text: has 3 tokens at http\S+; it must have at"):
        run(bench_of(server, text="three words only"))


def test_a_server_that_fails_the_first_request_is_not_measured() -> None:
    message = r"a first request for 4 tokens ended with http_503 after \d+\.\d s; it must be answered in full within"
    with (
        scripted({"/generate": refusal(503, "draining")}) as server,
        pytest.raises(BenchError, match=message),
    ):
        run(bench_of(server))


def failing_after(num_good: int) -> Reply:
    """A server that answers so many requests and refuses all others."""

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.server.bodies) <= num_good:
            handler.stream(*[{"token_ids": [5]}] * body["max_tokens"], "[DONE]")
        else:
            handler.send(*refusal(429, "full"))

    return reply


def test_errors_are_counted_and_have_no_part_in_the_figures() -> None:
    with scripted({"/generate": failing_after(2 + 4)}) as server:
        report = run(bench_of(server, loads=(Load(1, None),), num_blocks=1))
    (row,) = report.servers
    assert (row.requests, row.errors, row.errors_by_kind) == (6, 2, {"http_429": 2})
    assert row.output_tokens_per_s == pytest.approx(4 * 4 / row.seconds)
    assert not report.has_failed
    assert notes(report) == [f"{server.url}, 1 client: 2 of 6 requests not answered in full: 2 http_429"]


def test_a_load_at_which_nothing_was_answered_has_no_latency_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with scripted() as first, scripted({"/generate": failing_after(2)}, scheme="w8a16", bits=8) as second:
        second.replies["/metrics"] = refusal(401, "no key")
        report = run(bench_of(first, second, loads=(Load(1, None),)))
        second.bodies.clear()
        urls = [f"--url={first.url}", f"--url={second.url}"]
        code = main(["bench", "serve", *urls, "--clients=1", "--requests=2", "--prompt-tokens=8", "--max-tokens=4"])
    row = report.servers[1]
    assert (row.errors, row.requests, row.output_tokens_per_s, row.inter_token_s) == (6, 6, 0, None)
    assert report.comparisons[0].output_tokens_per_s_ratio is None
    assert report.comparisons[0].time_to_first_token_ratio is None
    assert report.models[1].memory_bytes is None
    assert any("memory is not known" in note and "answers 401 (no key)" in note for note in notes(report))
    assert report.has_failed
    draw(report, tmp_path / "figures.png")
    assert code == 1
    assert "2 of 2 requests not answered in full: 2 http_429" in capsys.readouterr().out


def alone(report: ServeReport) -> ServeReport:
    """What a benchmark of the first server alone would have told."""
    url = report.models[0].url
    rows = [row for row in report.servers if row.url == url]
    return replace(report, servers=rows, models=report.models[:1], comparisons=[], quality=None)


def printed(report: ServeReport) -> str:
    screen = io.StringIO()
    print_report(report, Console(file=screen, width=200))
    return screen.getvalue()


def test_people_see_servers_loads_and_quality(measured: Measured) -> None:
    one, two = printed(alone(measured[0])), printed(measured[0])
    for words in (measured[1][0].url, "tiny", "3 clients", "100 requests/s", "0 of 6"):
        assert words in one
        assert words in two
    for words in ("w8a16", "50.0%", "second server by the first", "KL at least", "so that the whole is not less"):
        assert words in two
        assert words not in one


@pytest.mark.parametrize("num_servers", [1, 2])
def test_the_picture_is_one(measured: Measured, num_servers: int, tmp_path: Path) -> None:
    report = measured[0] if num_servers == 2 else alone(measured[0])
    models = [replace(model, model="a $name$ that is no formula_{") for model in report.models]
    path = tmp_path / "figures.png"
    draw(replace(report, models=models), path)
    height, width, _ = imread(path).shape
    assert (width, height) == (1200, 390)
    assert imread(path).std() > 0.05  # something is drawn


def test_real_services_are_measured_and_figures_written(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, plot, text = tmp_path / "figures.json", tmp_path / "figures.png", tmp_path / "text"
    text.write_text(HUNDRED_WORDS, encoding="utf-8")
    settings = {"model": str(checkpoint("llama")), "served_model_name": "tiny", "threads": 1, "kv_memory": 2**24}
    with ExitStack() as stack:
        started = [
            stack.enter_context(run_service(settings | {"quantize": recipe, "device": "cpu", "dtype": "float32"}))
            for recipe in ("none", "w4a16-g32")
        ]
        capsys.readouterr()  # what writing and loading the model has said
        monkeypatch.setenv(KEY_VARIABLE, "a-key-that-nobody-asks-for")
        arguments = ["--clients=2", "--rate=50", "--requests=4", "--prompt-tokens=8", "--max-tokens=5"]
        arguments += [f"--output={output}", f"--plot={plot}", f"--text={text}", "--json"]
        code = main(["bench", "serve", *(f"--url={service.url}" for service in started), *arguments])
        delivered = [service.metric("generated_tokens_total") for service in started]
        reports = [service.client.get("/v1/quantization").json() for service in started]
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    written = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(printed.out) == written
    jsonschema.validate(written, SCHEMA)
    assert "a-key" not in printed.out
    assert delivered == [5 * (2 + 2 * 4)] * 2  # two to warm up, and two loads
    assert [row["weight_bytes"] for row in written["models"]] == [report["weight_bytes"] for report in reports]
    assert all(row["memory_bytes"]["rss"] > 0 for row in written["models"])
    assert all(row["errors"] == 0 for row in written["servers"])
    quality = written["quality"]
    assert 0 < quality["kl_mean_nats"] < 5
    assert 0 < quality["top1_ratio"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    words = ["bench", "serve", "--url=http://127.0.0.1:9", f"--plot={tmp_path / 'figures.png'}"]
    code = f"import sys\nsys.modules['matplotlib'] = None\nfrom service.cli import main\nsys.exit(main({words!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search(
        r"--plot \S+: matplotlib is not installed, and draws it; run: pip install -e '\.\[plot\]'", result.stderr
    )


def test_a_server_that_goes_away_is_counted_and_loses_nothing() -> None:
    def reply(handler: Handler, body: dict[str, Any]) -> None:
        if len(handler.server.bodies) == 2 + 3:  # the last that is answered
            handler.server.replies["/generate"] = refusal(503, "draining")
        handler.stream(*[{"token_ids": [5]}] * body["max_tokens"], "[DONE]")

    with scripted() as first, scripted({"/generate": reply}, scheme="w8a16", bits=8) as second:
        report = run(bench_of(first, second, loads=(Load(1, None),), num_blocks=1))
    assert [row.errors_by_kind for row in report.servers] == [{}, {"http_503": 3}]
    assert report.servers[1].output_tokens_per_s > 0
    assert report.quality is None
    assert re.search(r"quality is not known: .*/generate answers 503 \(draining\)", "\n".join(notes(report)))


def test_a_server_that_is_down_ends_the_command_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted() as gone:
        url = gone.url
    assert main(["bench", "serve", f"--url={url}"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"pennyweight: {url}: cannot be reached (")
