"""Rounding against the packages whose formats and methods these are: normal, heavy-tailed and real weights."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as compressed_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint4, qint8, quantize_weight
from safetensors import safe_open
from torch import Tensor

from service.demo import model_folder
from service.numerics import double_quant
from service.numerics.affine import dequantize, quantize
from service.numerics.encode import decode, encode
from service.numerics.fits import fit
from service.numerics.rounding import round_rows, weights_of
from service.numerics.schemes import NF4, NF4_DQ, parse_scheme
from tests.numerics import k_quants
from tests.numerics.ggml import TYPES, ggml_bytes


def normal() -> Tensor:
    return 0.02 * torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))


def heavy() -> Tensor:
    """Student's t with five degrees of freedom, rows and columns of different sizes."""
    random = np.random.default_rng(0)
    rows, columns = random.standard_normal((256, 1)), random.standard_normal((1, 4096))
    weight = 0.02 * random.standard_t(5, (256, 4096)) * np.exp(0.25 * rows) * np.exp(0.35 * columns)
    return torch.from_numpy(weight.astype(np.float32))


def real() -> Tensor:
    """A projection [256, 768] of the demo model."""
    with safe_open(model_folder() / "model.safetensors", framework="pt") as file:
        weight: Tensor = file.get_tensor("model.layers.2.mlp.down_proj.weight")
        return weight.float()


MATRICES = pytest.mark.parametrize("weight", [normal(), heavy(), real()], ids=["normal", "heavy", "real"])


def nmse(found: Tensor, weight: Tensor) -> float:
    return float((found.double() - weight.double()).square().sum() / weight.double().square().sum())


def share_of_same(found: Tensor, expected: Tensor, weight: Tensor) -> float:
    """Of weights that are equal, or as near to what they were: beside a tie, of which bfloat16 has many, both are."""
    bound = 1e-6 * weight.abs().max()
    is_equal = (found - expected).abs() <= bound
    return float((is_equal | (((found - weight).abs() - (expected - weight).abs()).abs() <= bound)).double().mean())


def share_of_equal(left: Tensor, right: Tensor) -> float:
    return float((left == right).double().mean())


@MATRICES
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_bytes_are_those_of_gguf(name: str, weight: Tensor) -> None:
    scheme = parse_scheme(name)
    expected = gguf.quants.quantize(weight.numpy(), TYPES[name])
    assert np.array_equal(ggml_bytes(round_rows(weight, scheme), scheme), expected)


@MATRICES
@pytest.mark.parametrize("name", TYPES)
def test_gguf_decodes_the_bytes_to_the_weights_that_are_computed_with(name: str, weight: Tensor) -> None:
    scheme = parse_scheme(name)
    rounded = round_rows(weight, scheme)
    expected = gguf.quants.dequantize(ggml_bytes(rounded, scheme), TYPES[name])
    assert np.array_equal(weights_of(rounded, scheme).numpy(), expected)


@MATRICES
@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_error_of_k_quants_is_that_of_their_search_written_plainly(name: str, weight: Tensor) -> None:
    scheme, part = parse_scheme(name), weight[:64]
    expected = torch.from_numpy(k_quants.rounded(part.numpy(), name))
    found = weights_of(round_rows(part, scheme), scheme)
    assert nmse(found, part) <= 1.01 * nmse(expected, part)
    assert ((found - expected).abs() <= 1e-6 * part.abs().max()).double().mean() >= 0.9  # others: a near tie of fits


@pytest.mark.parametrize(("name", "largest"), [("q4_k", 5.10e-3), ("q5_k", 1.46e-3), ("q6_k", 3.16e-4)])
def test_error_of_k_quants_on_normal_weights_is_that_of_auto_round(name: str, largest: float) -> None:
    """Of `ggml_quant` of auto-round 0.16.1, and of ggml's search for q6_k."""
    scheme = parse_scheme(name)
    assert nmse(weights_of(round_rows(normal(), scheme), scheme), normal()) <= 1.01 * largest


