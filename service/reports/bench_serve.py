"""Requests to one server, or to two in turns: latency, throughput, memory, and how far apart their answers lie.

A *block* is one server at one load for a part of the time; a *round* has a block of each server, and the first of one
round is the last of the next. Nothing is sent to a server before all requests to the other one have ended. Both get
the same prompts at the same times: tokens of a text in a random order, so that no prompt begins like another of this
run, nor like one of an earlier run with the same seed, and no prefix cache helps.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from statistics import median
from typing import Any

from service import __version__
from service.errors import BenchError, SettingError
from service.reports import bench_quality
from service.reports.bench_client import Answer, ServedModel, Server, connected
from service.reports.bench_load import Block, Prompts, run_block
from service.reports.bench_quality import Quality
from service.reports.bench_serve_options import Load, ServeBench
from service.reports.percentiles import Percentiles, percentiles_of

_MIN_TEXT_TOKENS = 16
_WARM_REQUESTS = 2

OnProgress = Callable[[str, int, int], None]
"""Told what comes next, how many blocks are done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRow:
    """One server at one load. Rates and latencies are of requests that were answered in full.

    Attributes:
        clients: of the closed loop, each of which sends its next request when it has its answer; None in an open one.
        rate_per_s: at which the requests of the open loop were sent, whatever came back; None in a closed one.
        requests: sent.
        errors: requests that were not answered in full.
        errors_by_kind: the same by what happened: `http_429`, `timeout`, `connection`, `incomplete`, ...
        seconds: all blocks together, each from its first request to its last answer.
        request_s: from a request to the end of its answer.
    """

    url: str
    scheme: str
    clients: int | None
    rate_per_s: float | None
    requests: int
    errors: int
    errors_by_kind: dict[str, int]
    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    time_to_first_token_s: Percentiles | None
    inter_token_s: Percentiles | None
    request_s: Percentiles | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """What a server holds.

    Attributes:
        weight_bytes: by kind, and `total`.
        original_bytes: of the weights, unquantized, in the serving dtype.
        memory_bytes: of the process, by kind, after the load; None where the server did not tell.
        memory_note: why it did not.
        prefix_cache_hit_tokens: prompt tokens that its prefix cache had meanwhile; None where it did not tell.
    """

    url: str
    model: str
    scheme: str
    recipe: str
    dtype: str
    device: str
    kernel: str
    weight_bytes: dict[str, int]
    original_bytes: int
    saving_ratio: float
    bits_per_parameter: float
    memory_bytes: dict[str, int] | None
    memory_note: str | None
    prefix_cache_hit_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The second server by the first at one load.

    Attributes:
        output_tokens_per_s_ratio: median of the ratios of each round; None if a block has nothing to compare.
        least_ratio, largest_ratio: of a round.
        time_to_first_token_ratio: of the medians of both.
        inter_token_ratio: of the medians of both.
    """

    clients: int | None
    rate_per_s: float | None
    output_tokens_per_s_ratio: float | None
    least_ratio: float | None
    largest_ratio: float | None
    time_to_first_token_ratio: float | None
    inter_token_ratio: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """Everything that was measured; `quality` and `comparisons` take two servers.

    Attributes:
        quality_note: why two servers have no `quality`.
    """

    date: str
    client: dict[str, str]
    options: dict[str, Any]
    servers: list[ServerRow]
    models: list[ModelRow]
    comparisons: list[Comparison]
    quality: Quality | None
    quality_note: str | None
    seconds: float

    @property
    def has_failed(self) -> bool:
        """Whether a server has not answered one request in full at some load."""
        return any(row.requests == row.errors for row in self.servers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


def measure(bench: ServeBench, on_progress: OnProgress) -> ServeReport:
    """Run a benchmark.

    Raises:
        BenchError: a server cannot be measured, or two are of different models.
        SettingError: requests do not fit into the context of a model, or the text is too short.
    """
    return asyncio.run(_measure(bench, on_progress))


async def _measure(bench: ServeBench, on_progress: OnProgress) -> ServeReport:
    started = time.perf_counter()
    num_steps = len(bench.urls) * (1 + len(bench.loads) * bench.num_blocks)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(connected(url, api_key=key, timeout_s=bench.timeout_s))
            for url, key in zip(bench.urls, bench.api_keys, strict=False)
        ]
        on_progress("asking for the models", 0, num_steps)
        models = [await server.describe(bench.text) for server in servers]
        _check(bench, models)
        await _warm_up(bench, servers, models[0])
        before = [await server.prefix_hit_tokens() for server in servers]
        rows, comparisons = await _all_loads(bench, servers, models, on_progress)
        on_progress("memory and quality", num_steps - len(servers), num_steps)
        after = [await server.prefix_hit_tokens() for server in servers]
        memory = [await server.memory_bytes() for server in servers]
        quality, quality_note = await _quality(servers, models) if len(servers) > 1 else (None, None)
    on_progress("done", num_steps, num_steps)
    return ServeReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        client={"version": __version__, "python": platform.python_version(), "machine": platform.machine()},
        options=_options(bench),
        servers=rows,
        models=[_model_row(*figures) for figures in zip(models, memory, map(_difference, before, after), strict=True)],
        comparisons=comparisons,
        quality=quality,
        quality_note=quality_note,
        seconds=time.perf_counter() - started,
    )


def _options(bench: ServeBench) -> dict[str, Any]:
    """What figures depend on; no key is among it."""
    return {
        "requests": bench.num_requests,
        "duration_s": None if bench.num_requests else bench.duration_s,
        "blocks": bench.num_blocks,
        "prompt_tokens": bench.num_prompt_tokens,
        "max_tokens": bench.max_tokens,
        "seed": bench.seed,
        "nonce": bench.nonce,
        "timeout_s": bench.timeout_s,
    }


def _check(bench: ServeBench, models: Sequence[ServedModel]) -> None:
    """Refuse what cannot be measured or compared."""
    num_tokens = bench.num_prompt_tokens + bench.max_tokens
    for model in models:
        if num_tokens > model.max_model_len:
            raise SettingError(
                f"--prompt-tokens {bench.num_prompt_tokens} and --max-tokens {bench.max_tokens}: {num_tokens} tokens, "
                f"and the context of {model.url} is {model.max_model_len} tokens; give fewer"
            )
        if len(model.text_ids) < _MIN_TEXT_TOKENS:
            raise SettingError(
                f"--text: has {len(model.text_ids)} tokens at {model.url}; it must have at least {_MIN_TEXT_TOKENS}; "
                "give a text of some pages"
            )
    first, *others = models
    for other in others:
        what = next((what for what, get in _SAME.items() if get(first) != get(other)), None)
        if what is not None:
            raise BenchError(
                f"{other.url}: serves {other.model!r}, and {first.url} {first.model!r}: they differ in {what}; two "
                "servers are compared on one model: start both with the same one, or measure each alone"
            )


_SAME: dict[str, Callable[[ServedModel], object]] = {
    "their names": lambda model: model.model,
    "their layers": lambda model: model.layers,
    "the tokens of a text": lambda model: (model.prefix_ids, model.text_ids),
}


async def _warm_up(bench: ServeBench, servers: Sequence[Server], model: ServedModel) -> None:
    """A few requests to each that do not count.

    Raises:
        BenchError: one of them fails.
    """
    prompts = Prompts(f"{bench.seed}/{bench.nonce}/warm", model.text_ids, bench.num_prompt_tokens)
    for server in servers:
        for number in range(_WARM_REQUESTS):
            answer = await server.generate(prompts[number], bench.max_tokens)
            if answer.error is not None:
                raise BenchError(
                    f"{server.url}: a first request for {bench.max_tokens} tokens ended with {answer.error} after "
                    f"{answer.seconds:.1f} s; it must be answered in full within --timeout {bench.timeout_s:g}: see "
                    "the server's log, or ask for fewer tokens"
                )


async def _all_loads(
    bench: ServeBench, servers: Sequence[Server], models: Sequence[ServedModel], on_progress: OnProgress
) -> tuple[list[ServerRow], list[Comparison]]:
    """The servers take turns; each load is over before the next."""
    rows: list[ServerRow] = []
    comparisons: list[Comparison] = []
    num_steps = len(servers) * (1 + len(bench.loads) * bench.num_blocks)
    num_done = 0
    order = list(range(len(servers)))
    for load in bench.loads:
        blocks: list[list[Block]] = [[] for _ in servers]
        for number in range(bench.num_blocks):
            seed = f"{bench.seed}/{bench.nonce}/{load}/{number}"
            prompts = Prompts(seed, models[0].text_ids, bench.num_prompt_tokens)
            for index in order:
                on_progress(f"{load}: {servers[index].url}", num_done, num_steps)
                blocks[index].append(await run_block(servers[index], bench, load, number, prompts=prompts))
                num_done += 1
            order.reverse()
        rows += [_server_row(model, load, own) for model, own in zip(models, blocks, strict=True)]
        if len(servers) > 1:
            comparisons.append(_comparison(load, blocks, rows[-2:]))
    return rows, comparisons


def _server_row(model: ServedModel, load: Load, blocks: Sequence[Block]) -> ServerRow:
    answers = list(chain.from_iterable(block.answers for block in blocks))
    full = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    seconds = sum(block.seconds for block in blocks)
    return ServerRow(
        url=model.url,
        scheme=model.scheme,
        **load._asdict(),
        requests=len(answers),
        errors=errors.total(),
        errors_by_kind=dict(sorted(errors.items())),
        seconds=seconds,
        requests_per_s=len(full) / seconds,
        output_tokens_per_s=_num_tokens(full) / seconds,
        time_to_first_token_s=percentiles_of([a.first_token_s for a in full if a.first_token_s is not None]),
        inter_token_s=percentiles_of(list(chain.from_iterable(answer.inter_token_s for answer in full))),
        request_s=percentiles_of([answer.seconds for answer in full]),
    )


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.num_tokens for answer in answers)


def _comparison(load: Load, blocks: Sequence[Sequence[Block]], rows: Sequence[ServerRow]) -> Comparison:
    rates = [[_num_tokens(block.answers) / block.seconds for block in own] for own in blocks]
    is_complete = all(rate > 0 for rate in chain.from_iterable(rates))
    ratios = [second / first for first, second in zip(*rates, strict=True)] if is_complete else []
    first, second = rows
    return Comparison(
        **load._asdict(),
        output_tokens_per_s_ratio=median(ratios) if ratios else None,
        least_ratio=min(ratios, default=None),
        largest_ratio=max(ratios, default=None),
        time_to_first_token_ratio=_ratio(first.time_to_first_token_s, second.time_to_first_token_s),
        inter_token_ratio=_ratio(first.inter_token_s, second.inter_token_s),
    )


def _ratio(first: Percentiles | None, second: Percentiles | None) -> float | None:
    return None if first is None or second is None or not first.p50 else second.p50 / first.p50


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _model_row(model: ServedModel, memory: dict[str, int] | str, hits: int | None) -> ModelRow:
    fields = {name: getattr(model, name) for name in ModelRow.__dataclass_fields__ if hasattr(model, name)}
    return ModelRow(
        **fields,
        memory_bytes=None if isinstance(memory, str) else memory,
        memory_note=memory if isinstance(memory, str) else None,
        prefix_cache_hit_tokens=hits,
    )


async def _quality(servers: Sequence[Server], models: Sequence[ServedModel]) -> tuple[Quality | None, str | None]:
    """The text on both, a window at a time, or why not: what was measured before is not lost with it.

    The unquantized server is the reference, else the first one.
    """
    first, second = sorted(range(2), key=lambda index: models[index].scheme != "none")
    model = models[first]
    max_model_len = min(model.max_model_len for model in models)
    pieces = bench_quality.windows(model.text_ids, model.prefix_ids, max_model_len=max_model_len)
    if not pieces:
        return None, f"a context of {max_model_len} tokens has no room for a text"
    try:
        # One after the other, as comprehensions do: never both servers at once.
        scores = [(await servers[first].score(piece), await servers[second].score(piece)) for piece in pieces]
    except BenchError as error:
        return None, str(error)
    return bench_quality.compare(scores, reference=servers[first].url, other=servers[second].url), None
