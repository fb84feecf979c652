"""What `pennyweight doctor` tells: the machine, the settings in force, and what is in the way of a service."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table

from service import __version__
from service.api.listener import open_port
from service.errors import PennyweightError, SettingError
from service.kernels import dispatch
from service.loading import memory
from service.loading.artifact_cache import cache_folder, cached_artifacts
from service.loading.control_group import ControlGroups
from service.reports.hardware import cpu_name
from service.reports.machine import ThreadLimits, thread_limits

_LIBRARIES = ("transformers", "tokenizers", "huggingface_hub", "safetensors", "fastapi", "uvicorn", "pydantic")
_GRAMMAR_LIBRARY = "llguidance"
_COMPILERS = ("c++", "g++", "clang++")
_DEMO_BYTES = 512 * 2**20
"""A service of the demo model holds up to 430 MB while it starts, most of it libraries, and then keys and values."""


class Problem(NamedTuple):
    """Something to know; an `error` keeps a service from starting."""

    severity: Literal["error", "warning", "note"]
    message: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found; bytes and counts are of this moment.

    Attributes:
        libraries: versions of the packages that matter most.
        hub: where models of the hub are kept, and where its token comes from.
        artifacts: where quantized models are kept for the next start, and how much of them.
        settings: those in force; empty if they are wrong.
    """

    version: str
    python: str
    torch: str
    libraries: dict[str, str]
    cpu: dict[str, Any]
    kernels: dict[str, Any]
    threads: dict[str, Any]
    devices: list[dict[str, Any]]
    memory: dict[str, int | None]
    hub: dict[str, Any]
    artifacts: dict[str, Any]
    settings: dict[str, Any]
    problems: list[Problem]

    @property
    def exit_code(self) -> int:
        """1 if a service cannot start."""
        return int(any(problem.severity == "error" for problem in self.problems))

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self) | {"problems": [problem._asdict() for problem in self.problems]}


def examine(settings: Mapping[str, Any], setting_errors: Sequence[str] = ()) -> Diagnosis:
    """Look at the machine and at the settings in force, which are empty if they are wrong."""
    limits = thread_limits()
    hub = _hub(settings)
    devices = _devices()
    problems = [
        Problem("error", message, "correct it; `pennyweight serve --help` lists all settings")
        for message in setting_errors
    ]
    if settings:
        problems += _setting_problems(settings, limits, devices, hub)
    kernels = _kernels(settings.get("kernel_isa", "auto"), problems)
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        libraries={name: version(name) for name in _LIBRARIES} | _grammar_library(problems),
        cpu={
            "name": cpu_name(),
            "architecture": platform.machine(),
            "physical_cores": limits.physical_cores,
            "logical_cpus": psutil.cpu_count(),
            "features": sorted(name for name, value in torch.cpu.get_capabilities().items() if value is True),
        },
        kernels=kernels,
        threads=_threads(limits, settings.get("threads", "auto")),
        devices=devices,
        memory=_memory(),
        hub=hub,
        artifacts=_artifacts(settings),
        settings=dict(settings),
        problems=problems,
    )


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """A table for people, the problems below it."""
    console = console or Console()
    table = Table.grid(padding=(0, 2))
    for title, value in diagnosis.as_dict().items():
        if title != "problems":
            for index, (name, text) in enumerate(_rows(value)):
                table.add_row(title if index == 0 else "", name, text)
    console.print(table, markup=False, highlight=False)
    for severity, message, remedy in diagnosis.problems:
        console.print(f"{severity}: {message}; {remedy}", markup=False, highlight=False, soft_wrap=True)
    if not diagnosis.problems:
        console.print("no problems found", highlight=False)


