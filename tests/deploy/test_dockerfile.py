"""The Dockerfile makes two images that run without root, keep their files and know whether they serve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service.invocation import read_invocation
from tests.deploy.support import DEPLOY, read_compose
from tests.floors import ROOT

LINES = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M))
INSTRUCTIONS = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in LINES.splitlines() if line]
TARGETS = ["cpu", "gpu"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage, its FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for keyword, rest in INSTRUCTIONS:
        if keyword == "FROM":
            found[rest.split(" AS ")[1]] = []
        if found:
            found[list(found)[-1]].append((keyword, rest))
    return found


def image(target: str) -> list[tuple[str, str]]:
    """Instructions that make a target, those of the stages it starts from included."""
    instructions = stages()[target]
    parent = instructions[0][1].split(" AS ")[0]
    return (image(parent) if parent in stages() else []) + instructions


def last(target: str, keyword: str) -> str:
    return [rest for word, rest in image(target) if word == keyword][-1]


def environment(target: str) -> dict[str, str]:
    pairs = [pair for word, rest in image(target) if word == "ENV" for pair in rest.split()]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def test_the_only_image_from_elsewhere_is_the_base() -> None:
    own = set(stages())
    sources = {rest.split(" AS ")[0] for word, rest in INSTRUCTIONS if word == "FROM"}
    copied = {match[1] for word, rest in INSTRUCTIONS if word == "COPY" and (match := re.search(r"--from=(\S+)", rest))}
    assert (sources | copied) - own == {"${BASE_IMAGE}"}
    assert not re.search(r"\b(ADD|curl|wget|git clone)\b|# *syntax", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_the_base_image_has_a_version() -> None:
    (base,) = [rest for word, rest in INSTRUCTIONS if word == "ARG" and rest.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"BASE_IMAGE=python:3\.1[12]-slim-\w+", base)
    assert "latest" not in LINES


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_fixed_user_that_is_not_root(target: str) -> None:
    assert last(target, "USER") == "10001:10001"


@pytest.mark.parametrize("target", TARGETS)
def test_everything_that_is_written_lies_in_volumes_of_the_user(target: str) -> None:
    volumes = last(target, "VOLUME").split()
    assert {environment(target)[name] for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME")} == set(volumes)
    (made,) = [rest for word, rest in image(target) if word == "RUN" and "install --directory" in rest]
    assert made.endswith(f"install --directory --owner=10001 --group=10001 {' '.join(volumes)}")
    assert environment(target)["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_serves_on_all_addresses_at_the_port_that_it_names(target: str) -> None:
    variables = {name: value for name, value in environment(target).items() if name.startswith("PENNYWEIGHT_")}
    settings = read_invocation([], variables).settings
    assert (settings.host, str(settings.port)) == ("0.0.0.0", last(target, "EXPOSE"))
    assert json.loads(last(target, "ENTRYPOINT")) == ["pennyweight", "serve"]
    assert last(target, "STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("target", TARGETS)
def test_no_compiler_is_in_an_image(target: str) -> None:
    assert not [rest for word, rest in image(target) if word == "RUN" and "apt-get" in rest]
    assert any("g++" in rest for word, rest in image("builder") if word == "RUN")


def test_sources_are_copied_after_the_dependencies_are_installed() -> None:
    builder = image("builder")
    copied = builder.index(("COPY", ". ."))
    assert [rest for word, rest in builder[copied:] if word == "RUN"] == ["pip install --no-deps ."]


class Answer(BaseHTTPRequestHandler):
    """Answers `/readyz` with the server's status, and anything else with 404."""

    def do_GET(self) -> None:
        assert isinstance(self.server, AnsweringServer)
        self.send_response(self.server.status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


class AnsweringServer(HTTPServer):
    """Answers one request with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = status


def run_health_check(status: int) -> int:
    """Exit code of the image's health check against a server on another port, behind a proxy that is not there."""
    program, *arguments = json.loads(last("cpu", "HEALTHCHECK").partition("CMD ")[2])
    assert program == "python"
    with AnsweringServer(status) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        variables = {"PENNYWEIGHT_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:9"}
        code = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, check=False).returncode
        thread.join()
    return code


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)], ids=["ready", "loading"])
def test_the_health_check_passes_only_while_the_server_is_ready(status: int, code: int) -> None:
    assert run_health_check(status) == code


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("torch", {"torch"}),
        ("gpu", {"triton"}),
        ("grammar", {"llguidance"}),
        ("all", {"torch", "transformers", "fastapi"}),
    ],
    ids=["torch", "gpu", "grammar", "all"],
)
def test_requirements_are_those_of_the_project(selection: str, names: set[str]) -> None:
    script = [sys.executable, str(DEPLOY / "requirements.py"), str(ROOT / "pyproject.toml"), selection]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split("\n")
    assert names <= {re.split(r"[=<>]", line)[0] for line in printed}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(filter(None, printed)) <= {*project["dependencies"], *extras["gpu"], *extras["grammar"]}


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_can_follow_grammars(target: str) -> None:
    (copied,) = [rest for word, rest in image(target) if word == "COPY"]
    builder = copied.split()[0].removeprefix("--from=")
    installed = " ".join(rest for word, rest in image(builder) if word == "RUN")
    assert "requirements.py pyproject.toml grammar > requirements-grammar.txt" in installed
    assert re.search(r"pip install .*--requirement requirements-grammar\.txt", installed)


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    assert {path for path in kept if not (ROOT / path).exists()} == set()
    assert {"pyproject.toml", "service", "README.md", "LICENSE", "deploy/requirements.py"} == set(kept)


def test_the_targets_are_those_that_compose_builds() -> None:
    compose, gpu = (read_compose(path)["services"] for path in (ROOT / "docker-compose.yml", DEPLOY / "gpu.yml"))
    assert {compose["baseline"]["build"]["target"], gpu["baseline"]["build"]["target"]} == set(TARGETS)
    arguments = {rest.partition("=")[0] for word, rest in INSTRUCTIONS if word == "ARG"}
    assert set(compose["baseline"]["build"]["args"]) <= arguments
