"""The distribution: what it needs, what a wheel of it holds, and which licence it has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from service import __version__
from service.demo import model_folder
from tests.floors import ROOT, read_modules

pytestmark = pytest.mark.e2e

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
OF_THE_SERVICE = ("grammar", "plot")
EXTRAS = {Requirement(each).name for extra in OF_THE_SERVICE for each in PROJECT["optional-dependencies"][extra]}
PARTS = {"starlette": "fastapi", "pydantic_core": "pydantic"}
"""Packages that come with another one and change with it."""
NATIVE = ROOT / "service" / "kernels" / "native"
KERNELS = "service/kernels/libpennyweight_kernels.so"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of a copy of the project, built by the backend that pip would call."""
    return build_wheel(tmp_path_factory)


def build_wheel(tmp_path_factory: pytest.TempPathFactory, **environment: str) -> zipfile.ZipFile:
    copy, out = tmp_path_factory.mktemp("project") / "copy", tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache", ".git", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignore)
    code = f"from scikit_build_core.build import build_wheel; build_wheel({str(out)!r})"
    variables = os.environ | environment
    subprocess.run([sys.executable, "-c", code], cwd=copy, env=variables, check=True, capture_output=True)
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


def imported_packages() -> set[str]:
    modules = read_modules("service").values()
    roots = {item.target.partition(".")[0] for module in modules for item in module.imports(())}
    return {PARTS.get(root, root) for root in roots - sys.stdlib_module_names - {"service"}}


def test_every_imported_package_is_declared() -> None:
    assert imported_packages() <= {name.replace("-", "_") for name in REQUIREMENTS} | EXTRAS


def test_every_declared_package_is_imported() -> None:
    assert {name.replace("-", "_") for name in REQUIREMENTS} <= imported_packages()


def test_every_extra_of_the_service_is_imported_and_tested_with() -> None:
    extras = PROJECT["optional-dependencies"]
    assert imported_packages() >= EXTRAS
    assert {line for name in OF_THE_SERVICE for line in extras[name]} <= set(extras["test"])


def test_torch_is_pinned_and_every_other_dependency_has_an_upper_bound() -> None:
    assert str(REQUIREMENTS["torch"].specifier) == "==2.13.0"
    bounds = {name: {part.operator for part in r.specifier} for name, r in REQUIREMENTS.items() if name != "torch"}
    assert {name for name, operators in bounds.items() if operators != {">=", "<"}} == set()


def test_transformers_is_pinned_to_one_minor_version() -> None:
    (upper,) = (part.version for part in REQUIREMENTS["transformers"].specifier if part.operator == "<")
    (lower,) = (part.version for part in REQUIREMENTS["transformers"].specifier if part.operator == ">=")
    assert Version(upper).major == Version(lower).major
    assert Version(upper).minor == Version(lower).minor + 1


def test_python_3_11_is_enough() -> None:
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_command_is_a_function() -> None:
    module, _, function = PROJECT["scripts"]["pennyweight"].partition(":")
    assert callable(getattr(import_module(module), function))


def held_files(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def source_files() -> set[str]:
    """All that is there to run, which sources of the kernel library are not, nor what is built of them."""
    paths = (path for path in (ROOT / "service").rglob("*") if path.is_file() and path.suffix != ".so")
    return {str(p.relative_to(ROOT)) for p in paths if "__pycache__" not in p.parts and NATIVE not in p.parents}


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_wheel_holds_every_file_of_the_service_and_the_kernel_library(wheel: zipfile.ZipFile) -> None:
    assert held_files(wheel) == source_files() | {KERNELS}


def test_without_a_compiler_a_wheel_has_no_kernel_library_and_the_same_name(
    wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tools = tmp_path_factory.mktemp("tools")
    for name in ("cmake", "ninja"):
        tool = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert tool is not None
        (tools / name).symlink_to(tool)
    bare = build_wheel(tmp_path_factory, PATH=str(tools), CXX="", CC="")
    assert held_files(bare) == source_files()
    assert Path(str(bare.filename)).name == Path(str(wheel.filename)).name


def test_a_wheel_is_for_every_python_of_this_platform(wheel: zipfile.ZipFile) -> None:
    _, _, python, abi, _ = Path(str(wheel.filename)).stem.split("-")
    assert (python, abi) == ("py3", "none")


def test_a_wheel_holds_the_demo_model_byte_for_byte(wheel: zipfile.ZipFile) -> None:
    for path in model_folder().iterdir():
        assert wheel.read(f"service/demo/model/{path.name}") == path.read_bytes()


def test_a_wheel_holds_the_licence_and_says_which_it_is(wheel: zipfile.ZipFile) -> None:
    folder = f"pennyweight-{__version__}.dist-info"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert wheel.read(f"{folder}/licenses/LICENSE").decode() == text
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", text)
    assert (metadata["Name"], metadata["Version"]) == ("pennyweight", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_changelog_tells_of_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert __version__ in changelog
    assert "## [Unreleased]" in changelog
