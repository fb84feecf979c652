"""The one adapter to transformers' quantizer hooks: weights are quantized while the loader streams them.

transformers builds the model on the meta device, asks the quantizer to swap modules, and then converts one
checkpoint tensor at a time; with a quantizer that quantizes on the fly its prefetch threads are off, so at
most one tensor (or one group that is merged) is in full precision at any moment.

Per quantized layer a placeholder parameter `weight` stands on meta, so that the loader finds the name of the
checkpoint. The conversion hook fills the buffers `qweight`, `scales` and `zero_points` in its stead; it goes
when all are filled.

Private names of transformers that are used here, each covered by a test: `HfQuantizer`, `ConversionOps`,
`all_tied_weights_keys`, `_get_dtype_plan`, `_is_hf_initialized`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from service.errors import CheckpointError, PennyweightError
from service.layers.replace import QuantizedLayer, Slot, Vocabulary, assign_schemes, can_quantize, swap
from service.numerics.encode import encode
from service.numerics.recipe import Recipe

METHOD = "pennyweight"


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """Error of one quantized weight: sums of squares of the weight and of its error."""

    signal: float
    noise: float


@dataclass(slots=True)
class LoadRecord:
    """What the hooks saw during one load.

    Attributes:
        slots: every weight that the recipe decides about.
        layers: the quantized layers to fill, by name.
        encoded: errors of the layers filled so far.
        original_bytes, num_parameters: of the unquantized model at the serving dtype, tied tensors once.
        quantize_s, pack_s: wall seconds.
        failure: the first error in a conversion; transformers itself reports only its text.
    """

    slots: list[Slot] = field(default_factory=list)
    layers: dict[str, tuple[Slot, QuantizedLayer]] = field(default_factory=dict)
    encoded: dict[str, EncodedLayer] = field(default_factory=dict)
    original_bytes: int = 0
    num_parameters: int = 0
    quantize_s: float = 0.0
    pack_s: float = 0.0
    failure: PennyweightError | None = None


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
        record.original_bytes, record.num_parameters = _original_size(model)
        vocabulary = find_vocabulary(model)
        record.slots = assign_schemes(model, self.recipe, vocabulary, transposed_types=(Conv1D,))
        for slot in record.slots:
            if slot.scheme.is_none or not can_quantize(model, slot):
                continue
            layer = swap(model, slot, dtype)
            if layer is None:
                model.all_tied_weights_keys.pop(f"{slot.name}.weight")
                continue
            stored = slot.shape[::-1] if slot.is_transposed else slot.shape
            layer.register_parameter("weight", _placeholder(stored, dtype))
            record.layers[slot.name] = (slot, layer)
        _read_in_file_dtype(model, [f"{name}.weight" for name in record.layers])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for _, layer in self.record.layers.values():
            del layer.weight

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a swapped layer."""
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and owner in self.record.layers

    def get_quantize_ops(self) -> ConversionOps:
        """The conversion that the loader runs on each such weight."""
        return EncodeWeights(self.record)

    def is_serializable(self) -> bool:
        """False: plain transformers would read the codes as weights; artifacts have a format of their own."""
        return False

    @property
    def is_trainable(self) -> bool:
        """False: codes have no gradient."""
        return False


class EncodeWeights(ConversionOps):
    """Quantizes and packs each weight of a swapped layer; passes other tensors through."""

    def __init__(self, record: LoadRecord) -> None:
        self.record = record

    # The loader passes all else by name, and takes bare tensors as well as lists of one.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Buffers by full name, for each weight by full name."""
        converted: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            owner = name.removesuffix(".weight")
            if owner not in self.record.layers:
                converted[name] = tensor
                continue
            try:
                converted.update(self._encode(owner, tensor))
            except PennyweightError as error:
                self.record.failure = self.record.failure or error
                raise
            missing_keys.discard(name)
        return converted

    def _encode(self, owner: str, weight: Tensor) -> dict[str, Tensor]:
        slot, _ = self.record.layers[owner]
        stored = tuple(reversed(slot.shape)) if slot.is_transposed else slot.shape
        if tuple(weight.shape) != stored:
            raise CheckpointError(
                f"{owner}.weight has shape {list(weight.shape)} in the checkpoint, the config asks for {list(stored)}; "
                "config and weights belong to different models"
            )
        try:
            encoded = encode(weight.t() if slot.is_transposed else weight, slot.scheme)
        except PennyweightError as error:
            raise type(error)(f"{owner}.weight: {error}") from error
        self.record.quantize_s += encoded.quantize_s
        self.record.pack_s += encoded.pack_s
        self.record.encoded[owner] = EncodedLayer(encoded.signal, encoded.noise)
        buffers = {"qweight": encoded.qweight, "scales": encoded.scales, "zero_points": encoded.zero_points}
        return {f"{owner}.{leaf}": buffer for leaf, buffer in buffers.items() if buffer is not None}


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A weight on meta, marked as initialised: families with rules of their own must not fill it."""
    weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight


def find_vocabulary(model: PreTrainedModel) -> Vocabulary:
    """Names of the embedding and head modules of a model on meta, and whether their weight is one."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    head_module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = names[id(head_module)] if head_module is not None else ""
    is_tied = model.all_tied_weights_keys.get(f"{head}.weight") == f"{embedding}.weight"
    return Vocabulary(embedding=embedding, head=head, is_tied=is_tied)


def _original_size(model: PreTrainedModel) -> tuple[int, int]:
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
