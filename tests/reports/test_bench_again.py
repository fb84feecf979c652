"""A benchmark that is run again on the same server measures the server, not what the first run left in its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from service.reports.bench_serve import measure
from service.reports.bench_serve_options import Load, ServeBench
from service.reports.bench_serve_table import notes
from tests.api.support import run_service
from tests.reports.scripted import HUNDRED_WORDS


def test_a_second_run_with_the_same_seed_finds_nothing_in_the_prefix_cache(checkpoint: Callable[[str], Path]) -> None:
    settings = {"model": str(checkpoint("llama")), "threads": 1, "kv_memory": 2**24, "device": "cpu"}
    with run_service(settings) as service:
        bench = ServeBench(
            urls=(service.url,),
            loads=(Load(1, None),),
            num_requests=4,
            num_prompt_tokens=40,
            max_tokens=2,
            text=HUNDRED_WORDS,
        )
        later = replace(bench, nonce=ServeBench(urls=bench.urls).nonce)
        first, second, again = (measure(run, lambda *_: None) for run in (bench, later, bench))
    assert [report.models[0].prefix_cache_hit_tokens for report in (first, second)] == [0, 0]
    assert first.options["seed"] == second.options["seed"]
    assert first.options["nonce"] != second.options["nonce"]
    hits = 4 * 32  # two whole blocks of each prompt
    assert again.models[0].prefix_cache_hit_tokens == hits
    assert f"{service.url}: its prefix cache had {hits} prompt tokens" in "\n".join(notes(again))
