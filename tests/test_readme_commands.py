"""Every command of the README is run, or checked as far as it can be where it cannot; one without a check fails.

Ports, hub ids and durations are replaced: services take a free port and are only seen to begin, models are the demo
model, benchmarks are short. What needs Docker is held against the compose files.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from service.demo import model_folder
from tests.deploy.support import REQUIRE_TOOLS, read_compose
from tests.e2e.support import clean_environment, ready, started
from tests.floors import ROOT

pytestmark = pytest.mark.e2e

README = (ROOT / "README.md").read_text(encoding="utf-8")
URL = "http://127.0.0.1:8000"
HUB_ID = "HuggingFaceTB/SmolLM2-135M"
QUANTIZED = "smollm2-w4"
PYTHON = "python:\n"
"""Before the text of a block of Python, which is one command."""
TIMEOUT_S = 120

_COMMENT = re.compile(r"\s{2,}#\s.*$")


def commands_of(text: str) -> list[str]:
    """Commands in the code blocks of a text, without comments, in their order."""
    commands: list[str] = []
    for language, lines in _blocks(text):
        if language == "python":
            commands.append(PYTHON + "\n".join(lines))
            continue
        command = ""
        for line in lines:
            command += ("\n" if command else "") + _COMMENT.sub("", line)
            if command.strip() and _is_whole(command):
                commands.append(command.strip())
                command = ""
        assert not command.strip(), f"a command of the README has no end: {command}"
    return commands


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Lines that are fenced, with the language, or indented by four blanks behind an empty line."""
    for part in re.split(r"^(```\w*\n.*?^```)$", text, flags=re.MULTILINE | re.DOTALL):
        if part.startswith("```"):
            head, *lines, _ = part.split("\n")
            yield head.removeprefix("```"), lines
            continue
        for paragraph in re.split(r"\n\s*\n", "\n" + part):
            lines = paragraph.strip("\n").split("\n")
            if all(line.startswith("    ") for line in lines):
                yield "", [line.removeprefix("    ") for line in lines]


def _is_whole(command: str) -> bool:
    """Whether no line follows: no quotation is open, and no backslash stands at the end."""
    try:
        shlex.split(command)
    except ValueError:
        return False
    return not command.endswith("\\")


