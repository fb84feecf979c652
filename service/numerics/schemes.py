"""What a weight is rounded to, and the spelling of it.

    scheme := "none" | format ["+" fit]
    format := "w" BITS "a16" ["-tensor" | "-row" | "-g" N] ["-sym" | "-asym" | "-float"] | named
    named  := nf4 | nf4-dq | fp4 | fp8 | q8_0 | q4_0 | q4_1 | q5_0 | q5_1 | q4_k | q5_k | q6_k | q4_k_m | q5_k_m
    fit    := rtn | mse | hqq

BITS are 2, 3, 4, 5, 6 or 8, N is a power of two in 16..1024. `absmax` is `w8a16-tensor-sym` and `zeropoint` is
`w8a16-tensor-asym`. Defaults: 8 bits have one scale per row and are symmetric, fewer have groups of 64 weights and
integer zero points; `mse` and `hqq` fit an offset, and have float offsets unless the format says otherwise. Round to
nearest, `rtn`, is the default fit. Named formats come with a fit of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

from service.errors import RecipeError

GROUP_SIZES: Final = (16, 32, 64, 128, 256, 512, 1024)
NAMED: Final = (
    *("nf4", "nf4-dq", "fp4", "fp8", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"),
    *("q4_k", "q5_k", "q6_k", "q4_k_m", "q5_k_m"),
)
BUILT_SCHEMES: Final = (
    "none, w{2,3,4,5,6,8}a16[-tensor|-row|-gN][-sym|-asym|-float][+rtn|+mse], "
    "w{2,3,4,5,6,8}a16[-row|-gN][-float]+hqq, absmax, zeropoint, "
    f"{', '.join(NAMED)} with N one of {', '.join(map(str, GROUP_SIZES))}"
)
SUPERBLOCK: Final = 256
"""Weights of a row that share the outer scales of a k-quant; a row has to be a multiple of it."""

Offset = Literal["sym", "asym", "float"]
Fit = Literal["rtn", "mse", "hqq"]

_FORMAT = re.compile(
    r"w(?P<bits>[2-68])a16(-(?P<groups>tensor|row|g(?P<group_size>[1-9][0-9]*)))?(-(?P<offset>sym|asym|float))?"
)
_LATER_FORMAT = re.compile(r"q[23]_k|mxfp4|nvfp4")
_LATER_FIT = re.compile(r"gptq|awq|autoround|smoothquant")
_AUTO = re.compile(r"auto:[0-9.]+(bpw|[KMGT]?i?B)?")
_FITS: Final[dict[str, Fit]] = {"": "rtn", "rtn": "rtn", "mse": "mse", "hqq": "hqq"}
ALIASES: Final = {"absmax": "w8a16-tensor-sym", "zeropoint": "w8a16-tensor-asym"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How one weight matrix is stored.

    Attributes:
        bits: per code; 16 is an unquantized weight.
        group_size: weights of a row that share a scale; 0 is the whole row.
        offset: `sym`: codes are centred on a fixed zero point, so that none is stored; `asym`: integer zero points;
            `float`: w ~ codes * scale + offset.
        is_per_tensor: all rows have the same scale.
        fit: how codes and scales are chosen; `rtn` is round to nearest.
        named: name of a format that is not of the `wBITSa16` family, else "".
    """

    bits: int
    group_size: int
    offset: Offset = "sym"
    is_per_tensor: bool = False
    fit: Fit = "rtn"
    named: str = ""

    @property
    def is_none(self) -> bool:
        """The weight stays as it is."""
        return self.bits == 16

    @property
    def codebook(self) -> str:
        """Table of the levels that 4-bit codes stand for: `nf4` or `fp4`; "" is the integers."""
        return self.named.removesuffix("-dq") if self.named in ("nf4", "nf4-dq", "fp4") else ""

    @property
    def is_mixed(self) -> bool:
        """It stands for one scheme in some layers and for another in others; see `recipe.resolve`."""
        return self.named in ("q4_k_m", "q5_k_m")

    @property
    def is_k_quant(self) -> bool:
        """Scales are quantized too, in blocks of 256 weights."""
        return self.named in ("q4_k", "q5_k", "q6_k")

    @property
    def is_block(self) -> bool:
        """Scales, and offsets, are float16 and belong to 32 weights, as in the simple formats of GGUF."""
        return self.named in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")

    @property
    def is_row_local(self) -> bool:
        """What becomes of a strip of 16 rows does not depend on other rows."""
        return not self.is_per_tensor and self.named != "nf4-dq"

    @property
    def name(self) -> str:
        """Canonical spelling: defaults left out, the group size kept."""
        if self.is_none:
            return "none"
        if self.named:
            return self.named
        row = "" if self.bits == 8 else "-row"
        group = "-tensor" if self.is_per_tensor else f"-g{self.group_size}" if self.group_size else row
        offset = "" if self.offset == _default_offset(self.bits, self.fit) else f"-{self.offset}"
        return f"w{self.bits}a16{group}{offset}" + ("" if self.fit == "rtn" else f"+{self.fit}")


