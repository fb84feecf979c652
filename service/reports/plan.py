"""What `pennyweight plan` tells: a load's bytes as JSON, or as a table for people."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from service.engine.config import KVFormat
from service.engine.sizing import token_bytes
from service.loading.plan import MARGIN_BYTES, LoadPlan

_GIB, _MIB = 2**30, 2**20
_FILE_WIDTH = 120
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRow:
    """Modules whose names differ in numbers only, and have one scheme.

    Attributes:
        pattern: their name with `*` for each number; a pattern in a recipe matches them by it.
        bytes: of all of them.
    """

    pattern: str
    count: int
    scheme: str
    bytes: int


def plan_as_dict(plan: LoadPlan, *, kv_cache: KVFormat) -> dict[str, Any]:
    """Everything as JSON takes it; bytes per token are 0 for a model that stores nothing for each."""
    return {
        "model": plan.model,
        "recipe": plan.recipe,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "device": plan.device,
        "num_parameters": plan.num_parameters,
        "original_bytes": plan.original_bytes,
        "quantized_bytes": plan.quantized_bytes,
        "weight_bytes": asdict(plan.weight_bytes),
        "peak_bytes": plan.peak_bytes,
        "peak": {
            "base_bytes": plan.base_bytes,
            "quantized_bytes": plan.quantized_bytes,
            "working_set_bytes": plan.working_set.bytes,
            "working_set": plan.working_set.source,
            "margin_bytes": MARGIN_BYTES,
        },
        "kv_memory_bytes": plan.kv_memory_bytes,
        "needed_bytes": plan.needed_bytes,
        "kv_bytes_per_token": _kv_bytes(plan, kv_cache),
        "available_bytes": plan.available_bytes,
        "device_bytes": plan.device_bytes,
        "device_available_bytes": plan.device_available_bytes,
        "fits": plan.fits,
        "refusal": plan.refusal or None,
        "modules": [asdict(row) for row in module_rows(plan)],
    }


def module_rows(plan: LoadPlan) -> list[ModuleRow]:
    """Modules that differ in numbers only, together; in the order of the first of each."""
    rows: dict[tuple[str, str], ModuleRow] = {}
    for module in plan.modules:
        key = (_NUMBER.sub("*", module.name), module.scheme)
        row = rows.get(key, ModuleRow(pattern=key[0], count=0, scheme=key[1], bytes=0))
        rows[key] = ModuleRow(
            pattern=row.pattern, count=row.count + 1, scheme=row.scheme, bytes=row.bytes + module.bytes.total
        )
    return list(rows.values())


def print_plan(plan: LoadPlan, *, kv_cache: KVFormat, console: Console | None = None) -> None:
    """A line for each kind of module, and the sums that matter below it."""
    console = console or Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    table = Table(title=f"{plan.model} as {plan.recipe}", title_justify="left")
    for name in ("modules", "count", "scheme", "bytes"):
        table.add_column(name, justify="right" if name in ("count", "bytes") else "left")
    for row in module_rows(plan):
        table.add_row(row.pattern, str(row.count), row.scheme, _size(row.bytes))
    console.print(table, markup=False, highlight=False)
    figures = Table.grid(padding=(0, 2))
    for name, value in _figures(plan, kv_cache):
        figures.add_row(name, value)
    console.print(figures, markup=False, highlight=False)


def _figures(plan: LoadPlan, kv_cache: KVFormat) -> list[tuple[str, str]]:
    saving = 1 - plan.quantized_bytes / plan.original_bytes
    figures = [
        ("weights before", _size(plan.original_bytes)),
        ("weights after", f"{_size(plan.quantized_bytes)}, {saving:.1%} less"),
        (
            "peak while loading",
            f"{_size(plan.peak_bytes)}: the process {_size(plan.base_bytes)}, the weights, "
            f"{plan.working_set.source} {_size(plan.working_set.bytes)}, {_size(MARGIN_BYTES)} to spare",
        ),
        ("keys and values", f"{_kv_bytes(plan, kv_cache)} bytes a token"),
        *_kv_figures(plan),
        ("memory", f"{_size(plan.available_bytes)} {'by --memory' if plan.is_limited else 'for this process'}"),
    ]
    if plan.device_bytes is not None and plan.device_available_bytes is not None:
        figures.append(("device", f"{_size(plan.device_bytes)} of {_size(plan.device_available_bytes)}"))
    return [*figures, ("fits", "yes" if plan.fits else "no")]


def _kv_figures(plan: LoadPlan) -> list[tuple[str, str]]:
    """What it takes with keys and values of a size that was asked for."""
    if not plan.kv_memory_bytes:
        return []
    needed = f"{_size(plan.kv_memory_bytes)} by --kv-memory; with it {_size(plan.needed_bytes)} of the host at most"
    return [("needed", needed)]


def _kv_bytes(plan: LoadPlan, kv_cache: KVFormat) -> int:
    return token_bytes(plan.kv_layers, plan.dtype, kv_cache)


def _size(num_bytes: int) -> str:
    """Three digits and a unit."""
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:.3g} GiB"
    return f"{num_bytes / _MIB:.3g} MiB" if num_bytes >= _MIB else f"{num_bytes} B"