class Workplace:
    """What commands are run with.

    Attributes:
        url: of a service of the demo model.
        folder: where they are run.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        programs = folder / "programs"
        programs.mkdir()
        program = programs / "pennyweight"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m service "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = clean_environment() | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(self, command: str) -> str:
        """What a command prints; it must end with 0."""
        words = ["bash", "-euo", "pipefail", "-c", command]
        return self._run(words)

    def run_python(self, text: str) -> str:
        """What a program prints."""
        return self._run([sys.executable, "-c", text])

    def _run(self, words: list[str]) -> str:
        result = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with ready() as (_, client):
        yield Workplace(str(client.base_url).rstrip("/"), tmp_path_factory.mktemp("readme"))


Check = Callable[[str, Workplace], None]


def asks(expected: str) -> Check:
    """A client of the service; its answer holds a text."""

    def check(command: str, workplace: Workplace) -> None:
        need(command.split()[0])
        assert re.search(expected, workplace.run(command.replace(URL, workplace.url)))

    return check


def need(program: str) -> None:
    """Skip where a program is not installed, unless the environment says that it must be."""
    if shutil.which(program) is None:
        if os.environ.get(REQUIRE_TOOLS) == "1":
            pytest.fail(f"{program} is not installed, and {REQUIRE_TOOLS}=1")
        pytest.skip(f"{program} is not installed")


def writes(command: str, workplace: Workplace) -> None:
    """A Python client, which prints a text."""
    assert workplace.run_python(command.removeprefix(PYTHON).replace(URL, workplace.url)).strip()


def serves(command: str, workplace: Workplace) -> None:
    """A service begins, answers, and ends at a signal."""
    program, subcommand, *words = shlex.split(command)
    assert (program, subcommand) == ("pennyweight", "serve")
    if "--port" in words:
        place = words.index("--port")
        del words[place : place + 2]  # another is taken
    keys = workplace.folder / "keys"
    paths = {HUB_ID: str(model_folder()), "keys": str(keys), QUANTIZED: str(workplace.folder / QUANTIZED)}
    words = [paths.get(word, word) for word in words]
    with started(*words) as server, server.client() as client:
        assert client.get("/livez").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0, server.log


def installs(command: str, workplace: Workplace) -> None:
    """`.ci/run` installs with the first part, and runs the tests; the service of `workplace` is `pennyweight serve`."""
    install, _, then = command.partition(" && ")
    assert install.startswith("pip install -e ")
    assert then in ("pennyweight serve", "pytest")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "pip install --quiet -e '.[test]'" in lines
    assert then == "pennyweight serve" or then in lines


def runs(*more: str, model: bool = False, creates: tuple[str, ...] = (), needs: tuple[str, ...] = ()) -> Check:
    """A command that ends, with more options that make it short; it writes files."""

    def check(command: str, workplace: Workplace) -> None:
        for program in needs:
            need(program)
        command = " ".join([command, *more])
        if model:
            assert HUB_ID in command
            command = command.replace(HUB_ID, shlex.quote(str(model_folder())))
        workplace.run(command)
        assert [name for name in creates if not (workplace.folder / name).stat().st_size] == []

    return check


def measures(command: str, workplace: Workplace) -> None:
    """`bench serve`, of one service under one name or under two."""
    port = workplace.url.rpartition(":")[2]
    hosts = {"8000": "127.0.0.1", "8001": "127.0.0.1", "8002": "localhost"}
    command = re.sub(r"http://127\.0\.0\.1:(\d+)", lambda found: f"http://{hosts[found[1]]}:{port}", command)
    printed = workplace.run(f"{command} --clients 1 --requests 2 --prompt-tokens 8 --max-tokens 8")
    assert "0 of 2" in printed
    assert ("KL at least" in printed) == (command.count("--url") == 2)
    if "--plot" in command:
        assert (workplace.folder / "figures.png").read_bytes().startswith(b"\x89PNG")


def composes(command: str, workplace: Workplace) -> None:
    """The files that are named exist and follow the specification, and know each variable and profile."""
    assert composition_problems(command) == []


def composition_problems(command: str) -> list[str]:
    words = shlex.split(command)
    place = words.index("docker")
    assert words[place + 1] == "compose"
    variables = dict(word.split("=", 1) for word in words[:place])
    files: list[str] = []
    profiles: list[str] = []
    rest = words[place + 2 :]
    while rest and rest[0] in ("-f", "--profile"):
        (files if rest[0] == "-f" else profiles).append(rest[1])
        rest = rest[2:]
    problems = [f"{name}: no such file" for name in files if not (ROOT / name).is_file()]
    paths = [ROOT / name for name in files or ["docker-compose.yml"] if (ROOT / name).is_file()]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    problems += [f"{name}: no variable of the files" for name in variables if not _knows(text, name)]
    services = {name: s for path in paths for name, s in read_compose(path)["services"].items()}
    known = {profile for service in services.values() for profile in service.get("profiles", [])}
    problems += [f"{name}: no profile of the files" for name in profiles if name not in known]
    subcommand, *named = rest or [""]
    if subcommand != "up":
        problems.append(f"{subcommand}: no command that this test knows")
    return problems + [f"{name}: no service of the files" for name in named if name not in services]


def _knows(text: str, variable: str) -> bool:
    """Whether a compose file replaces a variable in its text, or passes it on."""
    return re.search(rf"\$\{{{variable}\b|^\s*(- )?{variable}:?\s*$", text, re.MULTILINE) is not None


CHECKS: Mapping[str, Check] = {
    "pip install -e . && pennyweight serve": installs,
    "pip install -e '.[test]' && pytest": installs,
    "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
    '  -d \'{"model": "pennyweight-demo", "prompt": "\\"I am afraid,\\" said the old man,", "max_tokens": 24, '
    '"temperature": 0}\'': asks(r'"text": ?" ?\S'),
    PYTHON: writes,
    f"pennyweight serve {HUB_ID} --quantize w4a16-g64": serves,
    "docker compose up": composes,
    f"PENNYWEIGHT_MODEL={HUB_ID} docker compose up": composes,
    "MODELS_DIR=$HOME/models PENNYWEIGHT_MODEL=/models/my-llama docker compose up": composes,
    "docker compose -f docker-compose.yml -f deploy/gpu.yml up": composes,
    "docker compose -f docker-compose.yml -f deploy/api-keys.yml up": composes,
    "docker compose -f docker-compose.yml -f deploy/hub-token.yml up": composes,
    "docker compose --profile squeeze up squeeze-baseline squeeze-quantized": composes,
    "pennyweight serve --port 8001 --quantize none --cors-origin http://127.0.0.1:8000,http://localhost:8000": serves,
    "pennyweight serve --twin http://127.0.0.1:8001": serves,
    "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d "
    """'{"prompt": "The captain was",...""": asks("name"),
    "curl -s http://127.0.0.1:8000/metrics | grep ^pennyweight_weight": asks(
        r"pennyweight_weight_saving_ratio\{.* 0\.49"
    ),
    f"pennyweight plan {HUB_ID} --quantize w8a16 --memory 1GiB": runs(model=True),
    f"pennyweight inspect {HUB_ID} --quantize w4a16-g64 --plot plots": runs(
        "--threads 1", model=True, creates=("plots/errors.png", "plots/histograms.png", "plots/codes.png")
    ),
    f'pennyweight evaluate {HUB_ID} --quantize "w8a16;w4a16-g64;nf4" --plot quality.png': runs(
        "--windows 1 --threads 1", model=True, creates=("quality.png",)
    ),
    f"pennyweight quantize {HUB_ID} --quantize w4a16-g64 --output {QUANTIZED}": runs(
        "--threads 1", model=True, creates=(f"{QUANTIZED}/pennyweight.json",)
    ),
    f"pennyweight serve {QUANTIZED}": serves,
    "pennyweight doctor": runs(),
    'echo "alice:$(openssl rand -hex 32)" >> keys': runs(creates=("keys",), needs=("openssl",)),
    "pennyweight serve --api-keys-file keys --rate-limit 60/minute --max-concurrent-requests 8": serves,
    "pennyweight bench kernels --output figures.json": runs(
        *(
            "--shapes 64x32 --rows 1 --schemes w8a16",
            "--seconds-per-point 0.001 --footprint 64KiB --encoder-parameters 0",
        ),
        creates=("figures.json",),
    ),
    "pennyweight bench serve --url http://127.0.0.1:8000": measures,
    "pennyweight serve --port 8001 --quantize none": serves,
    "pennyweight serve --port 8002": serves,
    "pennyweight bench serve --url http://127.0.0.1:8001 --url http://127.0.0.1:8002 --output figures.json "
    "--plot figures.png": measures,
}
"""By the command, or by its beginning where `...` ends it; a block of Python by `PYTHON` alone."""

