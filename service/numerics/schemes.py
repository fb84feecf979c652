"""What a weight is rounded to, and the spelling of it.

    scheme := "none" | format ["+rtn"]
    format := "w8a16" ["-row" | "-g" N] ["-sym"] | "w4a16" ["-g" N] ["-sym" | "-asym"] | "nf4" | "fp4"

Round to nearest is the only fit so far. N is a power of two in 16..1024. Defaults: `w8a16` has one scale
per row, `w4a16` groups of 64 weights with zero points. `nf4` and `fp4` have groups of 64 weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from service.errors import RecipeError

GROUP_SIZES: Final = (16, 32, 64, 128, 256, 512, 1024)
BUILT_SCHEMES: Final = (
    "none, w8a16[-row|-gN][-sym][+rtn], w4a16[-gN][-sym|-asym][+rtn], nf4[+rtn], fp4[+rtn] "
    f"with N one of {', '.join(map(str, GROUP_SIZES))}"
)

_FORMAT = re.compile(
    r"w(?P<bits>[2-68])a16(-(?P<groups>tensor|row|g(?P<group_size>[1-9][0-9]*)))?(-(?P<offset>sym|asym|float))?"
)
_NAMED_FORMAT = re.compile(r"q[458]_0|q[45]_1|q[2-6]_k|q[45]_k_m|nf4-dq|fp8")
_FIT = re.compile(r"rtn|mse|hqq|gptq|awq|autoround|smoothquant")
_AUTO = re.compile(r"auto:[0-9.]+(bpw|[KMGT]?i?B)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How one weight matrix is stored.

    Attributes:
        bits: per code, 8 or 4; 16 is an unquantized weight.
        group_size: weights of a row that share a scale; 0 is the whole row.
        symmetric: codes are centred on a fixed zero point, so that none is stored.
        fit: how codes are chosen; `rtn` is round to nearest.
        codebook: table of the levels that 4-bit codes stand for; "" is the integers.
    """

    bits: int
    group_size: int
    symmetric: bool
    fit: Literal["rtn"] = "rtn"
    codebook: Literal["", "nf4", "fp4"] = ""

    @property
    def is_none(self) -> bool:
        """The weight stays as it is."""
        return self.bits == 16

    @property
    def name(self) -> str:
        """Canonical spelling: defaults left out, the group size kept."""
        if self.is_none:
            return "none"
        if self.codebook:
            return self.codebook
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"w{self.bits}a16{group}" + ("-sym" if self.symmetric and self.bits == 4 else "")


NONE: Final = QuantScheme(bits=16, group_size=0, symmetric=True)
W8A16: Final = QuantScheme(bits=8, group_size=0, symmetric=True)
NF4: Final = QuantScheme(bits=4, group_size=64, symmetric=True, codebook="nf4")
FP4: Final = QuantScheme(bits=4, group_size=64, symmetric=True, codebook="fp4")
_CODEBOOK_SCHEMES: Final = {scheme.name: scheme for scheme in (NF4, FP4)}


def parse_scheme(text: str) -> QuantScheme:
    """Read one scheme.

    Raises:
        RecipeError: the grammar does not know the scheme, or this version has not built it.
    """
    if text == "none":
        return NONE
    format_text, plus, fit = text.partition("+")
    found = _FORMAT.fullmatch(format_text)
    named = _CODEBOOK_SCHEMES.get(format_text)
    known = found or named or _NAMED_FORMAT.fullmatch(format_text) or (_AUTO.fullmatch(format_text) and not plus)
    if not known or (plus and not _FIT.fullmatch(fit)):
        raise RecipeError(f"{text!r} is not a quantization scheme; use one of: {BUILT_SCHEMES}")
    scheme = _built_scheme(found) if found else named
    scheme = scheme if fit in ("", "rtn") else None
    if scheme is None:
        raise RecipeError(f"{text!r} is a scheme that this version has not built; use one of: {BUILT_SCHEMES}")
    return scheme


def _built_scheme(found: re.Match[str]) -> QuantScheme | None:
    """The scheme of a format that the grammar knows; None if this version has not built it."""
    bits, groups, offset = int(found["bits"]), found["groups"], found["offset"]
    group_size = int(found["group_size"] or (64 if bits == 4 and groups is None else 0))
    if group_size and group_size not in GROUP_SIZES:
        raise RecipeError(
            f"{found[0]!r} has a group size of {group_size}, it must be a power of two in 16..1024; "
            f"use one of: {BUILT_SCHEMES}"
        )
    if groups == "tensor" or offset == "float":
        return None
    if bits == 8 and offset != "asym":
        return QuantScheme(bits=8, group_size=group_size, symmetric=True)
    if bits == 4 and groups != "row":
        return QuantScheme(bits=4, group_size=group_size, symmetric=offset == "sym")
    return None
