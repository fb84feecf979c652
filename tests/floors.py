"""The table of floors, and checks of it and of the house style on the syntax tree of a module.

A check returns what is wrong, a line for each. Imports in functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 350
MAX_NATIVE_FILE_LINES = 600
MAX_FUNCTION_LINES = 59

HUGGING_FACE = {"transformers", "tokenizers", "safetensors", "huggingface_hub"}
HTTP = {"fastapi", "starlette", "pydantic", "pydantic_core", "prometheus_client", "psutil"}
HEAVY = {"torch", "transformers"}
"""Their import takes seconds; the port opens before."""

LAZY_MODULES = {"service.app", "service.commands"}
"""The load thread, and commands that end, import what is heavy; nothing else imports in a function."""


@dataclass(frozen=True)
class Floor:
    """A row of the table: what its rooms may see besides the standard library and lower floors.

    Attributes:
        rooms: files and folders directly under the package; `""` is the package's own `__init__`.
        packages: third-party packages; None allows all.
        neighbours: room to the rooms of the same floor that it may see besides itself.
    """

    rooms: set[str]
    packages: set[str] | None
    neighbours: dict[str, set[str]]


FLOORS = [
    Floor({"", "errors"}, set(), {}),
    Floor({"numerics"}, {"torch"}, {}),
    Floor({"kernels"}, {"torch"}, {}),
    Floor({"layers"}, {"torch"}, {}),
    Floor({"loading"}, {"torch"} | HUGGING_FACE, {}),
    Floor({"engine"}, {"torch"}, {}),
    Floor(
        {"series", "metrics", "api", "reports"}, HTTP, {"metrics": {"series"}, "api": {"metrics"}, "reports": {"api"}}
    ),
    Floor(
        {"settings", "access", "invocation", "demo", "assembly", "app", "commands", "cli", "__main__"},
        None,
        {
            "invocation": {"settings"},
            "access": {"settings"},
            "assembly": {"settings", "demo"},
            "app": {"settings", "access", "assembly"},
            "commands": {"settings", "assembly"},
            "cli": {"settings", "access", "invocation", "demo", "app", "commands"},
            "__main__": {"cli"},
        },
    ),
]
EXTRA_PACKAGES = {
    "service.engine.attention": {"transformers"},  # the attention interface
    "service.engine.sequential": {"transformers"},  # its cache object
    "service.api.protocol": {"uvicorn", "h11"},  # the connections of the server
    "service.api.text": {"transformers", "tokenizers"},  # the only user of the tokenizer
    "service.api.limits": {"limits"},
    "service.api.matchers": {"llguidance"},
    "service.api.template_worker": {"transformers", "jinja2"},  # a process of its own
    "service.loading.artifact_cache": {"filelock"},
    "service.loading.artifact_read": {"xxhash"},
    "service.loading.artifact_write": {"xxhash"},
    "service.loading.hub_headers": {"httpx2"},  # the errors of huggingface_hub's connections
    "service.reports.progress": {"rich"},
    "service.reports.doctor": {"rich", "torch", "huggingface_hub"},
    "service.reports.bench_runs": {"torch"},
    "service.reports.bench_kernels": {"torch"},
    "service.reports.bench_table": {"rich"},
    "service.reports.plan": {"rich"},
    "service.reports.evaluate": {"rich"},
    "service.reports.evaluate_plot": {"matplotlib"},
    "service.reports.histograms": {"numpy", "torch"},
    "service.reports.inspect": {"rich"},
    "service.reports.inspect_plot": {"matplotlib", "numpy"},
    "service.reports.inspect_watch": {"numpy", "torch"},
    "service.reports.bench_client": {"httpx2"},
    "service.reports.bench_serve_table": {"rich"},
    "service.reports.bench_serve_plot": {"matplotlib"},
    "service.reports.terminal": {"rich"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, as `import` or `from` names it."""

    target: str
    line: int
    in_function: bool
    typing_only: bool


