"""The name of the weights: the same for the same, another for all that changes an answer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from service.loading.fingerprint import weight_hash


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(48, 64), nn.BatchNorm1d(64)


def _model(seed: int = 0) -> _Model:
    generator = torch.Generator().manual_seed(seed)
    model = _Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def _train(model: _Model) -> None:
    for parameter in model.parameters():
        parameter.data += 1e-3


def _transpose(model: _Model) -> None:
    model.linear.weight = nn.Parameter(model.linear.weight.detach().T.contiguous())


def _rename(model: _Model) -> None:
    model.add_module("other", model._modules.pop("linear"))


CHANGES: dict[str, Callable[[_Model], object]] = {
    "training": _train,
    "shape": _transpose,
    "name": _rename,
    "dtype": lambda model: model.to(torch.bfloat16),
    "buffer": lambda model: model.norm.register_buffer("running_mean", torch.ones(64)),
    "scalar": lambda model: model.norm.register_buffer("num_batches_tracked", torch.tensor(1)),
}


def test_equal_weights_have_equal_hashes_in_whatever_layout() -> None:
    model = _model()
    assert weight_hash(model) == weight_hash(_model()) != weight_hash(_model(seed=1))
    strided = copy.deepcopy(model)
    strided.linear.weight.data = strided.linear.weight.data.T.contiguous().T
    assert not strided.linear.weight.is_contiguous()
    assert weight_hash(strided) == weight_hash(model)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_model_changes_its_hash(change: Callable[[_Model], object]) -> None:
    model = _model()
    before = weight_hash(model)
    change(model)
    assert weight_hash(model) != before


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn])
def test_any_dtype_and_size_has_a_hash(dtype: torch.dtype) -> None:
    model = nn.Module()
    for index, shape in enumerate([(), (0,), (1,), (3, 5), (40, 50)]):
        model.register_buffer(f"b{index}", torch.ones(shape).to(dtype))
    assert len(weight_hash(model)) == 64
