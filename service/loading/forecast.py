"""What a model will hold once a recipe has been applied to it, found on the meta device: no weight is read.

Private names of transformers that are used here, each covered by a test: `get_init_context`, `_get_dtype_plan`,
`all_tied_weights_keys`, `get_model_conversion_mapping`, `rename_source_key`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ContextManagers

from service.layers.replace import Slot, assign_schemes, share, tied_linears
from service.loading.config import ServedModel, class_errors
from service.loading.quantizer import find_vocabulary, original_size
from service.loading.report import WeightBytes
from service.numerics.recipe import Recipe
from service.numerics.storage import storage_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleForecast:
    """What one module will hold.

    Attributes:
        name: full name; of stacked experts that of their parameter.
        scheme: canonical scheme of its weight, `none` if it stays as it is.
        bytes: by kind, all 0 if it shares another module's storage.
    """

    name: str
    scheme: str
    bytes: WeightBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """The experts of one layer: their module, the shapes of its stacked weights, and whether one stays as it is."""

    module: str
    shapes: tuple[tuple[int, ...], ...]
    has_unquantized: bool

    @property
    def num_weights(self) -> int:
        """Of all experts of the layer."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


class Skeleton:
    """A model without weights, and without memory for them.

    Attributes:
        original_bytes, num_parameters: of the unquantized model at the serving dtype, tied tensors once.
    """

    def __init__(self, served: ServedModel, dtype: torch.dtype) -> None:
        """Make the model as transformers does before it loads weights.

        Raises:
            ModelError: the model's class fails.
        """
        config = copy.deepcopy(served.config)
        config.dtype = dtype
        with class_errors(), ContextManagers(served.model_class.get_init_context(dtype, True, False, None)):
            self._model: PreTrainedModel = served.model_class(config)
        model = self._model
        self.original_bytes, self.num_parameters = original_size(model)
        self._vocabulary = find_vocabulary(model)
        shared = tied_linears(model, model.all_tied_weights_keys)
        self._tied = {name for name in model.all_tied_weights_keys if name.rpartition(".")[0] not in shared}
        self._wide_names = _pattern(model._get_dtype_plan(dtype))
        share(model, shared)

    def modules(self, recipe: Recipe) -> list[ModuleForecast]:
        """What each module with parameters or persistent buffers will hold, in their order.

        Raises:
            RecipeError: a pattern matches nothing, or gives a tied pair two schemes.
        """
        slots = {slot.parameter: slot for slot in self._slots(recipe)}
        sums: dict[str, WeightBytes] = {}
        seen: set[int] = set()
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if name in self._tied or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            slot = slots.get(name)
            owner = slot.name if slot is not None else name.rpartition(".")[0]
            held = sums.get(owner, WeightBytes(codes=0, scales=0, unquantized=0))
            sums[owner] = _sum(held, self._bytes_of(name, tensor, slot))
        schemes = {slot.name: slot.scheme.name if slot.is_to_be_quantized else "none" for slot in slots.values()}
        empty = {slot.name: WeightBytes(codes=0, scales=0, unquantized=0) for slot in slots.values() if slot.shares}
        return [
            ModuleForecast(name=name, scheme=schemes.get(name, "none"), bytes=held)
            for name, held in (sums | {name: none for name, none in empty.items() if name not in sums}).items()
        ]

    def experts(self, recipe: Recipe) -> list[StackedExperts]:
        """Layers with stacked experts."""
        stacks: dict[str, list[Slot]] = {}
        for slot in self._slots(recipe):
            if slot.num_experts:
                stacks.setdefault(slot.name.rpartition(".")[0], []).append(slot)
        return [
            StackedExperts(
                module=module,
                shapes=tuple(slot.stored_shape for slot in slots),
                has_unquantized=not all(slot.is_to_be_quantized for slot in slots),
            )
            for module, slots in stacks.items()
        ]

    def reads_in_pieces(self, names: Iterable[str], recipe: Recipe) -> set[str]:
        """Which tensors of a checkpoint, of those with these names, a load reads by runs of rows.

        They are those that become one weight each, as they are. A quantized one that is stored the other way round, or
        whose scheme looks at all of it, is read at once.
        """
        conversions = get_model_conversion_mapping(self._model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        own_names = self._model.state_dict()
        whole = {
            slot.parameter
            for slot in self._slots(recipe)
            if slot.is_to_be_quantized and not slot.num_experts and (slot.is_transposed or not slot.scheme.is_row_local)
        }
        found = set()
        for name in names:
            own_name, source = rename_source_key(name, renamings, converters, self._model.base_model_prefix, own_names)
            if source is None and own_name in own_names and own_name not in whole:
                found.add(name)
        return found

    def _slots(self, recipe: Recipe) -> list[Slot]:
        return assign_schemes(self._model, recipe, self._vocabulary, transposed_types=(Conv1D,))

    def _bytes_of(self, name: str, tensor: Tensor, slot: Slot | None) -> WeightBytes:
        if slot is None or not slot.is_to_be_quantized:
            itemsize = torch.float32.itemsize if self._wide_names.search(name) else tensor.itemsize
            return WeightBytes(codes=0, scales=0, unquantized=tensor.numel() * itemsize)
        num_matrices = max(1, slot.num_experts)
        shapes = storage_shapes(slot.shape[0] // num_matrices, slot.shape[1], slot.scheme)
        return WeightBytes(
            codes=num_matrices * shapes.codes_bytes, scales=num_matrices * shapes.scales_bytes, unquantized=0
        )


def _sum(left: WeightBytes, right: WeightBytes) -> WeightBytes:
    return WeightBytes(
        codes=left.codes + right.codes,
        scales=left.scales + right.scales,
        unquantized=left.unquantized + right.unquantized,
    )


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """What finds the names of parameters that transformers keeps in float32, by its list of parts of them."""
    return re.compile("|".join(name.replace("*", ".*") for name in names) or "(?!)")