@dataclass(frozen=True)
class Module:
    """A source file and its syntax tree."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.name.partition(".")[2].partition(".")[0]

    def imports(self, known: Iterable[str]) -> list[Import]:
        """All imports; `from package import name` means `package.name` where that is in `known`."""
        return list(_imports(self.tree, set(known), in_function=False, typing_only=False))

    def at(self, line: int) -> str:
        return f"{self.name}:{line}"


def _imports(node: ast.AST, known: set[str], *, in_function: bool, typing_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, in_function, typing_only)
    elif isinstance(node, ast.ImportFrom):
        package = "." * node.level + (node.module or "")
        for name in dict.fromkeys(f"{package}.{alias.name}" for alias in node.names):
            yield Import(name if name in known else package, node.lineno, in_function, typing_only)
    else:
        in_function |= isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        typing_only |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, known, in_function=in_function, typing_only=typing_only)


def read_modules(folder: str) -> dict[str, Module]:
    modules = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = Module(name, path.read_text(encoding="utf-8"))
    return modules


def floor_of(room: str) -> int | None:
    return next((i for i, floor in enumerate(FLOORS) if room in floor.rooms), None)


def import_violations(module: Module, known: Iterable[str]) -> list[str]:
    """Imports that the table does not allow."""
    floor = floor_of(module.room)
    if floor is None:
        return [f"{module.name}: no floor has a room {module.room!r}"]
    found = []
    for item in module.imports(known):
        root, _, rest = item.target.partition(".")
        if not root:
            found.append(f"{module.at(item.line)}: relative import")
        elif root == "service":
            if not _may_see(module.room, rest.partition(".")[0]):
                found.append(f"{module.at(item.line)}: floor {floor} may not see {item.target}")
        elif root not in sys.stdlib_module_names:
            allowed = FLOORS[floor].packages
            if allowed is not None and root not in allowed | EXTRA_PACKAGES.get(module.name, set()):
                found.append(f"{module.at(item.line)}: floor {floor} may not see {item.target}")
    return found


def _may_see(room: str, other: str) -> bool:
    own, target = floor_of(room), floor_of(other)
    if own is None or target is None or own == target:
        return own is not None and (other == room or other in FLOORS[own].neighbours.get(room, set()))
    return target < own


def hidden_imports(module: Module) -> list[str]:
    """Star imports, imports by name at run time, and imports in functions but for those of the lazy modules."""
    found = [f"{module.at(i.line)}: import in a function" for i in module.imports(()) if i.in_function]
    if module.name in LAZY_MODULES:
        found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{module.at(node.lineno)}: star import")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.append(f"{module.at(node.lineno)}: import by name")
    return found


def import_cycle(modules: dict[str, Module]) -> list[str]:
    """Names along a cycle of imports, or nothing."""
    graph = {
        name: {i.target for i in module.imports(modules) if i.target in modules} for name, module in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def heavy_at_start(modules: dict[str, Module], start: str) -> list[str]:
    """Heavy packages that importing `start` imports, each with the module that does."""
    found, waiting, seen = [], [start], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        for item in modules[name].imports(modules):
            if not item.in_function and not item.typing_only:
                waiting.append(item.target)
                if item.target.partition(".")[0] in HEAVY:
                    found.append(f"{modules[name].at(item.line)}: {item.target}")
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def length_violations(module: Module) -> list[str]:
    """Files and functions that are too long."""
    found = []
    if (num_lines := len(module.text.splitlines())) > MAX_FILE_LINES:
        found.append(f"{module.name}: {num_lines} lines")
    for node in functions(module.tree):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(f"{module.at(node.lineno)}: {node.name} has {num_lines} lines")
    return found


def missing_docstrings(module: Module) -> list[str]:
    """The module, public classes and public functions that say nothing about themselves."""

    def undocumented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
        if ast.get_docstring(node) is None:
            yield name
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and child.name[0] != "_":
                path = f"{name}.{child.name}"
                if isinstance(child, ast.ClassDef):
                    yield from undocumented(child, path)
                elif ast.get_docstring(child) is None:
                    yield path

    return [f"{name}: no docstring" for name in undocumented(module.tree, module.name)]
