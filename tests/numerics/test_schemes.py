"""Scheme grammar: what is read, how it is spelled back, and what is refused."""

from __future__ import annotations

import pytest

from service.errors import RecipeError
from service.numerics.schemes import GROUP_SIZES, NAMED, NONE, W8A16, Fit, Offset, QuantScheme, parse_scheme


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "offset", "name"),
    [
        ("none", 16, 0, "sym", "none"),
        ("w8a16", 8, 0, "sym", "w8a16"),
        ("w8a16-row-sym+rtn", 8, 0, "sym", "w8a16"),
        ("w8a16-g128", 8, 128, "sym", "w8a16-g128"),
        ("w8a16-g32-sym", 8, 32, "sym", "w8a16-g32"),
        ("w8a16-asym", 8, 0, "asym", "w8a16-asym"),
        ("w4a16", 4, 64, "asym", "w4a16-g64"),
        ("w4a16-asym", 4, 64, "asym", "w4a16-g64"),
        ("w4a16-g64-asym+rtn", 4, 64, "asym", "w4a16-g64"),
        ("w4a16-sym", 4, 64, "sym", "w4a16-g64-sym"),
        ("w4a16-g128-sym", 4, 128, "sym", "w4a16-g128-sym"),
        ("w4a16-float", 4, 64, "float", "w4a16-g64-float"),
        ("w4a16-row", 4, 0, "asym", "w4a16-row"),
        ("w2a16", 2, 64, "asym", "w2a16-g64"),
        ("w3a16-g16-float", 3, 16, "float", "w3a16-g16-float"),
        ("w5a16-row-sym", 5, 0, "sym", "w5a16-row-sym"),
        ("w6a16-g32-asym", 6, 32, "asym", "w6a16-g32"),
    ],
)
def test_scheme_is_read_and_spelled_canonically(
    text: str, bits: int, group_size: int, offset: Offset, name: str
) -> None:
    scheme = parse_scheme(text)
    assert scheme == QuantScheme(bits=bits, group_size=group_size, offset=offset)
    assert scheme.name == name


@pytest.mark.parametrize(
    ("text", "offset", "fit", "name"),
    [
        ("w4a16+mse", "float", "mse", "w4a16-g64+mse"),
        ("w4a16-g64-float+mse", "float", "mse", "w4a16-g64+mse"),
        ("w4a16-asym+mse", "asym", "mse", "w4a16-g64-asym+mse"),
        ("w4a16-sym+mse", "sym", "mse", "w4a16-g64-sym+mse"),
        ("w4a16-g64+hqq", "float", "hqq", "w4a16-g64+hqq"),
    ],
)
def test_a_fit_has_float_offsets_unless_told_otherwise(text: str, offset: Offset, fit: Fit, name: str) -> None:
    scheme = parse_scheme(text)
    assert scheme == QuantScheme(bits=4, group_size=64, offset=offset, fit=fit)
    assert scheme.name == name


@pytest.mark.parametrize(("alias", "name"), [("absmax", "w8a16-tensor"), ("zeropoint", "w8a16-tensor-asym")])
def test_aliases_are_one_scale_for_all_rows(alias: str, name: str) -> None:
    assert parse_scheme(alias) == parse_scheme(name)
    assert parse_scheme(alias).name == name
    assert parse_scheme(f"{alias}+rtn").is_per_tensor
    assert not parse_scheme(alias).is_row_local


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("groups", ["-tensor", "-row", *(f"-g{size}" for size in GROUP_SIZES)])
def test_canonical_name_reads_back_to_the_same_scheme(groups: str, bits: int) -> None:
    for offset in ("", "-sym", "-asym", "-float"):
        for fit in ("",) if groups == "-tensor" else ("", "+mse"):
            scheme = parse_scheme(f"w{bits}a16{groups}{offset}{fit}")
            assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize("name", NAMED)
def test_a_named_format_is_its_own_name(name: str) -> None:
    scheme = parse_scheme(f"{name}+rtn")
    assert scheme == parse_scheme(name)
    assert scheme.name == name
    assert not scheme.is_none


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_codebook_has_groups_of_64_and_no_zero_points(name: str) -> None:
    scheme = parse_scheme(name)
    assert (scheme.bits, scheme.group_size, scheme.offset, scheme.codebook) == (4, 64, "sym", name)


def test_only_none_is_none() -> None:
    assert NONE.is_none
    assert not W8A16.is_none


@pytest.mark.parametrize(
    "text", ["w8a16+gptq", "nf4+awq", "q2_k", "q3_k", "mxfp4", "auto:4.5bpw", "auto:700MiB", "auto:3GB"]
)
def test_scheme_of_the_grammar_that_is_not_built_says_so_and_lists_what_is(text: str) -> None:
    with pytest.raises(RecipeError, match="has not built; use one of: none, w") as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "int8", "w9a16", "w7a16", "w16a16", "w8a8", "W8A16", "w8a16 ", "w8a16-", "w8a16-g", "w8a16-g064", "q3_0"),
        *("none+rtn", "none-g64", "w8a16+", "w8a16+fast", "w8a16-sym-row", "w8a16-sym-asym", "nf4+best", "nf4-g32"),
        *("fp4-sym", "auto:", "auto", "auto:3GB+mse", "absmax-row", "q4_k_s", "q6_k_m", "fp4-dq", "+mse"),
    ],
)
def test_unknown_scheme_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a quantization scheme; use one of: none, w") as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("w8a16-tensor+mse", "-tensor has one for all; use -row or -gN"),
        ("absmax+hqq", "-tensor has one for all"),
        ("w4a16-sym+hqq", "hqq fits a float offset, -sym has none; use -float"),
        ("w4a16-asym+hqq", "hqq fits a float offset, -asym has none; use -float"),
        ("nf4+hqq", "nf4 has a fit of its own, and takes no other; use nf4"),
        ("q4_k_m+mse", "q4_k_m has a fit of its own, and takes no other; use q4_k_m"),
    ],
)
def test_impossible_combination_says_why_and_what_is_possible(text: str, rule: str) -> None:
    with pytest.raises(RecipeError, match="is impossible: ") as caught:
        parse_scheme(text)
    assert rule in str(caught.value)
    assert "one of: none, w{2,3,4,5,6,8}a16[-tensor|-row|-gN]" in str(caught.value)


@pytest.mark.parametrize("size", [1, 8, 24, 96, 2048, 10**30])
def test_group_size_that_is_no_power_of_two_in_range_is_refused(size: int) -> None:
    with pytest.raises(RecipeError, match=rf"group size of {size}, it must be a power of two in 16..1024; use"):
        parse_scheme(f"w4a16-g{size}")
