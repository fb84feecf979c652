"""Loads of tiny checkpoints, and the stock model that they are compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.loading.loader import LoadedModel, load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.encode import decode, encode
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import QuantScheme, parse_scheme

IDS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def load(folder: Path, recipe: str = "none", dtype: str = "float32", *, trust_remote_code: bool = False) -> LoadedModel:
    options = LoadOptions(
        model=str(folder),
        recipe=parse_recipe(recipe),
        device="cpu",
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return load_model(options, LoadProgress())


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def stock(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@torch.no_grad()
def round_weights(model: nn.Module, loaded: LoadedModel) -> None:
    """Give a stock model the decoded weights that the report of a quantized load says it has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for row in loaded.report.layers:
        if row.scheme == "none" or "shares" in row.reason:
            continue
        scheme = parse_scheme(row.scheme)
        if row.name in parameters:  # experts
            is_transposed = parameters[row.name].shape[2] != row.shape[1]
            for expert in parameters[row.name]:
                expert.copy_(_rounded(expert, scheme, is_transposed=is_transposed))
        else:
            is_transposed = type(model.get_submodule(row.name)) is Conv1D
            weight = parameters[f"{row.name}.weight"]
            weight.copy_(_rounded(weight, scheme, is_transposed=is_transposed))


def _rounded(weight: Tensor, scheme: QuantScheme, *, is_transposed: bool) -> Tensor:
    matrix = weight.t() if is_transposed else weight
    out_features, in_features = matrix.shape
    decoded = decode(*encode(matrix, scheme)[:3], scheme=scheme, out_features=out_features, in_features=in_features)
    return decoded.t() if is_transposed else decoded