def _rows(value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            text = " ".join(map(str, part)) if isinstance(part, list) else "-" if part is None else str(part)
            is_size = name.endswith("bytes") and isinstance(part, int) and part >= 2**20
            yield name, f"{text} ({part / 2**30:.2f} GiB)" if is_size else text
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from ((f"{number} {name}", text) for name, text in _rows(part))
    else:
        yield "", str(value)


def _kernels(isa: str, problems: list[Problem]) -> dict[str, Any]:
    """The kernels that a service would use for bfloat16 activations on the CPU; adds what is wrong with them."""
    try:
        choice = dispatch.choose(isa)
    except SettingError as error:
        problems.append(Problem("error", *_message_and_remedy(error)))
        choice = dispatch.choose("auto")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if obstacle := dispatch.obstacle("baseline"):
        remedy = "install the package again" if compiler else "install g++ 11 or newer, then the package again"
        problems.append(Problem("warning", f"{obstacle}; products run on torch's own operators, slower", remedy))
    usable = [isa for isa in dispatch.ISAS if not dispatch.obstacle(isa)]
    return {"in_use": choice.kernel, "why": choice.why, "usable": usable, "compiler": compiler}


def _grammar_library(problems: list[Problem]) -> dict[str, str]:
    """The version of what serves grammars; adds a note where it is not installed."""
    if find_spec(_GRAMMAR_LIBRARY) is not None:
        return {_GRAMMAR_LIBRARY: version(_GRAMMAR_LIBRARY)}
    text = f"{_GRAMMAR_LIBRARY} is not installed; JSON schemas, regular expressions and grammars are refused"
    problems.append(Problem("note", text, "pip install -e '.[grammar]' if requests need them"))
    return {}


def _threads(limits: ThreadLimits, chosen: int | str) -> dict[str, Any]:
    in_use = limits.num_threads if chosen == "auto" else chosen
    limited_by = limits.limited_by if chosen == "auto" else "--threads"
    return {"in_use": in_use, "limited_by": limited_by} | limits._asdict()


def _devices() -> list[dict[str, Any]]:
    """CUDA devices."""
    devices = []
    for index in range(torch.cuda.device_count()):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found = {"device": f"cuda:{index}", "name": name, "compute_capability": f"{major}.{minor}"}
        devices.append(found | {"total_bytes": total_bytes, "free_bytes": free_bytes})
    return devices


def _memory() -> dict[str, int | None]:
    group = ControlGroups().memory()
    return {
        "total_bytes": psutil.virtual_memory().total,
        "available_bytes": memory.available_bytes(),
        "control_group_limit_bytes": None if group is None else group.limit_bytes,
        "control_group_used_bytes": None if group is None else group.used_bytes,
    }


def _hub(settings: Mapping[str, Any]) -> dict[str, Any]:
    cache_dir = Path(settings.get("cache_dir") or constants.HF_HUB_CACHE).expanduser()
    blobs = cache_dir.glob("models--*/blobs/*")
    token = "--hf-token-file" if settings.get("hf_token_file") else "HF_TOKEN" if os.environ.get("HF_TOKEN") else None
    return {
        "cache_dir": str(cache_dir),
        "is_writable": _is_writable(cache_dir),
        "cache_bytes": sum(blob.stat().st_size for blob in blobs),
        "token": token,
        "is_offline": constants.HF_HUB_OFFLINE,
    }


def _artifacts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The cache of quantized models; no folder where the user has none, or nothing is to be kept."""
    limit_bytes, cache_dir = settings.get("cache_limit"), settings.get("cache_dir")
    try:
        folder = None if limit_bytes == 0 else cache_folder(Path(cache_dir) if cache_dir else None)
    except RuntimeError:
        folder = None
    sizes: dict[Path, int] = {}
    if folder is not None:
        with suppress(OSError):  # it is yet to be made, or is another user's
            sizes = cached_artifacts(folder)
    return {
        "cache_dir": None if folder is None else str(folder),
        "is_writable": folder is not None and _is_writable(folder),
        "count": len(sizes),
        "cache_bytes": sum(sizes.values()),
        "limit_bytes": limit_bytes,
    }


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which may be yet to be made itself."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _setting_problems(
    settings: Mapping[str, Any], limits: ThreadLimits, devices: list[dict[str, Any]], hub: Mapping[str, Any]
) -> Iterator[Problem]:
    model, threads = settings["model"], settings["threads"]
    if settings["device"] == "cuda" and not devices:
        yield Problem("error", "--device cuda: torch finds no CUDA device here", "use --device cpu or auto")
    if model is None and (available := memory.available_bytes()) < _DEMO_BYTES:
        text = f"{available} bytes of memory are available, and the demo model takes up to {_DEMO_BYTES}"
        yield Problem("error", text, "end other programs, or raise the limit of the control group")
    if not hub["is_writable"]:
        is_needed = model is not None and not os.path.isdir(os.path.expanduser(model))
        text = f"{hub['cache_dir']}: the cache directory cannot be written"
        yield Problem("error" if is_needed else "warning", text, "give a writable --cache-dir")
    if threads != "auto" and threads > limits.num_threads:
        text = f"--threads {threads}: {limits.limited_by} allows {limits.num_threads}; more are slower"
        yield Problem("warning", text, "use --threads auto")
    try:
        open_port(settings["host"], settings["port"]).close()
    except SettingError as error:
        yield Problem("error", *_message_and_remedy(error))
    except PennyweightError as error:
        yield Problem("warning", *_message_and_remedy(error))  # a service that runs already may be the one


def _message_and_remedy(error: PennyweightError) -> tuple[str, str]:
    message, _, remedy = str(error).rpartition("; ")
    return message, remedy
