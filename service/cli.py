"""The command `pennyweight`. Exit codes: 0 done, 1 failed, 2 bad usage or setting, 3 does not fit."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence

from service import __version__
from service.access import read_access
from service.app import run
from service.commands import bench_kernels, bench_serve, doctor, evaluate, inspect, plan, quantize
from service.errors import PennyweightError, SettingError
from service.invocation import (
    COMMANDS,
    Invocation,
    read_evaluation,
    read_inspection,
    read_invocation,
    read_kernel_bench,
    read_serve_bench,
)
from service.reports.quantize_options import parse_output
from service.settings import Settings, as_toml, read_hub_token

logger = logging.getLogger(__name__)

_USAGE = """usage: pennyweight serve [MODEL] [options]
       pennyweight plan [MODEL] [--quantize RECIPE] [--memory SIZE] [--json] [options]
       pennyweight quantize [MODEL] [--quantize RECIPE] --output DIR [--json] [options]
       pennyweight inspect [MODEL] [--quantize RECIPE] [--plot DIR] [--json] [options]
       pennyweight evaluate [MODEL] [--quantize "R1;R2"] [--text FILE] [--plot FILE] [--json] [options]
       pennyweight doctor [--json] [options]
       pennyweight bench kernels [--json] [options]
       pennyweight bench serve --url URL [--url URL] [--json] [options]

Serves a Hugging Face causal language model, quantized while it loads.

commands:
{commands}

options:
  --help      this text; `pennyweight serve --help` lists the options
  --version   print the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except PennyweightError as error:
        print(f"pennyweight: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pennyweight: interrupted", file=sys.stderr)
        return 130  # as shells count a signal
    except BrokenPipeError:  # who read it has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's own flush fails
        return 1
    return code


def _dispatch(words: list[str]) -> int:
    available = ", ".join(COMMANDS)
    if words in (["--help"], ["-h"]):
        print(_USAGE.format(commands="\n".join(f"  {name:10}  {text}" for name, text in COMMANDS.items())), end="")
        return 0
    if words == ["--version"]:
        print(f"pennyweight {__version__}")
        return 0
    if not words:
        raise SettingError(f"no command given; available: {available}; see `pennyweight --help`")
    command, *rest = words
    if command not in COMMANDS:
        raise SettingError(f"{command} is not part of version {__version__}; available: {available}")
    if command == "doctor":
        return _doctor(rest)
    if command == "plan":
        invocation = read_invocation(rest, os.environ, command)
        return plan(invocation.settings, as_json=invocation.as_json)
    if command == "quantize":
        invocation = read_invocation(rest, os.environ, command)
        output = parse_output(invocation.words["output"])
        return quantize(output, invocation.settings, as_json=invocation.as_json)
    if command == "inspect":
        folder, invocation = read_inspection(rest, os.environ)
        return inspect(folder, invocation.settings, as_json=invocation.as_json)
    if command == "evaluate":
        evaluation, invocation = read_evaluation(rest, os.environ)
        return evaluate(evaluation, invocation.settings, as_json=invocation.as_json)
    if command == "bench":
        return _bench(rest)
    return _serve(read_invocation(rest, os.environ, command))


def _serve(invocation: Invocation) -> int:
    settings = invocation.settings
    if invocation.print_config:
        print(json.dumps(settings.model_dump(mode="json"), indent=2) if invocation.as_json else as_toml(settings))
        return 0
    if invocation.as_json:
        raise SettingError("--json: serve prints nothing but its settings; give --print-config as well")
    try:
        return run(settings, ignored_variables=invocation.ignored_variables)
    except PennyweightError as error:
        if settings.log_format == "json":
            logger.error("%s", error)
            return error.exit_code
        raise


def _doctor(words: list[str]) -> int:
    """A wrong command line is bad usage; what else is wrong a doctor is there to find."""
    errors = []
    try:
        invocation = read_invocation(words, os.environ, "doctor")
    except SettingError as error:
        invocation = read_invocation(words, {}, "doctor")
        errors.append(str(error))
    settings = None if errors else invocation.settings
    if settings is not None:
        try:
            _check_secrets(settings)
        except SettingError as error:
            errors.append(str(error))
    return doctor(settings, errors, as_json=invocation.as_json)


def _check_secrets(settings: Settings) -> None:
    """Read the files and variables that hold secrets, as a service would.

    Raises:
        SettingError: one of them is wrong.
    """
    if settings.hf_token_file is not None:
        read_hub_token(settings.hf_token_file)
    read_access(settings, os.environ)


def _bench(words: list[str]) -> int:
    available = "write `pennyweight bench kernels` or `pennyweight bench serve`"
    if not words:
        raise SettingError(f"bench: nothing to measure was named; {available}")
    subject, *rest = words
    if subject in ("--help", "-h"):
        print("usage: pennyweight bench kernels [options]\n       pennyweight bench serve --url URL [options]\n")
        print(f"{COMMANDS['bench']} `pennyweight bench kernels --help` and `... serve --help` list the options.")
        return 0
    if subject == "serve":
        serve_bench, as_json = read_serve_bench(rest, os.environ)
        return bench_serve(serve_bench, as_json=as_json)
    if subject != "kernels":
        raise SettingError(f"bench {subject}: version {__version__} has no such benchmark; {available}")
    bench, invocation = read_kernel_bench(rest, os.environ)
    return bench_kernels(bench, invocation.settings, as_json=invocation.as_json)
