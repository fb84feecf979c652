"""Where the weights of a fidelity comparison come from: the checkpoint, and the quantized model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.errors import UnsupportedModel
from service.layers.buffers import QuantizedModule
from service.layers.embedding import TiedHead
from service.layers.experts import QuantizedExperts
from service.loading.config import ServedModel, class_errors
from service.loading.deferred import Deferred, Workshop, read_stacks_once
from service.loading.tensors import TensorRef
from service.numerics.encode import decode, decode_rows


class FileSource:
    """A tensor of a checkpoint."""

    def __init__(self, ref: TensorRef) -> None:
        self._ref = ref
        self.shape = ref.shape
        self.dtype = ref.dtype

    def whole(self) -> Tensor:
        """All of it, in fresh memory."""
        return self._ref.read()

    def rows(self, begin: int, end: int) -> Tensor:
        """Some rows; only these are read, unless the file has their elements in another order."""
        ref = self._ref
        if ref.strides:
            return ref.read()[begin:end]
        row_bytes = ref.num_bytes // ref.shape[0]
        part = replace(
            ref,
            begin=ref.begin + begin * row_bytes,
            end=ref.begin + end * row_bytes,
            shape=(end - begin, *ref.shape[1:]),
        )
        return part.read()

    def pick(self, ids: Tensor) -> Tensor:
        """Some rows, each read once."""
        if self._ref.strides:
            return self._ref.read()[ids.cpu()]
        unique, places = torch.unique(ids.cpu(), return_inverse=True)
        return torch.cat([self.rows(row, row + 1) for row in unique.tolist()])[places]


class HeldSource:
    """A parameter of the quantized model that is not quantized."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def whole(self) -> Tensor:
        """All of it; not a copy."""
        return self._tensor

    def rows(self, begin: int, end: int) -> Tensor:
        """Some rows."""
        return self._tensor[begin:end]

    def pick(self, ids: Tensor) -> Tensor:
        """Some rows."""
        return self._tensor[ids]


class PackedSource:
    """The weight [out, in] that a quantized layer computes with."""

    dtype = torch.float32

    def __init__(self, layer: QuantizedModule, shape: tuple[int, ...]) -> None:
        self._layer = layer
        self.shape = shape

    def whole(self) -> Tensor:
        """Decode all of it."""
        return self._layer.dequantize()

    def rows(self, begin: int, end: int) -> Tensor:
        """Decode some rows."""
        layer, num_rows = self._layer, end - begin
        return decode(
            *layer.row_buffers(begin, num_rows),
            scheme=layer.scheme,
            out_features=num_rows,
            in_features=self.shape[1],
        )

    def pick(self, ids: Tensor) -> Tensor:
        """Decode some rows."""
        layer = self._layer
        return decode_rows(
            layer.qweight, layer.scales, layer.zero_points, ids, scheme=layer.scheme, in_features=self.shape[1]
        )


def read_originals(served: ServedModel, refs: dict[str, TensorRef], workshop: Workshop) -> PreTrainedModel:
    """The full-precision model in float32, each weight of which is read when it is used.

    Raises:
        ModelError: the model's class fails.
        UnsupportedModel: a weight is in no file.
    """
    deferred = {name: Deferred.of(FileSource(ref), workshop) for name, ref in refs.items()}
    with class_errors():
        model: PreTrainedModel = served.model_class.from_pretrained(
            None,
            config=served.config,
            state_dict=deferred,
            dtype=torch.float32,
        )
    read_stacks_once(model)
    workshop.is_open = True
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Deferred):
            raise UnsupportedModel(f"{name} is in no file of the checkpoint; download the model again")
    for buffers in (module._buffers for module in model.modules()):
        for name, buffer in buffers.items():
            if buffer is not None and not isinstance(buffer, Deferred):
                buffers[name] = buffer.to(workshop.device)
    return model.eval()  # type: ignore[no-untyped-call,no-any-return]


def as_held(originals: PreTrainedModel, held: nn.Module, workshop: Workshop) -> PreTrainedModel:
    """The same model with the weights that a quantized one has, decoded when they are used; it is only read."""
    model = copy.deepcopy(originals)
    replaced: dict[int, Deferred] = {}
    aliases: dict[int, list[str]] = {}
    for name, tensor in _deferred(model).items():
        aliases.setdefault(id(tensor), []).append(name)
    for key, names in aliases.items():
        own = next(name for name in names if not _is_tied_head(held, name))
        replaced[key] = _held(model, held, own, workshop)
    groups: list[dict[str, Any]] = [group for m in model.modules() for group in (m._parameters, m._buffers)]
    for group in groups:
        group.update({leaf: replaced[id(p)] for leaf, p in group.items() if isinstance(p, Deferred)})
    return model


def _deferred(model: nn.Module) -> dict[str, Deferred]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if isinstance(tensor, Deferred)}


def _is_tied_head(held: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(held.get_submodule(module), TiedHead)


def _held(model: nn.Module, held: nn.Module, name: str, workshop: Workshop) -> Deferred:
    """The tensor of a name in the unquantized model, as the quantized one has it."""
    path, _, leaf = name.rpartition(".")
    owner, original = held.get_submodule(path), model.get_submodule(path)
    shape = tuple(getattr(original, leaf).shape)
    if isinstance(owner, QuantizedModule) and leaf == "weight":
        if isinstance(original, Conv1D):
            return _decoded(shape, lambda: owner.dequantize().t(), workshop)
        return Deferred.of(PackedSource(owner, shape), workshop).as_parameter()
    tensor = getattr(owner, leaf)
    if isinstance(tensor, QuantizedExperts):
        if original.is_transposed:
            return _decoded(shape, lambda: tensor.dequantize().mT, workshop)
        return _decoded(shape, tensor.dequantize, workshop)
    return Deferred.of(HeldSource(tensor), workshop).as_parameter()


def _decoded(shape: tuple[int, ...], decode_all: Callable[[], Tensor], workshop: Workshop) -> Deferred:
    """A weight that is decoded as a whole, because it lies in another order."""
    return Deferred.made(torch.empty(shape, device="meta"), decode_all, workshop).as_parameter()
