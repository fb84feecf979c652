"""The quantized embedding and the head tied to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.layers.embedding import QuantizedEmbedding, TiedHead
from service.numerics.encode import encode
from service.numerics.schemes import parse_scheme

SCHEMES = ["w8a16", "w8a16-g128", "w4a16-g64", "w4a16-g128-sym", "nf4", "fp4"]


def filled(name: str, dtype: torch.dtype = torch.float32) -> QuantizedEmbedding:
    """An embedding of 50 tokens and width 100, built on meta, with random weights."""
    with torch.device("meta"):
        embedding = QuantizedEmbedding(50, 100, parse_scheme(name), dtype=dtype, padding_idx=3)
    weight = torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    embedding.qweight, embedding.scales, embedding.zero_points = encode(weight, embedding.scheme)[:3]
    return embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_those_of_the_decoded_weight_rounded_once(name: str, dtype: torch.dtype) -> None:
    embedding = filled(name, dtype)
    token_ids = torch.tensor([[49, 0, 3], [3, 3, 17]])
    rows = embedding(token_ids)
    assert rows.shape == (2, 3, 100)
    assert torch.equal(rows, embedding.dequantize()[token_ids].to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_no_tokens_give_no_rows(name: str) -> None:
    assert filled(name)(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, 100)


def test_token_beyond_the_vocabulary_is_an_error() -> None:
    for name in SCHEMES:  # ids 50 to 63 are padding of the last strip, and no tokens
        with pytest.raises(IndexError, match="index 50 is out of bounds"):
            filled(name)(torch.tensor([3, 50]))


def test_attributes_are_those_of_an_embedding() -> None:
    embedding = filled("w8a16", torch.bfloat16)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (50, 100, 3)
    assert "50, 100, scheme=w8a16" in repr(embedding)


@pytest.mark.parametrize("name", SCHEMES)
def test_tied_head_multiplies_with_the_embedding(name: str) -> None:
    embedding = filled(name)
    head = TiedHead(embedding, bias=False)
    x = torch.randn(2, 3, 100)
    expected = x.double() @ embedding.dequantize().double().t()
    assert head(x).shape == (2, 3, 50)
    assert float((head(x).double() - expected).norm() / expected.norm()) <= 1e-5
    assert (head.in_features, head.out_features, head.scheme) == (100, 50, embedding.scheme)


def test_tied_head_adds_its_own_bias() -> None:
    embedding = filled("w8a16")
    plain, biased = TiedHead(embedding, bias=False), TiedHead(embedding, bias=True)
    assert plain.bias is None
    biased.bias = nn.Parameter(torch.arange(50.0), requires_grad=False)
    x = torch.randn(2, 100)
    assert torch.allclose(biased(x), plain(x) + torch.arange(50.0), atol=1e-5)


def test_tied_weight_has_one_name_and_follows_the_embedding() -> None:
    embedding = filled("w4a16-g64")
    model = nn.ModuleDict({"embed": embedding, "head": TiedHead(embedding, bias=False)})
    assert set(model.state_dict()) == {"embed.qweight", "embed.scales", "embed.zero_points"}
    assert [name for name, _ in model.named_modules()] == ["", "embed", "head"]
    x = torch.randn(1, 100)
    before = model["head"](x)
    embedding.scales.mul_(2)
    assert torch.allclose(model["head"](x), 2 * before)
    model.to("meta")
    assert model["head"](x.to("meta")).is_meta
