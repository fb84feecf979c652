"""The one adapter to transformers' quantizer hooks: the loader finds out which weight goes where.

transformers builds the model on the meta device, asks the quantizer to swap modules, and then converts one
checkpoint tensor at a time; with a quantizer that quantizes on the fly its prefetch threads are off, so at
most one tensor (or one group that is merged) is in full precision at any moment.

Per quantized layer a placeholder parameter `weight` stands on meta, so that the loader finds the name of the
checkpoint. The conversion hook writes down where the weight lies, unread, for `filling` to fill the buffers `qweight`,
`scales` and `zero_points` with it later. What transformers converts before, such as a weight that it splits, is read
for that and encoded at once. Stacked experts are a parameter of their own, which is its own placeholder, and their
layer takes its place at the end.

Private names of transformers that are used here, each covered by a test: `HfQuantizer`, `ConversionOps`,
`all_tied_weights_keys`, `_get_dtype_plan`, `_is_hf_initialized`, `ExpertsInterface`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.moe import ExpertsInterface
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from service.errors import CheckpointError, PennyweightError
from service.layers.experts import QuantizedExperts, forward_experts
from service.layers.replace import (
    Vocabulary,
    assign_schemes,
    attach_experts,
    keep,
    share,
    swap,
    tied_linears,
)
from service.loading.filling import fill, require_shape
from service.loading.record import BUFFERS, LoadRecord, UnreadExperts
from service.loading.tensors import TensorRef
from service.numerics.recipe import Recipe

METHOD = "pennyweight"


@register_quantization_config(METHOD)
class LoadQuantizationConfig(QuantizationConfigMixin):
    """Carries the recipe into `from_pretrained` and the record of the load out of it."""

    def __init__(self, recipe: Recipe, record: LoadRecord) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.recipe = recipe
        self.record = record

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for the config's own serialization."""
        return {"quant_method": METHOD, "recipe": self.recipe.text}


