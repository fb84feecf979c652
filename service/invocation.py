"""From a command line, the environment and a TOML file to checked settings; each goes before the next."""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsConfigDict

from service import __version__
from service.errors import RecipeError, SettingError, shown
from service.numerics.recipe import parse_recipe
from service.reports import bench_options, bench_serve_options, evaluate_options, inspect_options, quantize_options
from service.reports.bench_options import KernelBench
from service.reports.bench_serve_options import KEY_VARIABLE, ServeBench
from service.reports.evaluate_options import Evaluation
from service.settings import SECRETS, Settings, Size, as_quantized

ENVIRONMENT_PREFIX = "PENNYWEIGHT_"
COMMANDS = {
    "serve": "Load a model, quantize it while it loads, and serve it over HTTP.",
    "plan": "Tell from config and headers alone what a load will take, and whether that fits; reads no weights.",
    "quantize": "Write the quantized model into a folder of its own, which `pennyweight serve` starts from.",
    "inspect": "Tell what a recipe makes of each layer: scheme, bytes, error; it reads and encodes all weights.",
    "evaluate": "Compare recipes (semicolons between them) with the unquantized model on a text: quality and size.",
    "doctor": "Tell what this machine offers, which settings are in force, and what is in the way of a service.",
    "bench": "Measure: `bench kernels` times products with packed weights beside a read and beside bf16 linear; "
    "`bench serve` puts load on one running server, or on two in turns.",
}
"""Every command and what it does."""

_OWN_FLAGS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": inspect_options.add_options,
    "evaluate": evaluate_options.add_options,
    "quantize": quantize_options.add_options,
}
"""Flags of a command that are no settings."""

_CONFIG = "config"
_BENCH_SETTINGS = ("threads", "kernel_isa")
_NOT_SET = "\0"  # no argument can hold it, so no argument is taken for None
_KUBERNETES_LINK = re.compile(r"PENNYWEIGHT_(SERVICE_.*|PORT_\d+_(TCP|UDP|SCTP).*)|PENNYWEIGHT_PORT=\w+://.*")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_SUBJECT = re.compile(r"^(Input|String|Value) should")


class _Sources(BaseSettings, Settings):
    """`Settings` as pydantic-settings reads them; values are checked when all sources are put together."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str=_NOT_SET,
        enable_decoding=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What a command line asks for.

    Attributes:
        as_json: `--json` was given.
        words: all words of the command line by name, those of the command's own flags among them.
        ignored_variables: PENNYWEIGHT_ variables that are Kubernetes' and no settings.
    """

    settings: Settings
    print_config: bool
    as_json: bool
    words: Mapping[str, Any]
    ignored_variables: tuple[str, ...]


def read_invocation(arguments: Sequence[str], environment: Mapping[str, str], command: str = "serve") -> Invocation:
    """Put together flags, environment and file.

    `arguments` are what follows `pennyweight COMMAND`.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    words, flags = _read_flags(arguments, command)
    variables, ignored = _read_environment(environment)
    path, origin = words[_CONFIG], flag_of(_CONFIG)
    if path is None:
        path, origin = environment.get(variable_of(_CONFIG)), variable_of(_CONFIG)
    entries = {} if path is None else _read_file(Path(path), origin)
    origins = (
        {name: f"{path}: {name}" for name in entries}
        | {name: variable_of(name) for name in variables}
        | {name: flag_of(name) for name in flags}
    )
    try:
        settings = Settings.model_validate(entries | variables | flags)
        settings = as_quantized(settings)
        (evaluate_options.parse_recipes if command == "evaluate" else parse_recipe)(settings.quantize)
    except ValidationError as error:
        raise SettingError(_describe(error, origins)) from error
    except RecipeError as error:
        raise RecipeError(f"{origins['quantize']}: {error}") from error
    if settings.memory is not None and settings.kv_memory is not None and settings.kv_memory >= settings.memory:
        raise SettingError(
            f"{origins['kv_memory']} {settings.kv_memory} and {origins['memory']} {settings.memory}: keys and values "
            "are part of the memory of the process; raise the one or lower the other"
        )
    if settings.max_kl is not None and settings.fidelity == "off":
        raise SettingError(
            f"{origins.get('fidelity', flag_of('fidelity'))} off and {origins['max_kl']} {settings.max_kl:g}: a limit "
            "needs the comparison; leave one of the two out"
        )
    return Invocation(
        settings=settings,
        print_config=words.get("print_config", False),
        as_json=words["json"],
        words=words,
        ignored_variables=ignored,
    )


def read_inspection(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Path | None, Invocation]:
    """Read what follows `pennyweight inspect`: the folder for pictures, and what it shares with others.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    invocation = read_invocation(arguments, environment, "inspect")
    folder = invocation.words["plot"]
    return None if folder is None else inspect_options.parse_folder(folder), invocation


