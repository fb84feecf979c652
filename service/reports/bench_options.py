"""What `pennyweight bench kernels` is to measure, and how that is written on its command line."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from service.errors import RecipeError, SettingError, shown
from service.numerics.schemes import QuantScheme, parse_scheme

DEFAULT_SCHEMES: Final = "w8a16;w4a16-g64;nf4"
DEFAULT_SHAPES: Final = "576x576,576x1536,1536x576,2048x2048,2048x5632,5632x2048,2048x32000,4096x14336"
"""Projections of SmolLM2-135M, of TinyLlama-1.1B with its output head, and of a model of 8 B parameters."""
DEFAULT_ROWS: Final = "1,2,4,8,16,32,64,128,512,2048"
DEFAULT_SECONDS_PER_POINT: Final = 3.0
DEFAULT_ENCODER_PARAMETERS: Final = 2**26

_Item = TypeVar("_Item")

_MAX_LIST = 64
_MAX_SIDE = 2**20
_MAX_ROWS = 2**16
_MAX_PARAMETERS = 2**32
_MAX_SECONDS = 3600.0
_SHAPE = re.compile(r"([1-9]\d{0,7})x([1-9]\d{0,7})", re.ASCII)
_NUMBER = re.compile(r"[1-9]\d{0,7}", re.ASCII)


class Shape(NamedTuple):
    """Size of a weight: `k` input features, `n` output features."""

    k: int
    n: int

    @property
    def num_weights(self) -> int:
        """How many weights it has."""
        return self.k * self.n


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelBench:
    """A benchmark of kernels.

    Attributes:
        seconds_per_point: spent on one shape at one number of rows, all schemes together.
        footprint_bytes: of the copies of a weight that calls go through; None: what the caches ask for.
        output: file for the JSON.
        encoder_parameters: of all weights together that encoders are timed on; 0: they are not.
    """

    schemes: tuple[QuantScheme, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    seconds_per_point: float = DEFAULT_SECONDS_PER_POINT
    footprint_bytes: int | None = None
    output: Path | None = None
    encoder_parameters: int = DEFAULT_ENCODER_PARAMETERS


def parse_schemes(text: str) -> tuple[QuantScheme, ...]:
    """Schemes between semicolons.

    Raises:
        SettingError: one of them is unknown, or `none`, which has no packed weight.
    """
    return _parse_list("--schemes", text, ";", _scheme)


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Sizes such as `576x1536` between commas.

    Raises:
        SettingError: one of them is none, or too large.
    """
    return _parse_list("--shapes", text, ",", _shape)


def parse_rows(text: str) -> tuple[int, ...]:
    """Numbers of rows between commas.

    Raises:
        SettingError: one of them is no number, or too large.
    """
    return _parse_list("--rows", text, ",", _num_rows)


def parse_seconds(text: str) -> float:
    """Seconds, fractions too.

    Raises:
        SettingError: not a number in (0, 3600].
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MAX_SECONDS:
        raise SettingError(
            f"--seconds-per-point {shown(text)}: must be a number over 0 and up to {_MAX_SECONDS:.0f}; "
            f"the default is {DEFAULT_SECONDS_PER_POINT:g}"
        )
    return seconds


def parse_encoder_parameters(text: str) -> int:
    """How many weights to encode, or 0.

    Raises:
        SettingError: not a whole number up to 2**32.
    """
    if not text.isdecimal() or not text.isascii() or len(text) > 10 or int(text) > _MAX_PARAMETERS:
        raise SettingError(
            f"--encoder-parameters {shown(text)}: must be a whole number up to {_MAX_PARAMETERS}; "
            "0 leaves the encoders out"
        )
    return int(text)


def parse_output(text: str, flag: str = "--output") -> Path:
    """A file to write, known to be possible before minutes are spent.

    Raises:
        SettingError: its folder does not exist, it is a folder, or it cannot be written.
    """
    try:
        path = Path(text).expanduser()
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise SettingError(f"{flag} {shown(text)}: must be a file in a folder that exists; make the folder first")
        _try_to_write(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingError(
            f"{flag} {shown(text)}: {reason}; it must be a file that can be written: name one in another folder"
        ) from error
    return path


def parse_picture(text: str) -> Path:
    """A PNG file for `--plot`, known to be possible before minutes are spent.

    Raises:
        SettingError: it is called otherwise, or `parse_output` refuses it.
    """
    if not text.lower().endswith(".png"):
        raise SettingError(f"--plot {shown(text)}: must end in .png; name it so")
    return parse_output(text, flag="--plot")


def _try_to_write(path: Path) -> None:
    """Raise OSError if a file cannot be made or, where one is, not be written; it is left as it was."""
    try:
        path.open("xb").close()  # permissions do not tell everything: not even root can make a file in /proc
    except FileExistsError:
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
    else:
        path.unlink()


def _parse_list(flag: str, text: str, separator: str, parse: Callable[[str], _Item]) -> tuple[_Item, ...]:
    items: Sequence[str] = text.split(separator)
    if len(items) > _MAX_LIST:
        raise SettingError(f"{flag}: {len(items)} entries, it must be at most {_MAX_LIST}; run it in parts")
    try:
        parsed = tuple(parse(item.strip()) for item in items)
    except ValueError as error:
        raise SettingError(f"{flag} {shown(text)}: {error}") from error
    except RecipeError as error:
        raise SettingError(f"{flag}: {error}") from error
    if len(set(parsed)) < len(parsed):
        raise SettingError(f"{flag} {shown(text)}: an entry stands there twice; give each once")
    return parsed


def _scheme(item: str) -> QuantScheme:
    scheme = parse_scheme(item)
    if scheme.is_none:
        raise ValueError("none has no packed weight, and bf16 linear is measured in any case; leave it out")
    return scheme


def _shape(item: str) -> Shape:
    match = _SHAPE.fullmatch(item)
    if match is None or max(int(side) for side in match.groups()) > _MAX_SIDE:
        raise ValueError(f"{shown(item)!r} must be KxN with both in 1..{_MAX_SIDE}; write 576x1536,2048x2048")
    return Shape(int(match[1]), int(match[2]))


def _num_rows(item: str) -> int:
    if not _NUMBER.fullmatch(item) or int(item) > _MAX_ROWS:
        raise ValueError(f"{shown(item)!r} must be a whole number in 1..{_MAX_ROWS}; write 1,16,512")
    return int(item)
