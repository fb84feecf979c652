"""Which modules of a model a recipe quantizes, and the swap to quantized layers on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from service.errors import RecipeError
from service.layers.embedding import QuantizedEmbedding, TiedHead
from service.layers.experts import QuantizedExperts, experts_obstacle
from service.layers.linear import QuantizedLinear, UnquantizedLinear, quantized_linear
from service.numerics.recipe import Recipe, num_layers, resolve
from service.numerics.schemes import NONE, QuantScheme

QuantizedLayer = QuantizedLinear | QuantizedEmbedding | QuantizedExperts

_LINEAR_SUBCLASSES = {"FalconLinear"}
"""Subclasses of linears that compute x W.T + bias. Others may compute anything."""

_MULTIPLIED_BY_PARENT = {"dt_proj": "MambaMixer", "correction_coefs": "AltUp"}
"""Small linears that are never called, by the suffix of the class around them, which multiplies their weight itself."""

_SCALED_EMBEDDING_SUFFIX = "ScaledWordEmbedding"
"""Of the classes that multiply embeddings by their `embed_scale`: Gemma's, BioGPT's and their kin."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One weight that a recipe decides about.

    Attributes:
        name: full name of the module, or of the parameter that holds the weights of all experts of a layer.
        shape: (out_features, in_features); of experts one below the other.
        scheme: what the recipe assigns; of a mixed scheme, and for sizes that it does not take, what it means here.
        reason: why it is not quantized although the recipe's default quantizes, whose storage it shares, or why the
            scheme is not the recipe's.
        obstacle: why there is no quantized layer for it, else "".
        is_transposed: the checkpoint stores [in_features, out_features] (Conv1D, some experts).
        shares: the module whose storage a tied head uses, else "".
        num_experts: of a stack of experts, else 0.
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    reason: str = ""
    obstacle: str = ""
    is_transposed: bool = False
    shares: str = ""
    num_experts: int = 0

    @property
    def parameter(self) -> str:
        """Name of the weight in the unquantized model."""
        return self.name if self.num_experts else f"{self.name}.weight"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the unquantized model."""
        rows, columns = self.shape
        matrix = (rows // max(1, self.num_experts), columns)
        stored = matrix[::-1] if self.is_transposed else matrix
        return (self.num_experts, *stored) if self.num_experts else stored

    @property
    def is_to_be_quantized(self) -> bool:
        """Whether the recipe asks for a quantized layer, and there is one."""
        return not self.scheme.is_none and not self.obstacle


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
    counts = num_layers(slot.name for slot in slots)
    return [_resolved(slot, counts) for slot in slots]


def _resolved(slot: Slot, counts: dict[str, int]) -> Slot:
    if slot.scheme.is_none:
        return slot
    scheme, reason = resolve(slot.scheme, slot.name, counts, in_features=slot.shape[1])
    return replace(slot, scheme=scheme, reason=slot.reason if slot.shares else reason)


def _slots(
    model: nn.Module, recipe: Recipe, vocabulary: Vocabulary, transposed_types: tuple[type[nn.Module], ...]
) -> Iterator[Slot]:
    tied_scheme = _tied_scheme(recipe, vocabulary) if vocabulary.is_tied else NONE
    overrides_only = Recipe(default=NONE, overrides=recipe.overrides)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name, module in modules.items():
        if name == vocabulary.head and vocabulary.is_tied:
            embedding = model.get_submodule(vocabulary.embedding)
            assert isinstance(embedding, nn.Embedding)
            yield Slot(
                name=name,
                shape=(embedding.num_embeddings, embedding.embedding_dim),
                scheme=tied_scheme,
                reason=f"shares the weight of {vocabulary.embedding}",
                obstacle=_embedding_obstacle(embedding),
                shares=vocabulary.embedding,
            )
        elif isinstance(module, (nn.Linear, *transposed_types)):
            is_router = _is_router(name, modules)
            rules = overrides_only if is_router else recipe
            yield _linear_slot(
                name,
                module,
                rules.scheme_for(name, is_head=name == vocabulary.head),
                is_router=is_router,
                is_transposed=type(module) in transposed_types,
                obstacle=_parent_obstacle(name, modules),
            )
        elif isinstance(module, nn.Embedding):
            is_tied = vocabulary.is_tied and name == vocabulary.embedding
            yield Slot(
                name=name,
                shape=(module.num_embeddings, module.embedding_dim),
                scheme=tied_scheme if is_tied else overrides_only.scheme_for(name, is_head=False),
                reason="" if is_tied else "input embeddings stay 16 bit",
                obstacle=_embedding_obstacle(module),
            )
        elif not isinstance(module, _CONVOLUTIONS):
            yield from _expert_slots(name, module, recipe)


def _linear_slot(
    name: str, module: nn.Module, scheme: QuantScheme, *, is_router: bool, is_transposed: bool, obstacle: str
) -> Slot:
    rows, columns = module.get_parameter("weight").shape
    kind = type(module).__name__
    is_known = is_transposed or type(module) is nn.Linear or kind in _LINEAR_SUBCLASSES
    return Slot(
        name=name,
        shape=(columns, rows) if is_transposed else (rows, columns),
        scheme=scheme,
        reason="routers stay as they are" if is_router else "",
        obstacle=obstacle or ("" if is_known else f"{kind} has no quantized layer in this version"),
        is_transposed=is_transposed,
    )


def _is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a linear chooses experts: it is called router, or it is or lies in a `gate` beside `experts`."""
    parts = name.split(".")
    if any("router" in part for part in parts):
        return True
    gates = (i for i, part in enumerate(parts) if part in ("gate", "shared_expert_gate"))
    return any(".".join([*parts[:i], "experts"]) in modules for i in gates)