def read_evaluation(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Evaluation, Invocation]:
    """Read what follows `pennyweight evaluate`.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    invocation = read_invocation(arguments, environment, "evaluate")
    return evaluate_options.read_options(invocation.words, invocation.settings.quantize), invocation


def read_kernel_bench(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[KernelBench, Invocation]:
    """Read what follows `pennyweight bench kernels`; of the settings, it has flags for those that change its figures.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    words = vars(_kernel_bench_parser().parse_args(arguments))
    passed_on = [f"{flag_of(name)}={words[name]}" for name in (_CONFIG, *_BENCH_SETTINGS) if words[name] is not None]
    invocation = read_invocation(passed_on + ["--json"] * words["json"], environment, "bench")
    bench = KernelBench(
        schemes=bench_options.parse_schemes(words["schemes"]),
        shapes=bench_options.parse_shapes(words["shapes"]),
        rows=bench_options.parse_rows(words["rows"]),
        seconds_per_point=bench_options.parse_seconds(words["seconds_per_point"]),
        encoder_parameters=bench_options.parse_encoder_parameters(words["encoder_parameters"]),
        footprint_bytes=None if words["footprint"] is None else _read_footprint(words["footprint"]),
        output=None if words["output"] is None else bench_options.parse_output(words["output"]),
    )
    return bench, invocation


