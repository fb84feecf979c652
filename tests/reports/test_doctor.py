"""What a doctor finds: facts against psutil and torch, and each problem with its remedy."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from service import __version__
from service.kernels import dispatch, native
from service.reports.doctor import Diagnosis, Problem, examine, print_diagnosis
from service.settings import Settings


def _examine(**changes: Any) -> Diagnosis:
    return examine(Settings.model_validate({"port": 0} | changes).model_dump(mode="json"))


def _problem(diagnosis: Diagnosis, words: str) -> Problem:
    (problem,) = [problem for problem in diagnosis.problems if words in problem.message]
    assert problem.remedy
    return problem


def test_facts_are_those_of_this_machine() -> None:
    found = json.loads(json.dumps(_examine().as_dict()))
    fields = {"version", "python", "torch", "cpu", "kernels", "threads", "devices", "memory", "settings", "problems"}
    assert fields <= found.keys()
    assert (found["version"], found["torch"]) == (__version__, torch.__version__)
    assert found["memory"]["total_bytes"] == psutil.virtual_memory().total
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["cpu"]["logical_cpus"] == os.cpu_count()
    assert ("avx2" in found["cpu"]["features"]) == torch.cpu._is_avx2_supported()
    assert found["kernels"]["in_use"] == dispatch.choose("auto").kernel
    assert found["kernels"]["usable"][0] == "torch"
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["threads"]["in_use"] <= len(os.sched_getaffinity(0))


def test_a_good_machine_has_no_error() -> None:
    assert _examine().exit_code == 0


def test_the_number_of_threads_that_was_chosen_is_told() -> None:
    assert _examine(threads=1).threads["in_use"] == 1
    assert _examine(threads=1).threads["limited_by"] == "--threads"
    found = _examine(threads=1024)
    assert _problem(found, "--threads 1024: ").severity == "warning"
    assert found.exit_code == 0


def test_the_cache_is_measured(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a").write_bytes(bytes(1000))
    (blobs / "b").write_bytes(bytes(24))
    hub = _examine(cache_dir=str(tmp_path)).hub
    assert (hub["cache_dir"], hub["cache_bytes"], hub["is_writable"]) == (str(tmp_path), 1024, True)


def test_the_cache_of_quantized_models_is_measured(tmp_path: Path) -> None:
    for name in ("a" * 64, "b" * 64, "c" * 64 + ".tmp"):
        (tmp_path / "pennyweight" / name).mkdir(parents=True)
        (tmp_path / "pennyweight" / name / "tensors.bin").write_bytes(bytes(512))
    found = _examine(cache_dir=str(tmp_path), cache_limit="1MiB").artifacts
    folder = str(tmp_path / "pennyweight")
    assert found == {
        "cache_dir": folder,
        "is_writable": True,
        "count": 2,
        "cache_bytes": 1024,
        "limit_bytes": 2**20,
    }
    assert _examine(cache_dir=str(tmp_path), cache_limit=0).artifacts["cache_dir"] is None
    missing = _examine(cache_dir=str(tmp_path / "none")).artifacts
    assert (missing["count"], missing["is_writable"]) == (0, True)


def test_a_cache_that_is_yet_to_be_made_is_writable_where_its_parent_is(tmp_path: Path) -> None:
    assert _examine(cache_dir=str(tmp_path / "a" / "b"), model="org/name").exit_code == 0


@pytest.mark.parametrize(
    ("model", "severity"), [("org/name", "error"), (None, "warning"), ("/", "warning")], ids=["hub", "demo", "local"]
)
def test_a_cache_that_cannot_be_written_is_an_error_where_it_is_needed(
    tmp_path: Path, model: str | None, severity: str
) -> None:
    (tmp_path / "file").touch()
    found = _examine(cache_dir=str(tmp_path / "file" / "cache"), model=model)
    assert _problem(found, "cannot be written").severity == severity
    assert found.exit_code == (severity == "error")


def test_a_port_in_use_is_a_warning_and_a_wrong_host_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = _examine(port=port)
    assert _problem(found, f"--port {port}: it is in use").severity == "warning"
    assert found.exit_code == 0
    found = _examine(host="192.0.2.1")
    assert _problem(found, "--host 192.0.2.1").severity == "error"
    assert found.exit_code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_a_device_that_is_not_there_is_an_error() -> None:
    assert _problem(_examine(device="cuda"), "--device cuda").severity == "error"


def test_kernels_are_those_of_the_setting_with_the_reason() -> None:
    selected = dispatch.kernel_name()
    kernels = _examine(kernel_isa="torch").kernels
    assert (kernels["in_use"], kernels["why"]) == ("torch", "--kernel-isa says so")
    assert dispatch.kernel_name() == selected


@pytest.mark.parametrize("isa", [isa for isa in dispatch.ISAS if dispatch.obstacle(isa)])
def test_kernels_that_the_machine_lacks_are_an_error_with_the_others(isa: str) -> None:
    found = _examine(kernel_isa=isa)
    problem = _problem(found, f"--kernel-isa {isa}: {dispatch.obstacle(isa)}")
    assert (problem.severity, found.exit_code) == ("error", 1)
    usable = found.kernels["usable"]
    assert problem.remedy == f"use {', '.join(['auto', *usable[:-1]])} or {usable[-1]}"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Look for the kernel library where it is not."""
    monkeypatch.setattr(native, "PATH", tmp_path / "library.so")
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_a_missing_kernel_library_is_a_warning() -> None:
    found = _examine()
    problem = _problem(found, "the kernel library is not installed")
    assert (problem.severity, found.exit_code) == ("warning", 0)
    assert found.kernels["in_use"] == "torch"
    assert found.kernels["why"] in problem.message


@pytest.mark.usefixtures("no_library")
def test_a_missing_compiler_is_part_of_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = _examine()
    assert found.kernels["compiler"] is None
    assert "install g++" in _problem(found, "the kernel library is not installed").remedy


@pytest.mark.skipif(native.load().library is None, reason="there is no kernel library")
def test_with_the_kernel_library_a_missing_compiler_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not [problem for problem in _examine().problems if "compiler" in problem.message + problem.remedy]


def test_a_token_is_told_by_its_source_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert _examine().hub["token"] is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = _examine()
    assert found.hub["token"] == "HF_TOKEN"
    assert "hf_secret" not in json.dumps(found.as_dict())


def test_without_settings_their_errors_are_told() -> None:
    found = examine({}, ["PENNYWEIGHT_PROT=5: no setting"])
    assert found.settings == {}
    assert found.problems[0].message == "PENNYWEIGHT_PROT=5: no setting"
    assert found.exit_code == 1


def test_people_see_every_fact_and_every_problem() -> None:
    found = _examine(threads=1024, model="[bold]org/name")
    screen = io.StringIO()
    print_diagnosis(found, Console(file=screen, width=200))
    text = screen.getvalue()
    for name in found.settings:
        assert re.search(rf"^(settings)? +{name} ", text, re.MULTILINE), name
    assert "[bold]org/name" in text
    assert "warning: --threads 1024: " in text
