"""Every file of the project keeps to its floor and to the house style, and each check can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.floors import (
    HEAVY,
    MAX_NATIVE_FILE_LINES,
    ROOT,
    Module,
    floor_of,
    heavy_at_start,
    hidden_imports,
    import_cycle,
    import_violations,
    length_violations,
    missing_docstrings,
    read_modules,
)

SERVICE = read_modules("service")
TESTS = read_modules("tests")


def test_the_service_has_files_to_check() -> None:
    assert {"service", "service.errors", "service.engine.sequence"} <= SERVICE.keys()
    assert "tests.test_floors" in TESTS


@pytest.mark.parametrize("name", SERVICE)
def test_a_file_imports_only_what_its_floor_may_see(name: str) -> None:
    assert import_violations(SERVICE[name], SERVICE) == []


@pytest.mark.parametrize("name", SERVICE)
def test_a_file_hides_no_import(name: str) -> None:
    assert hidden_imports(SERVICE[name]) == []


@pytest.mark.parametrize("name", SERVICE)
def test_everything_public_has_a_docstring(name: str) -> None:
    assert missing_docstrings(SERVICE[name]) == []


@pytest.mark.parametrize("name", [*SERVICE, *TESTS])
def test_files_and_functions_are_short(name: str) -> None:
    assert length_violations((SERVICE | TESTS)[name]) == []


def test_native_files_are_short() -> None:
    folder = ROOT / "service" / "kernels" / "native"  # below it lies what CMake has made
    native = [path for suffix in ("*.cpp", "*.h") for path in folder.glob(suffix)]
    assert native
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in native}
    assert {path: n for path, n in lengths.items() if n > MAX_NATIVE_FILE_LINES} == {}


def test_imports_make_no_cycle() -> None:
    assert import_cycle(SERVICE) == []


RUN_ALONE = {
    "service.api.template_worker",
    "service.assembly",
    "service.demo.train",
    "service.reports.doctor",
    "service.reports.plan",
}
RUN_ALONE |= {"service.api.grammar_worker", "service.api.matchers"}
RUN_ALONE |= {f"service.reports.bench_{name}" for name in ("runs", "kernels", "table", "serve_plot")}
RUN_ALONE |= {f"service.reports.{name}" for name in ("evaluate", "evaluate_plot", "histograms")}
RUN_ALONE |= {f"service.reports.inspect_{name}" for name in ("plot", "watch")}
LIGHT = [name for name, module in SERVICE.items() if (floor_of(module.room) or 0) >= 6 and name not in RUN_ALONE]


@pytest.mark.parametrize("name", LIGHT)
def test_what_runs_before_the_port_opens_imports_nothing_heavy(name: str) -> None:
    assert heavy_at_start(SERVICE, name) == []


def test_the_interpreter_agrees_that_nothing_heavy_is_imported() -> None:
    names = [name for name in LIGHT if name != "service.__main__"]
    code = f"import sys, {', '.join(names)}\nprint({HEAVY!r} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


KNOWN = ["service", "service.errors", "service.engine.runner", "service.api.text", "service.app", "service.metrics"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("service.errors", "import torch", "floor 0 may not see torch"),
        ("service.numerics.affine", "import numpy as np", "floor 1 may not see numpy"),
        ("service.layers.linear", "from transformers import PreTrainedModel", "floor 3 may not see transformers"),
        (
            "service.engine.runner",
            "import transformers.masking_utils",
            "floor 5 may not see transformers.masking_utils",
        ),
        ("service.api.admin", "import tokenizers", "floor 6 may not see tokenizers"),
        ("service.numerics.affine", "import service.engine.runner", "floor 1 may not see service.engine.runner"),
        ("service.errors", "from service import app", "floor 0 may not see service.app"),
        ("service.metrics", "from service.api.text import Text", "floor 6 may not see service.api.text"),
        ("service.demo", "from service.app import run", "floor 7 may not see service.app"),
        ("service.layers.linear", "def f():\n    import uvicorn", "floor 3 may not see uvicorn"),
        ("service.layers.linear", "if TYPE_CHECKING:\n    import fastapi", "floor 3 may not see fastapi"),
        ("service.engine.runner", "from . import blocks", "relative import"),
        ("service.engine.runner", "import service.unknown", "floor 5 may not see service.unknown"),
        ("service.utils", "", "no floor has a room 'utils'"),
    ],
)
def test_an_import_off_the_table_is_found(name: str, text: str, message: str) -> None:
    (violation,) = import_violations(Module(name, text), KNOWN)
    assert message in violation


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("service.engine.attention", "from transformers import AttentionInterface"),
        ("service.api.text", "from tokenizers import Tokenizer"),
        ("service.api.admin", "from service import metrics"),
        ("service.app", "import uvicorn\nfrom service import __version__, metrics"),
    ],
)
def test_an_import_on_the_table_is_allowed(name: str, text: str) -> None:
    assert import_violations(Module(name, text), KNOWN) == []


@pytest.mark.parametrize(
    ("check", "text", "message"),
    [
        (hidden_imports, "from os.path import *", "star import"),
        (hidden_imports, "def f():\n    import torch", "import in a function"),
        (hidden_imports, "import importlib\nimportlib.import_module('torch')", "import by name"),
        (length_violations, "x = 1\n" * 351, "351 lines"),
        (length_violations, "def f():\n" + "    x = 1\n" * 59, "f has 60 lines"),
        (missing_docstrings, "x = 1", "service.errors: no docstring"),
        (missing_docstrings, '"""M."""\ndef f(): ...', "service.errors.f: no docstring"),
        (missing_docstrings, '"""M."""\nclass C:\n    """C."""\n    def f(self): ...', "C.f: no docstring"),
    ],
)
def test_a_breach_of_style_is_found(check: Callable[[Module], list[str]], text: str, message: str) -> None:
    (violation,) = check(Module("service.errors", text))
    assert message in violation


@pytest.mark.parametrize(
    "text",
    [
        "from service.app import run",
        "def f():\n    from service import app",
        "if TYPE_CHECKING:\n    import service.app",
    ],
    ids=["plain", "lazy", "typing"],
)
def test_a_cycle_is_found(text: str) -> None:
    modules = {"service.cli": Module("service.cli", text), "service.app": Module("service.app", "import service.cli")}
    assert set(import_cycle(modules)) == {"service.cli", "service.app"}


def test_a_heavy_import_behind_another_is_found() -> None:
    sources = {
        "service": "",
        "service.cli": "from service.engine.stats import StepStats",
        "service.engine": "import torch.nn",
        "service.engine.stats": "if TYPE_CHECKING:\n    import transformers\ndef f():\n    import torch",
    }
    modules = {name: Module(name, text) for name, text in sources.items()}
    assert heavy_at_start(modules, "service.cli") == ["service.engine:1: torch.nn"]