def _parent_obstacle(name: str, modules: dict[str, nn.Module]) -> str:
    parent, _, leaf = name.rpartition(".")
    suffix = _MULTIPLIED_BY_PARENT.get(leaf)
    kind = type(modules[parent]).__name__ if parent in modules else ""
    return f"{kind} multiplies its weight itself" if suffix and kind.endswith(suffix) else ""


def _embedding_obstacle(module: nn.Embedding) -> str:
    kind = type(module).__name__
    is_known = type(module) is nn.Embedding or kind.endswith(_SCALED_EMBEDDING_SUFFIX)
    return "" if is_known else f"{kind} has no quantized layer in this version"


def _expert_slots(name: str, module: nn.Module, recipe: Recipe) -> Iterator[Slot]:
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1:  # else vectors
            obstacle = experts_obstacle(module, leaf)
            is_transposed = not obstacle and bool(module.is_transposed)
            num_experts, rows, columns = parameter.shape
            if is_transposed:
                rows, columns = columns, rows
            full_name = f"{name}.{leaf}"
            yield Slot(
                name=full_name,
                shape=(num_experts * rows, columns),
                scheme=recipe.scheme_for(full_name, is_head=False),
                obstacle=obstacle,
                is_transposed=is_transposed,
                num_experts=num_experts,
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


def swap(model: nn.Module, slot: Slot, dtype: torch.dtype) -> QuantizedLayer | None:
    """Put the quantized layer of a slot in its place, empty and on the meta device.

    Embeddings must be swapped before a head that shares their storage. Experts are
    not put in their place, which their parameter keeps until it has been read; see `attach_experts`.

    Returns:
        The layer whose buffers are to be filled; None for a tied head, which has none of its own.
    """
    out_features, in_features = slot.shape
    if slot.num_experts:
        with torch.device("meta"):
            return QuantizedExperts(slot.num_experts, out_features // slot.num_experts, in_features, slot.scheme)
    old = model.get_submodule(slot.name)
    bias = getattr(old, "bias", None) is not None
    layer: QuantizedLinear | QuantizedEmbedding | TiedHead
    with torch.device("meta"):
        if slot.shares:
            embedding = model.get_submodule(slot.shares)
            assert isinstance(embedding, QuantizedEmbedding)
            layer = TiedHead(embedding, bias=bias)
        elif isinstance(old, nn.Embedding):
            layer = QuantizedEmbedding(
                out_features,
                in_features,
                slot.scheme,
                dtype=dtype,
                padding_idx=old.padding_idx,
                multiplier=_multiplier(old, dtype),
            )
        else:
            layer = quantized_linear(in_features, out_features, slot.scheme, bias=bias, dtype=dtype)
    layer.train(old.training)
    parent, _, leaf = slot.name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)
    return None if isinstance(layer, TiedHead) else layer


def keep(model: nn.Module, slot: Slot) -> None:
    """Leave a slot unquantized; an `nn.Linear` gets the kernel that is quick at a few rows, with its parameters."""
    module = model.get_submodule(slot.name) if not slot.num_experts else None
    if type(module) is nn.Linear:
        parent, _, leaf = slot.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, UnquantizedLinear.in_place_of(module))


def tied_linears(model: nn.Module, tied: Mapping[str, str]) -> dict[str, str]:
    """Linears whose parameters are all tied to those of another, as in Zamba's shared blocks, and that other one.

    Args:
        tied: full names of parameters, and of those that they are tied to.
    """
    modules = dict(model.named_modules())
    pairs = {target.rpartition(".")[0]: source.rpartition(".")[0] for target, source in tied.items()}
    return {
        name: source
        for name, source in pairs.items()
        if type(modules.get(name)) is type(modules.get(source)) is nn.Linear
        and all(f"{name}.{leaf}" in tied for leaf, _ in modules[name].named_parameters())
    }


def share(model: nn.Module, modules: Mapping[str, str]) -> None:
    """Put modules, named second, in the places of others, named first."""
    for name, source in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(source))


def attach_experts(model: nn.Module, slot: Slot, layer: QuantizedExperts) -> None:
    """Put quantized experts in the place of their parameter."""
    parent, _, leaf = slot.name.rpartition(".")
    module = model.get_submodule(parent)
    delattr(module, leaf)
    setattr(module, leaf, layer.train(module.training))


def _multiplier(embedding: nn.Embedding, dtype: torch.dtype) -> float:
    """What an embedding multiplies its rows by. One that keeps it in a buffer rounds it to its own dtype first."""
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        return float(torch.tensor(embedding.scalar_embed_scale, dtype=dtype, device="cpu"))
    return float(scale)
