"""Settings of `pennyweight serve`: flags over environment over a TOML file, all checked in one place.

`Settings` is the only list of them: flags, variables, help and checks are made from its fields.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from service import __version__
from service.errors import RecipeError, SettingError
from service.numerics.recipe import parse_recipe

ENVIRONMENT_PREFIX = "PENNYWEIGHT_"
_KUBERNETES_LINK = re.compile(r"PENNYWEIGHT_(SERVICE_.*|PORT_\d+_(TCP|UDP|SCTP).*)|PENNYWEIGHT_PORT=\w+://.*")
_SUBJECT = re.compile(r"^(Input|String|Value) should")
_SIZE = re.compile(r"(\d{1,18})\s*([KMGT]i?B|B)?", re.ASCII)
_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_size(value: object) -> object:
    """Bytes of a text such as `64MiB`, `2GB` or `1000`; anything else is left to the type check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise PydanticCustomError("size", "must be a number of bytes, alone or with a unit such as KB, MiB or GiB")
    return int(match[1]) * _UNITS[match[2] or ""]


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=1, le=2**50)]


class Settings(BaseModel):
    """Everything that can be set; None means that a value is worked out when the service starts."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[
        str | None,
        Field(min_length=1, max_length=4096, description="hub id or local directory; the demo model if none"),
    ] = None
    revision: Annotated[
        str | None, Field(min_length=1, max_length=256, description="branch, tag or commit of a hub model")
    ] = None
    served_model_name: Annotated[
        str | None, Field(min_length=1, max_length=256, description="name for clients; default: the model's own")
    ] = None
    quantize: Annotated[
        str, Field(min_length=1, max_length=4096, description="recipe, such as w8a16, w4a16-g64 or none")
    ] = "w8a16"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(description="where the model runs")] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Field(description="of activations and unquantized weights")
    ] = "auto"
    threads: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=1024)],
        Field(description="CPU threads of the engine, 1 to 1024; auto: what affinity, quota and cores allow"),
    ] = "auto"
    host: Annotated[str, Field(min_length=1, max_length=253, description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0: any free one")] = 8000
    max_model_len: Annotated[
        int | None, Field(ge=1, le=2**31 - 1, description="tokens of prompt and answer; default: the model's context")
    ] = None
    max_num_seqs: Annotated[int, Field(ge=1, le=4096, description="sequences computed together")] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=2**20, description="tokens of one step")] = 512
    kv_memory: Annotated[
        Size | None, Field(description="memory for keys and values, such as 64MiB; default: worked out")
    ] = None
    max_queue: Annotated[int, Field(ge=1, le=2**20, description="sequences that may wait")] = 256
    drain_timeout: Annotated[
        float, Field(ge=0, le=86400, allow_inf_nan=False, description="seconds for running requests at the end")
    ] = 30.0
    max_body_bytes: Annotated[Size, Field(ge=1024, le=2**30, description="longest request body")] = 4194304
    failed_linger: Annotated[
        float, Field(ge=0, le=86400, allow_inf_nan=False, description="seconds that /readyz tells of a failed load")
    ] = 0.0
    log_format: Annotated[Literal["text", "json"], Field(description="form of the log on stderr")] = "text"
    cache_dir: Annotated[
        Path | None, Field(description="where hub models are kept; default: huggingface_hub's own place")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """What a command line asks for.

    Attributes:
        ignored_variables: PENNYWEIGHT_ variables that are Kubernetes' and no settings.
    """

    settings: Settings
    print_config: bool
    ignored_variables: tuple[str, ...]


def read_invocation(arguments: Sequence[str], environment: Mapping[str, str]) -> Invocation:
    """Put together flags, environment and file.

    `arguments` are what follows `pennyweight serve`.

    Raises:
        SettingError: a name or a value is wrong, with name, value and rule.
        SystemExit: `--help` was asked for and printed.
    """
    flags = vars(_parser().parse_args(arguments))
    print_config: bool = flags.pop("print_config")
    config_path: str | None = flags.pop("config", None)
    positional: str | None = flags.pop("MODEL")
    if positional is not None:
        if "model" in flags:
            raise SettingError(f"{positional} and --model {flags['model']}: two models; give one")
        flags["model"] = positional
    variables, ignored = _read_environment(environment)
    config_path = variables.pop("config", None) if config_path is None else config_path
    entries = {} if config_path is None else _read_file(Path(config_path))
    origins = (
        {name: f"{config_path}: {name}" for name in entries}
        | {name: ENVIRONMENT_PREFIX + name.upper() for name in variables}
        | {name: flag_of(name) for name in flags}
    )
    try:
        settings = Settings.model_validate(entries | variables | flags)
        parse_recipe(settings.quantize)
    except ValidationError as error:
        raise SettingError(_describe(error, origins)) from error
    except RecipeError as error:
        raise RecipeError(f"{origins['quantize']}: {error}") from error
    return Invocation(settings=settings, print_config=print_config, ignored_variables=ignored)


def flag_of(name: str) -> str:
    """Flag of a setting."""
    return "--" + name.replace("_", "-")


def as_toml(settings: Settings) -> str:
    """Settings as a file for `--config`; those that are not set stand in comments."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        lines.append(f"# {name} =" if value is None else f"{name} = {json.dumps(value)}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SettingError(f"{message}; `pennyweight serve --help` lists the options of version {__version__}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pennyweight serve",
        description="Load a model, quantize it while it loads, and serve it over HTTP.",
        allow_abbrev=False,
    )
    parser.add_argument("MODEL", nargs="?", help="the same as --model")
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(
            flag_of(name), metavar="VALUE", default=argparse.SUPPRESS, help=f"{field.description}{default}"
        )
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="TOML file with these settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force and exit")
    return parser


def _read_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Settings of the PENNYWEIGHT_ variables, and names of those that Kubernetes makes for a service."""
    variables: dict[str, str] = {}
    ignored: list[str] = []
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if _KUBERNETES_LINK.fullmatch(variable) or _KUBERNETES_LINK.fullmatch(f"{variable}={value}"):
            ignored.append(variable)
        elif variable == variable.upper() and name in (*Settings.model_fields, "config"):
            variables[name] = value
        else:
            raise SettingError(f"{variable}={value}: no setting of version {__version__}; unset or correct it")
    return variables, tuple(ignored)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"--config {path}: cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:
        raise SettingError(f"--config {path}: not valid TOML ({error}); correct it") from error
    for name in entries:
        if name not in Settings.model_fields:
            raise SettingError(f"{path}: {name}: no setting of version {__version__}; remove or correct it")
        if isinstance(entries[name], bool):  # which would pass for the number 0 or 1
            raise SettingError(f"{path}: {name}: must be a number or a string; correct it")
    return entries


def _describe(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Name, value and rule of each wrong value."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        name = str(detail["loc"][0])
        origin = f"{origins[name]} {detail['input']}"
        rule = _SUBJECT.sub("must", detail["msg"])
        lines[origin] = f"{lines[origin]}, or {rule}" if origin in lines else f"{origin}: {rule}"
    return "; ".join(lines.values())