def read_serve_bench(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[ServeBench, bool]:
    """Read what follows `pennyweight bench serve`, and whether JSON is wanted; no setting of a service matters here.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    description = "Put load on a running server, or on two in turns: latency, throughput, memory and quality."
    parser = _Parser(prog="pennyweight bench serve", description=description, allow_abbrev=False)
    bench_serve_options.add_options(parser)
    words = vars(parser.parse_args(arguments))
    return bench_serve_options.read_options(words, environment), words["json"]


def _kernel_bench_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pennyweight bench kernels",
        description="Time products with packed weights beside a read of the same bytes and beside bf16 linear.",
        allow_abbrev=False,
    )
    lists = {
        "schemes": (bench_options.DEFAULT_SCHEMES, "formats, semicolons between them"),
        "shapes": (bench_options.DEFAULT_SHAPES, "KxN, commas between them"),
        "rows": (bench_options.DEFAULT_ROWS, "numbers of rows, commas between them"),
    }
    for name, (default, text) in lists.items():
        parser.add_argument(flag_of(name), default=default, metavar="LIST", help=f"{text} (default: {default})")
    parser.add_argument(
        "--seconds-per-point",
        default=str(bench_options.DEFAULT_SECONDS_PER_POINT),
        metavar="S",
        help="for a shape at one number of rows, all formats together (default: %(default)s)",
    )
    parser.add_argument(
        "--footprint", metavar="SIZE", help="of the copies of a weight (default: twice the caches, at least 256MiB)"
    )
    parser.add_argument(
        "--encoder-parameters",
        default=str(bench_options.DEFAULT_ENCODER_PARAMETERS),
        metavar="N",
        help="of the weight to time the encoders on; 0 leaves them out (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument(flag_of(_CONFIG), metavar="FILE", help="TOML file with settings")
    for name in _BENCH_SETTINGS:
        parser.add_argument(flag_of(name), help=Settings.model_fields[name].description)
    return parser


def _read_footprint(text: str) -> int:
    try:
        return TypeAdapter(Size).validate_python(text)
    except ValidationError as error:
        rule = _SUBJECT.sub("must", error.errors(include_url=False)[0]["msg"])
        raise SettingError(f"--footprint {shown(text)}: {rule}; write 256MiB, or leave it out") from error


def flag_of(name: str) -> str:
    """Flag of a setting."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """Environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


_OTHER_VARIABLES = frozenset((*map(variable_of, (_CONFIG, *SECRETS)), KEY_VARIABLE))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        message = message.removeprefix("argument ")
        raise SettingError(f"{message}; `{self.prog} --help` lists the options of version {__version__}")


def _read_flags(arguments: Sequence[str], command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """All words of a command line by name, and the settings among them."""
    parser = _Parser(prog=f"pennyweight {command}", description=COMMANDS[command], allow_abbrev=False)
    parser.add_argument("MODEL", nargs="?", help="the same as --model")
    parser.add_argument(flag_of(_CONFIG), metavar="FILE", help="TOML file with these settings")
    if command == "serve":
        parser.add_argument("--print-config", action="store_true", help="print the settings in force and exit")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    if command in _OWN_FLAGS:
        _OWN_FLAGS[command](parser)
    source: CliSettingsSource[Any] = CliSettingsSource(_Sources, root_parser=parser, add_argument_method=_add_argument)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise _unknown_word(unknown[0])
    words = vars(parsed)
    flags = source(parsed_args=words)()
    model = words["MODEL"]
    if model is not None:
        if "model" in flags:
            raise SettingError(f"{model} and --model {flags['model']}: two models; give one")
        flags["model"] = model
    return words, flags


def _add_argument(parser: argparse.ArgumentParser, *names: str, **options: Any) -> argparse.Action:
    """Add a flag without a default in its help where that is no value."""
    options["help"] = options["help"].replace(f" (default: {_NOT_SET})", "")
    return parser.add_argument(*names, **options)


def _unknown_word(word: str) -> SettingError:
    if not word.startswith("-"):
        return SettingError(f"{shown(word)}: one word too many; give one MODEL, and values behind their flags")
    flag = word.partition("=")[0]
    return _unknown(flag, flag.lstrip("-").replace("-", "_"), flag_of)


def _read_environment(environment: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Settings of the PENNYWEIGHT_ variables, and names of those that Kubernetes makes for a service."""
    known = {variable_of(name): name for name in Settings.model_fields}
    variables: dict[str, str | None] = {}
    ignored: list[str] = []
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if _KUBERNETES_LINK.fullmatch(variable) or _KUBERNETES_LINK.fullmatch(f"{variable}={value}"):
            ignored.append(variable)
        elif variable in known:
            variables[variable.lower()] = value
        else:
            told = "..." if _SECRET.search(variable) else shown(value)
            raise _unknown(f"{variable}={told}", variable.removeprefix(ENVIRONMENT_PREFIX).lower(), variable_of)
    source = EnvSettingsSource(_Sources)
    source.env_vars = variables
    return source(), tuple(ignored)


def _read_file(path: Path, origin: str) -> dict[str, Any]:
    """Entries of a TOML file, which may be a pipe; pydantic-settings would pass over one that is missing."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{origin} {path}: cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:
        raise SettingError(f"{origin} {path}: not valid TOML ({error}); correct it") from error
    for name, value in entries.items():
        if name not in Settings.model_fields:
            raise _unknown(f"{path}: {name}", name, str)
        if isinstance(value, bool) and Settings.model_fields[name].annotation is not bool:
            raise SettingError(f"{path}: {name}: must be a number or a string; correct it")  # not the number 0 or 1
    return entries


def _unknown(written: str, name: str, spelling: Callable[[str], str]) -> SettingError:
    """The error for what is no setting: `written` by its user, `name` as a field would be called."""
    near = difflib.get_close_matches(name, [*Settings.model_fields, _CONFIG], n=1, cutoff=0.7)
    remedy = f"did you mean {spelling(near[0])}?" if near else "`pennyweight serve --help` lists them"
    return SettingError(f"{written}: no setting of version {__version__}; {remedy}")


def _describe(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Name, value and rule of each wrong value."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        origin = f"{origins[name]} {shown(detail['input'])}"
        rule = _SUBJECT.sub("must", detail["msg"])
        lines[origin] = f"{lines[origin]}, or {rule}" if origin in lines else f"{origin}: {rule}"
    return "; ".join(lines.values())
