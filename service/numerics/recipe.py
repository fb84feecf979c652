"""Which scheme each weight of a model gets.

    recipe := scheme ("," pattern "=" scheme)*

A pattern is matched by `fnmatch.fnmatchcase` against the full module name; the last one that matches wins.

`q4_k_m` and `q5_k_m` are q4_k and q5_k, but for the projections to values and back from the inner width of the
feed-forward part: q6_k in the first and the last eighth of the layers, and in every third one between them. Rows that
are no multiple of 256 weights fall back from a k-quant to the next simple format of GGUF. Both rules are llama.cpp's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from service.errors import RecipeError
from service.numerics.schemes import BUILT_SCHEMES, SUPERBLOCK, W8A16, QuantScheme, parse_scheme

_LAYER_NUMBER = re.compile(r"(?<=[.])[0-9]+(?=[.])")
_MORE_BITS = re.compile(r".*[.](v_proj|value|wv|down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp[.]c_proj)")
_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


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


def num_layers(names: Iterable[str]) -> dict[str, int]:
    """Of each stack of layers: its name, what comes before the first number in these full names, and their count."""
    counts: dict[str, int] = {}
    for name in names:
        if found := _LAYER_NUMBER.search(name):
            stack = name[: found.start()]
            counts[stack] = max(counts.get(stack, 0), int(found[0]) + 1)
    return counts


def resolve(scheme: QuantScheme, name: str, counts: dict[str, int], *, in_features: int) -> tuple[QuantScheme, str]:
    """What a scheme means for one module, and why that is not what it says.

    Args:
        counts: of `num_layers`.

    Returns:
        The scheme to store the weight with, and a reason, "" if that is the scheme itself.
    """
    reason = ""
    if scheme.is_mixed:
        mixed, scheme = scheme.name, parse_scheme(scheme.name.removesuffix("_m"))
        if _gets_more_bits(name, counts):
            scheme, reason = parse_scheme("q6_k"), f"{mixed} gives this layer 6 bits"
    if scheme.is_k_quant and in_features % SUPERBLOCK:
        reason = f"rows of {in_features} weights are no multiple of {SUPERBLOCK}, which {scheme.name} needs"
        scheme = parse_scheme(_FALLBACKS[scheme.name])
    return scheme, reason


def _gets_more_bits(name: str, counts: dict[str, int]) -> bool:
    found = _LAYER_NUMBER.search(name)
    if not found or not _MORE_BITS.fullmatch(name):
        return False
    index, count = int(found[0]), counts[name[: found.start()]]
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


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
