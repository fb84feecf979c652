"""Which modules of a model a recipe quantizes, and the swap to quantized layers on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from service.errors import RecipeError
from service.layers.embedding import QuantizedEmbedding, TiedHead
from service.layers.linear import PackedLinear, W8A16Linear, quantized_linear
from service.numerics.recipe import Recipe
from service.numerics.schemes import NONE, QuantScheme

QuantizedLayer = W8A16Linear | PackedLinear | QuantizedEmbedding


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One weight that a recipe decides about.

    Attributes:
        name: full module name.
        shape: (out_features, in_features).
        scheme: what the recipe assigns.
        reason: why it is not quantized although the recipe's default quantizes, or whose storage it shares.
        is_transposed: the checkpoint stores [in_features, out_features] (Conv1D).
        shares: the module whose storage a tied head uses, else "".
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    reason: str = ""
    is_transposed: bool = False
    shares: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The module names of a model's input embedding and output head, and whether they share one weight."""

    embedding: str
    head: str
    is_tied: bool


def assign_schemes(
    model: nn.Module, recipe: Recipe, vocabulary: Vocabulary, *, transposed_types: tuple[type[nn.Module], ...]
) -> list[Slot]:
    """One slot per linear, embedding and stacked expert weight of a model, in module order.

    Args:
        model: on the meta device, before any swap.
        transposed_types: classes whose weight is [in_features, out_features], such as Conv1D.

    Raises:
        RecipeError: a pattern matches no slot, or gives a tied pair two schemes.
    """
    slots = list(_slots(model, recipe, vocabulary, transposed_types))
    unmatched = recipe.unmatched([slot.name for slot in slots])
    if unmatched:
        examples = ", ".join(slot.name for slot in (slots[0], slots[len(slots) // 2], slots[-1]))
        raise RecipeError(
            f"pattern {unmatched[0]!r} matches no layer of this model; patterns match full module names, "
            f"such as {examples}"
        )
    return slots


def _slots(
    model: nn.Module, recipe: Recipe, vocabulary: Vocabulary, transposed_types: tuple[type[nn.Module], ...]
) -> Iterator[Slot]:
    tied_scheme = _tied_scheme(recipe, vocabulary) if vocabulary.is_tied else NONE
    overrides_only = Recipe(default=NONE, overrides=recipe.overrides)
    for name, module in model.named_modules():
        if name == vocabulary.head and vocabulary.is_tied:
            embedding = model.get_submodule(vocabulary.embedding)
            assert isinstance(embedding, nn.Embedding)
            reason = f"shares the weight of {vocabulary.embedding}"
            shape = (embedding.num_embeddings, embedding.embedding_dim)
            yield Slot(name=name, shape=shape, scheme=tied_scheme, reason=reason, shares=vocabulary.embedding)
        elif type(module) is nn.Linear:
            scheme = recipe.scheme_for(name, is_head=name == vocabulary.head)
            yield Slot(name=name, shape=(module.out_features, module.in_features), scheme=scheme)
        elif type(module) in transposed_types:
            (in_features, out_features) = module.get_parameter("weight").shape
            scheme = recipe.scheme_for(name, is_head=name == vocabulary.head)
            yield Slot(name=name, shape=(out_features, in_features), scheme=scheme, is_transposed=True)
        elif isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            is_tied = vocabulary.is_tied and name == vocabulary.embedding
            scheme = tied_scheme if is_tied else overrides_only.scheme_for(name, is_head=False)
            yield Slot(name=name, shape=shape, scheme=scheme, reason="" if is_tied else "input embeddings stay 16 bit")
        else:
            yield from _expert_slots(name, module, recipe)


def _expert_slots(name: str, module: nn.Module, recipe: Recipe) -> Iterator[Slot]:
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            experts, rows, columns = parameter.shape
            full_name = f"{name}.{leaf}"
            yield Slot(
                name=full_name,
                shape=(experts * rows, columns),
                scheme=recipe.scheme_for(full_name, is_head=False),
                reason="stacked experts",
            )


def _tied_scheme(recipe: Recipe, vocabulary: Vocabulary) -> QuantScheme:
    """The scheme of the one weight behind embedding and head; a pattern may name either."""
    names = (vocabulary.head, vocabulary.embedding)
    named = [name for name in names if any(fnmatchcase(name, pattern) for pattern, _ in recipe.overrides)]
    schemes = {recipe.scheme_for(name, is_head=True) for name in named or names[:1]}
    if len(schemes) > 1:
        texts = " and ".join(f"{name}={recipe.scheme_for(name, is_head=True).name}" for name in named)
        raise RecipeError(f"{texts}: the two share one weight in this model; give both the same scheme")
    return schemes.pop()


def can_quantize(model: nn.Module, slot: Slot) -> bool:
    """Whether there is a quantized layer for the slot's module: plain linears, Conv1D and plain embeddings."""
    if slot.reason == "stacked experts":
        return False
    module = model.get_submodule(slot.shares or slot.name)
    return not isinstance(module, nn.Embedding) or type(module) is nn.Embedding


def swap(model: nn.Module, slot: Slot, dtype: torch.dtype) -> QuantizedLayer | None:
    """Put the quantized layer of a slot in its place, empty and on the meta device.

    Embeddings must be swapped before a head that shares their storage (module order does that).

    Returns:
        The layer whose buffers are to be filled; None for a tied head, which has none of its own.
    """
    old = model.get_submodule(slot.name)
    bias = getattr(old, "bias", None) is not None
    out_features, in_features = slot.shape
    layer: nn.Module
    with torch.device("meta"):
        if slot.shares:
            embedding = model.get_submodule(slot.shares)
            assert isinstance(embedding, QuantizedEmbedding)
            layer = TiedHead(embedding, bias=bias)
        elif isinstance(old, nn.Embedding):
            layer = QuantizedEmbedding(out_features, in_features, slot.scheme, dtype=dtype, padding_idx=old.padding_idx)
        else:
            layer = quantized_linear(in_features, out_features, slot.scheme, bias=bias, dtype=dtype)
    layer.train(old.training)
    parent, _, leaf = slot.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return None if isinstance(layer, TiedHead) else layer  # type: ignore[return-value]