NONE: Final = QuantScheme(bits=16, group_size=0)
W8A16: Final = QuantScheme(bits=8, group_size=0)
NF4: Final = QuantScheme(bits=4, group_size=64, named="nf4")
NF4_DQ: Final = replace(NF4, named="nf4-dq")
FP4: Final = QuantScheme(bits=4, group_size=64, named="fp4")
_NAMED_SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        NF4,
        NF4_DQ,
        FP4,
        QuantScheme(bits=8, group_size=0, named="fp8"),
        QuantScheme(bits=8, group_size=32, named="q8_0"),
        QuantScheme(bits=4, group_size=32, named="q4_0"),
        QuantScheme(bits=4, group_size=32, offset="float", named="q4_1"),
        QuantScheme(bits=5, group_size=32, named="q5_0"),
        QuantScheme(bits=5, group_size=32, offset="float", named="q5_1"),
        QuantScheme(bits=4, group_size=32, offset="float", named="q4_k"),
        QuantScheme(bits=5, group_size=32, offset="float", named="q5_k"),
        QuantScheme(bits=6, group_size=16, named="q6_k"),
        QuantScheme(bits=4, group_size=32, offset="float", named="q4_k_m"),
        QuantScheme(bits=5, group_size=32, offset="float", named="q5_k_m"),
    )
}


def parse_scheme(text: str) -> QuantScheme:
    """Read one scheme.

    Raises:
        RecipeError: the grammar does not know the scheme, it contradicts itself, or this version has not built it.
    """
    if text == "none":
        return NONE
    format_text, plus, fit = text.partition("+")
    if plus and not (fit and (fit in _FITS or _LATER_FIT.fullmatch(fit))):
        raise _unknown(text)
    found = _FORMAT.fullmatch(ALIASES.get(format_text, format_text))
    named = _NAMED_SCHEMES.get(format_text)
    if fit not in _FITS or _LATER_FORMAT.fullmatch(format_text) or (_AUTO.fullmatch(format_text) and not plus):
        if found or named or not plus:
            raise RecipeError(f"{text!r} is a scheme that this version has not built; use one of: {BUILT_SCHEMES}")
        raise _unknown(text)
    if found:
        return _affine_scheme(text, found, _FITS[fit])
    if named is None:
        raise _unknown(text)
    if _FITS[fit] != "rtn":
        raise RecipeError(
            f"{text!r} is impossible: {format_text} has a fit of its own, and takes no other; "
            f"use {format_text}, or one of: {BUILT_SCHEMES}"
        )
    return named


def _unknown(text: str) -> RecipeError:
    return RecipeError(f"{text!r} is not a quantization scheme; use one of: {BUILT_SCHEMES}")


def _default_offset(bits: int, fit: Fit) -> Offset:
    if fit != "rtn":
        return "float"
    return "sym" if bits == 8 else "asym"


def _affine_scheme(text: str, found: re.Match[str], fit: Fit) -> QuantScheme:
    bits, groups = int(found["bits"]), found["groups"]
    group_size = int(found["group_size"] or (64 if bits < 8 and groups is None else 0))
    if group_size and group_size not in GROUP_SIZES:
        raise RecipeError(
            f"{text!r} has a group size of {group_size}, it must be a power of two in 16..1024; "
            f"use one of: {BUILT_SCHEMES}"
        )
    offsets: dict[str, Offset] = {"sym": "sym", "asym": "asym", "float": "float"}
    offset = offsets[found["offset"]] if found["offset"] else _default_offset(bits, fit)
    if groups == "tensor" and fit != "rtn":
        raise RecipeError(
            f"{text!r} is impossible: {fit} fits the scales of rows and groups, -tensor has one for all; "
            f"use -row or -gN, or one of: {BUILT_SCHEMES}"
        )
    if fit == "hqq" and offset != "float":
        raise RecipeError(
            f"{text!r} is impossible: hqq fits a float offset, -{offset} has none; use -float, "
            f"or one of: {BUILT_SCHEMES}"
        )
    return QuantScheme(bits=bits, group_size=group_size, offset=offset, is_per_tensor=groups == "tensor", fit=fit)