@MATRICES
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_scales_are_those_of_bitsandbytes(name: str, weight: Tensor) -> None:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=False)
    codes, scales, _ = round_rows(weight, parse_scheme(name))
    assert torch.equal(torch.stack((packed >> 4, packed & 15), -1).view(weight.shape), codes)
    assert torch.equal(state.absmax.view(scales.shape), scales)


@MATRICES
def test_double_quantization_is_that_of_bitsandbytes(weight: Tensor) -> None:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    encoded = encode(weight, NF4_DQ)
    num_groups = weight.shape[1] // 64
    if num_groups % 16 == 0:  # else our blocks, which begin anew with each strip, are others
        codes = encoded.scales[:, :num_groups].transpose(1, 2).flatten(0, 1).int()
        theirs = state.absmax.view(codes.shape).int()
        assert share_of_equal(codes, theirs) >= 0.995  # on the CPU it takes a neighbour of the nearest code at times
    mean = encoded.scales[:, num_groups:].flatten(1)[:, :4].contiguous().view(torch.float32)
    assert torch.allclose(mean, state.offset, rtol=1e-6, atol=0)
    assert torch.allclose(double_quant.levels(), state.state2.code, rtol=1e-6, atol=0)
    out_features, in_features = weight.shape
    found = decode(*encoded[:3], scheme=NF4_DQ, out_features=out_features, in_features=in_features)
    expected = bnb.dequantize_4bit(packed, state)
    single = decode(*encode(weight, NF4)[:3], scheme=NF4, out_features=out_features, in_features=in_features)
    assert nmse(found, weight) <= 1.005 * nmse(expected, weight)
    assert nmse(found, weight) <= 1.01 * nmse(single, weight)


@MATRICES
def test_codes_of_w8a16_are_those_of_quanto_and_bitsandbytes(weight: Tensor) -> None:
    codes, scales, _ = quantize(weight, parse_scheme("w8a16"))
    expected = quantize_weight(weight, qint8, 0, AbsmaxOptimizer()(weight, qint8, 0))
    assert share_of_equal(codes, expected._data) >= 0.99999
    assert (codes.int() - expected._data.int()).abs().max() <= 1
    assert torch.allclose(scales, expected._scale, rtol=1e-6, atol=0)
    half = weight.half()
    codes, scales, _ = quantize(half, parse_scheme("w8a16"))
    found, largest, _ = bnb.int8_vectorwise_quant(half)
    assert share_of_equal(codes, found) >= 0.9995  # it computes in float16
    assert (codes.int() - found.int()).abs().max() <= 1
    assert torch.allclose(scales[:, 0], largest / 127, rtol=1e-6, atol=0)


@MATRICES
@pytest.mark.parametrize("group_size", [64, 128])
def test_codes_with_a_float_offset_are_those_of_quanto(group_size: int, weight: Tensor) -> None:
    scheme = parse_scheme(f"w4a16-g{group_size}-float")
    rounded = quantize(weight, scheme, scale_dtype=torch.float32)
    scale, shift = MaxOptimizer()(weight, qint4, 0, group_size=group_size)
    # Its tensor class would compile C++ for minutes to unpack these; the formula is that of its `QBitsTensor`.
    codes = torch.ops.quanto.quantize_affine(weight, qint4.bits, 0, group_size, scale, shift)
    expected = (scale * codes - shift).view(weight.shape)
    assert share_of_same(dequantize(*rounded, scheme), expected, weight) >= 0.9999


@MATRICES
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_with_integer_zero_points_are_those_of_compressed_tensors(bits: int, weight: Tensor) -> None:
    scheme = parse_scheme(f"w{bits}a16-g128-asym")
    codes, scales, zero_points = quantize(weight, scheme, scale_dtype=torch.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=False, group_size=128, strategy="group")
    grouped = weight.view(len(weight), -1, 128)
    scale, zero = calculate_qparams(grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0), args)
    first = 0 if bits == 8 else 8  # theirs count from -8 and -128
    assert zero_points is not None
    assert share_of_equal(zero_points, zero.int() + first) >= 0.9999
    expected = (compressed_quantize(weight, scale, zero, args) + first).to(codes.dtype)  # adds before it rounds
    ours, theirs = (dequantize(which, scales, zero_points, scheme) for which in (codes, expected))
    assert share_of_same(ours, theirs, weight) >= 0.9999
    assert share_of_equal(codes, expected) >= 0.998


