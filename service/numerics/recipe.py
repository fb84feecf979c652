"""Which scheme each weight of a model gets.

    recipe := scheme ("," pattern "=" scheme)*

A pattern is matched by `fnmatch.fnmatchcase` against the full module name; the last one that matches wins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from service.errors import RecipeError
from service.numerics.schemes import BUILT_SCHEMES, W8A16, QuantScheme, parse_scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A default scheme and the patterns that override it, in the order of the text."""

    default: QuantScheme
    overrides: tuple[tuple[str, QuantScheme], ...]

    @property
    def is_none(self) -> bool:
        """No weight is quantized."""
        return self.default.is_none and all(scheme.is_none for _, scheme in self.overrides)

    @property
    def text(self) -> str:
        """Canonical spelling; it parses back to an equal recipe."""
        return ",".join([self.default.name, *(f"{pattern}={scheme.name}" for pattern, scheme in self.overrides)])

    @property
    def label(self) -> str:
        """Short name for metric labels: the scheme, or `mixed-` and 8 hex digits of the text's SHA-256."""
        if not self.overrides:
            return self.default.name
        return f"mixed-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def scheme_for(self, name: str, *, is_head: bool) -> QuantScheme:
        """Scheme of the module with this full name.

        Args:
            is_head: the module is `lm_head` or a tied embedding, whose default is `w8a16` row-wise
                whatever the recipe's default, unless that is `none`.
        """
        for pattern, scheme in reversed(self.overrides):
            if fnmatchcase(name, pattern):
                return scheme
        return W8A16 if is_head and not self.default.is_none else self.default

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Patterns that match none of these full module names."""
        known = tuple(names)
        return tuple(pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in known))


def parse_recipe(text: str) -> Recipe:
    """Read a recipe; blanks around its parts are ignored.

    Raises:
        RecipeError: a scheme is unknown or not built, or the recipe is not of the form above.
    """
    first, *rest = (part.strip() for part in text.split(","))
    if not first or "=" in first:
        raise RecipeError(
            f"{text!r} does not begin with a default scheme, a recipe is SCHEME[,PATTERN=SCHEME...]; "
            f"begin with one of: {BUILT_SCHEMES}"
        )
    overrides: dict[str, QuantScheme] = {}
    for part in rest:
        pattern, equals, scheme = (piece.strip() for piece in part.partition("="))
        if not pattern or not equals:
            raise RecipeError(f"{part!r} in {text!r} is not PATTERN=SCHEME; write for example lm_head=none")
        if pattern in overrides:
            raise RecipeError(f"pattern {pattern!r} is given twice in {text!r}, once is allowed; keep one of the two")
        overrides[pattern] = parse_scheme(scheme)
    return Recipe(default=parse_scheme(first), overrides=tuple(overrides.items()))
