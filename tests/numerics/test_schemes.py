"""Scheme grammar: what is read, how it is spelled back, and what is refused."""

from __future__ import annotations

import pytest

from service.errors import RecipeError
from service.numerics.schemes import GROUP_SIZES, NONE, W8A16, QuantScheme, parse_scheme


@pytest.mark.parametrize(
    ("text", "bits", "group_size", "symmetric", "name"),
    [
        ("none", 16, 0, True, "none"),
        ("w8a16", 8, 0, True, "w8a16"),
        ("w8a16-row-sym+rtn", 8, 0, True, "w8a16"),
        ("w8a16-g128", 8, 128, True, "w8a16-g128"),
        ("w8a16-g32-sym", 8, 32, True, "w8a16-g32"),
        ("w4a16", 4, 64, False, "w4a16-g64"),
        ("w4a16-asym", 4, 64, False, "w4a16-g64"),
        ("w4a16-g64-asym+rtn", 4, 64, False, "w4a16-g64"),
        ("w4a16-sym", 4, 64, True, "w4a16-g64-sym"),
        ("w4a16-g128-sym", 4, 128, True, "w4a16-g128-sym"),
    ],
)
def test_scheme_is_read_and_spelled_canonically(
    text: str, bits: int, group_size: int, symmetric: bool, name: str
) -> None:
    scheme = parse_scheme(text)
    assert scheme == QuantScheme(bits=bits, group_size=group_size, symmetric=symmetric)
    assert scheme.name == name


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_canonical_name_reads_back_to_the_same_scheme(group_size: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits=4, group_size=group_size, symmetric=symmetric)
    assert parse_scheme(scheme.name) == scheme


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_codebook_has_groups_of_64_and_no_zero_points(name: str) -> None:
    scheme = parse_scheme(f"{name}+rtn")
    assert scheme == parse_scheme(name)
    assert (scheme.name, scheme.codebook) == (name, name)
    assert (scheme.bits, scheme.group_size, scheme.symmetric, scheme.is_none) == (4, 64, True, False)


def test_only_none_is_none() -> None:
    assert NONE.is_none
    assert not W8A16.is_none


@pytest.mark.parametrize(
    "text",
    [
        *("w2a16", "w3a16-g64", "w5a16", "w6a16-g32-asym", "w8a16-asym", "w8a16-g64-asym", "w8a16-tensor", "w4a16-row"),
        *(
            "w4a16-float",
            "w4a16-g64+mse",
            "w4a16+hqq",
            "w8a16+gptq",
            "nf4-dq",
            "nf4+hqq",
            "fp8",
            "q4_0",
            "q4_k",
            "q5_k_m",
        ),
        *("auto:4.5bpw", "auto:700MiB", "auto:3GB"),
    ],
)
def test_scheme_of_the_grammar_that_is_not_built_says_so_and_lists_what_is(text: str) -> None:
    with pytest.raises(RecipeError, match="has not built; use one of: none, w8a16") as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "int8", "w9a16", "w7a16", "w16a16", "w8a8", "W8A16", "w8a16 ", "w8a16-", "w8a16-g", "w8a16-g064", "q3_0"),
        *(
            "none+rtn",
            "none-g64",
            "w8a16+",
            "w8a16+fast",
            "w8a16-sym-row",
            "w8a16-sym-asym",
            "nf4+best",
            "nf4-g32",
            "fp4-sym",
            "auto:",
            "auto",
        ),
    ],
)
def test_unknown_scheme_is_refused_with_the_list(text: str) -> None:
    with pytest.raises(RecipeError, match="is not a quantization scheme; use one of: none, w8a16") as caught:
        parse_scheme(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("size", [1, 8, 24, 96, 2048, 10**30])
def test_group_size_that_is_no_power_of_two_in_range_is_refused(size: int) -> None:
    with pytest.raises(RecipeError, match=rf"group size of {size}, it must be a power of two in 16..1024; use"):
        parse_scheme(f"w4a16-g{size}")