@MATRICES
def test_8_bit_floats_are_those_of_torch(weight: Tensor) -> None:
    codes, scales, _ = round_rows(weight, parse_scheme("fp8"))
    expected = weight.abs().amax(1, keepdim=True) / 448
    assert torch.equal(scales, expected)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), (weight / expected).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_one_more_step_below_zero_beats_as_many_on_both_sides(bits: int) -> None:
    """Full-range signed codes, -8..7, against the convention of -7..7."""
    scheme, weight = parse_scheme(f"w{bits}a16-g128-sym"), normal()
    found = dequantize(*quantize(weight, scheme, scale_dtype=torch.float32), scheme)
    grouped = weight.view(-1, 128)
    scales = grouped.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert nmse(found, weight) <= 0.95 * nmse((grouped / scales).round().mul(scales).view_as(weight), weight)


@MATRICES
@pytest.mark.parametrize("name", ["w4a16-g64", "w3a16-g64"])
def test_least_squares_gain_half_a_decibel(name: str, weight: Tensor) -> None:
    fitted, nearest = parse_scheme(f"{name}+mse"), parse_scheme(f"{name}-float")
    found, plain = (weights_of(round_rows(weight, scheme), scheme) for scheme in (fitted, nearest))
    assert nmse(found, weight) <= 10**-0.05 * nmse(plain, weight)


def half_quadratic(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """HQQ as its authors write it, for the whole matrix at once; it ends for all groups together."""
    x = weight.view(-1, group_size)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    largest = 2**bits - 1
    inverse = (largest / (high - low)).clamp(max=2e4)
    zero, beta, best = -low * inverse, 10.0, float("inf")
    for _ in range(20):
        codes = (x * inverse + zero).round().clamp(0, largest)
        error = x - (codes - zero) / inverse
        shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-30).pow(0.7 - 1) / beta).clamp(min=0)
        zero = (codes - (x - shrunk) * inverse).mean(1, keepdim=True)
        beta *= 1.01
        current = float(error.abs().mean())
        if current >= best:
            break
        best = current
    codes = (x * inverse + zero).round().clamp(0, largest)
    found: Tensor = (codes - zero) / inverse
    return found.view_as(weight)


@MATRICES
@pytest.mark.parametrize("bits", [3, 4])
def test_hqq_is_as_good_as_written_by_its_authors(bits: int, weight: Tensor) -> None:
    scheme = parse_scheme(f"w{bits}a16-g64+hqq")
    found, expected = dequantize(*fit(weight, scheme), scheme), half_quadratic(weight, 64, bits)
    assert nmse(found, weight) <= 1.01 * nmse(expected, weight)
    assert (found - weight).abs().mean() <= 1.005 * (expected - weight).abs().mean()


@pytest.mark.parametrize(
    ("name", "floor_db"),
    [
        *(("q8_0", 45.2), ("q6_k", 34.8), ("q5_k", 28.2), ("q4_k", 22.7), ("w4a16-g64+mse", 21.4)),
        *(("w4a16-g64+hqq", 21.1), ("w3a16-g64+mse", 15.0), ("w4a16-g128-sym", 19.5), ("fp8", 31.3)),
        *(("w6a16", 33.0), ("w5a16", 26.8), ("w3a16", 13.9), ("w2a16", 6.4), ("w8a16-tensor", 38.0)),
    ],
)
def test_normal_weights_keep_the_expected_signal_to_noise_ratio(name: str, floor_db: float) -> None:
    scheme = parse_scheme(name)
    encoded = encode(normal(), scheme)
    assert 10 * float(np.log10(encoded.signal / encoded.noise)) >= floor_db
