"""What `pennyweight evaluate` is to compare, and how that is written on its command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from service.api.probe_text import PROBE_TEXTS
from service.errors import RecipeError, SettingError, shown
from service.numerics.recipe import Recipe, parse_recipe
from service.reports.bench_options import parse_picture
from service.reports.bench_text import DEFAULT_TEXT
from service.reports.text_file import read_text

BUNDLED_TEXT: Final = "\n".join((DEFAULT_TEXT, *PROBE_TEXTS))
"""A short story, and some prose, code, facts and numbers."""
BUNDLED_NAME: Final = "the bundled text"
WINDOW_TOKENS: Final = 1024
"""Of a window, where the context of the model is not shorter."""
MAX_TEXT_CHARACTERS: Final = 2**26
_MAX_RECIPES = 64
_MAX_WINDOWS = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluation.

    Attributes:
        recipes: in the order of the command line; one that quantizes nothing is there at most once.
        text: to be scored.
        text_name: what the report calls it.
        max_windows: of the text, from its beginning; None: all of it.
        plot: file for the picture.
    """

    recipes: tuple[Recipe, ...]
    text: str = BUNDLED_TEXT
    text_name: str = BUNDLED_NAME
    max_windows: int | None = None
    plot: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that are no settings; `read_options` checks their values."""
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to score; default: some pages that come along")
    parser.add_argument("--windows", metavar="N", help="score the first N windows of the text only")
    parser.add_argument("--plot", metavar="FILE.png", help="draw quality against size there; takes matplotlib")


def read_options(words: Mapping[str, Any], quantize: str) -> Evaluation:
    """What the flags ask for.

    Raises:
        SettingError: a value is wrong, with name, value and rule.
    """
    windows = words["windows"]
    text = BUNDLED_TEXT if words["text"] is None else _read_text(words["text"])
    return Evaluation(
        recipes=parse_recipes(quantize),
        text=text,
        text_name=BUNDLED_NAME if words["text"] is None else words["text"],
        max_windows=None if windows is None else _parse_windows(windows),
        plot=None if words["plot"] is None else parse_picture(words["plot"]),
    )


def parse_recipes(text: str) -> tuple[Recipe, ...]:
    """Recipes between semicolons.

    Raises:
        RecipeError: one of them is wrong, or two of them are one.
    """
    parts = text.split(";")
    if len(parts) > _MAX_RECIPES:
        raise RecipeError(f"{len(parts)} recipes, it must be at most {_MAX_RECIPES}; evaluate them in parts")
    recipes = tuple(parse_recipe(part.strip()) for part in parts)
    texts = [recipe.text for recipe in recipes]
    twice = next((name for name in texts if texts.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{twice!r} stands twice in {text!r}; give each recipe once")
    return recipes


def _parse_windows(text: str) -> int:
    is_number = text.isdecimal() and text.isascii() and len(text) <= len(str(_MAX_WINDOWS))
    if not is_number or not 1 <= int(text) <= _MAX_WINDOWS:
        raise SettingError(f"--windows {shown(text)}: must be a whole number from 1 to {_MAX_WINDOWS}; correct it")
    return int(text)


def _read_text(name: str) -> str:
    text = read_text(name, max_characters=MAX_TEXT_CHARACTERS + 1)
    if len(text) > MAX_TEXT_CHARACTERS:
        raise SettingError(f"--text {shown(name)}: must have at most {MAX_TEXT_CHARACTERS} characters; give a part")
    return text