@register_quantizer(METHOD)
class LoadQuantizer(HfQuantizer):
    """Swaps modules on meta and encodes weights as they arrive."""

    def __init__(self, quantization_config: LoadQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.recipe = quantization_config.recipe
        self.record = quantization_config.record

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        record, dtype = self.record, model.dtype
        record.original_bytes, record.num_parameters = original_size(model)
        vocabulary = find_vocabulary(model)
        record.shared = {} if self.recipe.is_none else tied_linears(model, model.all_tied_weights_keys)
        share(model, record.shared)  # each is one slot; below all take what was swapped in
        record.slots = assign_schemes(model, self.recipe, vocabulary, transposed_types=(Conv1D,))
        for slot in sorted(record.slots, key=lambda slot: bool(slot.shares)):  # what shares comes after what it shares
            if not slot.is_to_be_quantized:
                if not self.recipe.is_none:
                    keep(model, slot)
                continue
            layer = swap(model, slot, dtype)
            if layer is None:
                model.all_tied_weights_keys.pop(f"{slot.name}.weight")
                continue
            if not slot.num_experts:
                layer.register_parameter("weight", _placeholder(slot.stored_shape, dtype))
            # Families with rules of their own to initialise weights must not fill it.
            model.get_parameter(slot.parameter)._is_hf_initialized = True  # type: ignore[attr-defined]
            record.layers[slot.name] = (slot, layer)
            record.names[slot.parameter] = slot.name
        share(model, record.shared)
        _read_in_file_dtype(model, list(record.names))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for slot, layer in self.record.layers.values():
            if isinstance(layer, QuantizedExperts):
                attach_experts(model, slot, layer)
            else:
                placeholder = layer.weight
                del layer.weight
                layer.weight = placeholder.data  # no parameter, and on meta: some models ask it for its dtype
        if any(slot.num_experts for slot, _ in self.record.layers.values()):
            ExpertsInterface.register(METHOD, forward_experts)
            model.set_experts_implementation(METHOD)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a quantized layer."""
        return param_name in self.record.names

    def get_quantize_ops(self) -> ConversionOps:
        """The conversion that the loader runs on each such weight."""
        return TakeWeights(self.record)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Have experts merged with one copy in memory instead of two, and weights read before other conversions."""
        for conversion in weight_conversions:
            if _stacks_experts(conversion):
                conversion.operations = [StackExperts(self.record)]
            elif isinstance(conversion, WeightConverter):
                conversion.operations = [ReadTensors(), *conversion.operations]
        return weight_conversions

    def is_serializable(self) -> bool:
        """False: plain transformers would read the codes as weights; artifacts have a format of their own."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


class TakeWeights(ConversionOps):
    """Keeps the weights of quantized layers for `filling`, or fills their buffers; passes other tensors through."""

    def __init__(self, record: LoadRecord) -> None:
        self.record = record

    # The loader passes all else by name, and takes bare tensors as well as lists of one.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensors that the loader is to install: those of no quantized layer."""
        others: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer_name = self.record.names.get(name)
            if layer_name is None:
                others[name] = weight
                continue
            try:
                self._take(layer_name, weight)
            except PennyweightError as error:
                self.record.failure = self.record.failure or error
                raise
            names = [layer_name, *(other for other, own in self.record.shared.items() if own == layer_name)]
            missing_keys -= {name, *(f"{each}.{leaf}" for each in names for leaf in BUFFERS)}
        return others

    def _take(self, layer_name: str, weight: Tensor | TensorRef | UnreadExperts) -> None:
        if isinstance(weight, TensorRef) and weight.strides:
            weight = weight.read()
        if isinstance(weight, Tensor):
            fill(self.record, layer_name, weight)
        else:
            require_shape(self.record.layers[layer_name][0], weight.shape)
            self.record.unread[layer_name] = weight


class ReadTensors(ConversionOps):
    """Reads what is still unread, for the conversions of transformers that come after it."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The same tensors by the same names, in memory."""
        return {name: [_in_memory(tensor) for tensor in tensors] for name, tensors in input_dict.items()}


class StackExperts(ConversionOps):
    """Merges the matrices of single experts into [experts, out, in], and lets go of each that has been copied.

    transformers stacks the experts of each source, then concatenates the stacks: the same tensor, twice in memory.
    Those that are to be quantized are not merged at all: `filling` encodes each expert by itself.
    """

    def __init__(self, record: LoadRecord) -> None:
        self.record = record

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, Tensor | UnreadExperts]:
        """The merged tensor under its one target, from a list of tensors per source."""
        sources = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        shapes = [{tuple(tensor.shape) for tensor in tensors} for tensors in sources]
        num_experts = {len(tensors) for tensors in sources}
        if len(num_experts) != 1 or len(sources) != len(source_patterns) or any(len(found) != 1 for found in shapes):
            self.record.failure = self.record.failure or CheckpointError(
                f"{full_layer_name}: the checkpoint lacks weights of some experts, or they differ in shape; download "
                "the model again"
            )
            raise self.record.failure
        if _are_alike([tensor for tensors in sources for tensor in tensors]):
            return {target_patterns[0]: UnreadExperts(tuple(zip(*sources, strict=True)))}
        return {target_patterns[0]: _merged(sources)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Stay one: the loader copies a conversion, operations and all, for every tensor of the checkpoint."""
        return self


def _are_alike(tensors: list[Tensor | TensorRef]) -> bool:
    """Whether all are unread matrices of one dtype whose rows lie in order."""
    return len({tensor.dtype for tensor in tensors}) == 1 and all(
        isinstance(tensor, TensorRef) and not tensor.strides and len(tensor.shape) == 2 for tensor in tensors
    )


def _merged(sources: list[list[Any]]) -> Tensor:
    """[experts, out, in] of the matrices of single experts, a list per source; the lists are emptied on the way."""
    first = sources[0][0]
    rows = sum(tensors[0].shape[0] for tensors in sources)
    merged = torch.empty(len(sources[0]), rows, *first.shape[1:], dtype=first.dtype)
    with _one_thread():
        for index, expert in enumerate(merged):
            torch.cat([_in_memory(tensors[index]) for tensors in sources], out=expert)
            for tensors in sources:
                tensors[index] = None
    return merged


def _in_memory(tensor: Tensor | TensorRef) -> Tensor:
    return tensor.read() if isinstance(tensor, TensorRef) else tensor


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it torch uses one thread: short copies between encoding threads wait long for threads of its own."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _stacks_experts(conversion: Any) -> bool:
    """Whether a conversion merges lists of matrices along a new dimension and then, if several, their rows."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    kinds = [type(operation) for operation in conversion.operations]
    dims = [getattr(operation, "dim", None) for operation in conversion.operations]
    num_sources = len(conversion.source_patterns)
    return (kinds, dims, num_sources > 1) in (
        ([MergeModulelist], [0], False),
        ([MergeModulelist, Concatenate], [0, 1], True),
    )


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def find_vocabulary(model: PreTrainedModel) -> Vocabulary:
    """Names of the embedding and head modules of a model on meta, and whether their weight is one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    head_module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = names[id(head_module)] if head_module is not None else ""
    is_tied = model.all_tied_weights_keys.get(f"{head}.weight") == f"{embedding}.weight"
    return Vocabulary(embedding=embedding, head=head, is_tied=is_tied)


def original_size(model: PreTrainedModel) -> tuple[int, int]:
    """(bytes of parameters and persistent buffers, number of parameters), tied tensors once."""
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return num_bytes, sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, nn.Parameter))


def _read_in_file_dtype(model: PreTrainedModel, names: list[str]) -> None:
    """Have the loader hand over these weights as they are in the file.

    By default it casts every tensor to the serving dtype first: a second rounding before quantization,
    and a copy of the whole tensor.
    """
    plan_of_class = model._get_dtype_plan

    def plan(dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        return {**plan_of_class(dtype), **dict.fromkeys((f"^{name.replace('.', '[.]')}$" for name in names), None)}

    model._get_dtype_plan = plan  # type: ignore[method-assign]