COMMANDS = commands_of(README)


def known_as(command: str) -> str | None:
    """The key in `CHECKS` of a command; None if it has none."""
    if command.startswith(PYTHON):
        return PYTHON
    if command in CHECKS:
        return command
    begins = [known for known in CHECKS if known.endswith("...")]
    return next((known for known in begins if command.startswith(known.removesuffix("..."))), None)


def test_every_command_of_the_readme_has_a_check() -> None:
    assert "docker compose up" in COMMANDS
    assert [command for command in COMMANDS if known_as(command) is None] == [], "say in CHECKS how they are checked"


def test_every_check_is_of_one_command() -> None:
    assert sorted(filter(None, map(known_as, COMMANDS))) == sorted(CHECKS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.splitlines()[0][:60])
def test_a_command_of_the_readme_works(command: str, workplace: Workplace) -> None:
    known = known_as(command)
    assert known is not None, f"say in CHECKS how this is checked: {command}"
    CHECKS[known](command, workplace)


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("Text:\n\n    one\n    two -a   # why\n\nText.\n", ["one", "two -a"]),
        ("    curl x \\\n      -d y\n", ["curl x \\\n  -d y"]),
        ("    curl -d '{\n      \"a\": 1}'\n    next\n", ["curl -d '{\n  \"a\": 1}'", "next"]),
        ("```python\nprint(1)\n\nprint(2)\n```\n", [f"{PYTHON}print(1)\n\nprint(2)"]),
        ("```\none\n```\n", ["one"]),
        ("- a list\n  that goes on\n", []),
        ("    a # no comment\n\n    b\n", ["a # no comment", "b"]),
    ],
)
def test_commands_are_found_in_blocks(text: str, commands: list[str]) -> None:
    assert commands_of(text) == commands


def test_a_new_command_has_no_check() -> None:
    assert known_as("pennyweight fly --to moon") is None
    assert known_as("docker compose up --detach") is None


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("docker compose -f docker-compose.yml -f deploy/none.yml up", "deploy/none.yml: no such file"),
        ("NO_SUCH_THING=5 docker compose up", "NO_SUCH_THING: no variable of the files"),
        ("docker compose --profile none up", "none: no profile of the files"),
        ("docker compose fly", "fly: no command that this test knows"),
        ("docker compose up baseline nobody", "nobody: no service of the files"),
    ],
)
def test_a_composition_that_is_not_there_is_found(command: str, problem: str) -> None:
    assert composition_problems(command) == [problem]
