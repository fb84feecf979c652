"""The weight bytes in the metrics equal a hand count over the shapes of the checkpoint, to the byte."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from service.demo import model_folder
from tests.api.support import RunningService, run_service
from tests.models import write_checkpoint

ROWS, COLUMNS = 16, 32
"""Of the tiles that a matrix is padded to."""
GROUP = 64
ITEM = {"bfloat16": 2, "float32": 4}
MODELS = {
    "demo, a tied head": (True, "bfloat16"),
    "sizes that are no multiples, a head of its own": (False, "float32"),
}


def shapes_of(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping


def padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def eight_bits(rows: int, columns: int) -> Counter[str]:
    """A byte for each weight, and a float32 scale for each row."""
    return Counter(codes=padded(rows, ROWS) * padded(columns, COLUMNS), scales=4 * padded(rows, ROWS))


def four_bits(rows: int, columns: int) -> Counter[str]:
    """Half a byte for each weight; a bfloat16 scale and half a byte of zero point for each group of a row."""
    num_groups = padded(rows, ROWS) * -(-columns // GROUP)
    return Counter(codes=padded(rows, ROWS) * padded(columns, COLUMNS) // 2, scales=num_groups * 5 // 2)


def count(folder: Path, recipe: str, item_bytes: int) -> Counter[str]:
    """Bytes by kind, and those of the original."""
    shapes = shapes_of(folder)
    is_tied = "lm_head.weight" not in shapes
    found = Counter(codes=0, scales=0, unquantized=0)
    for name, shape in shapes.items():
        is_embedding = "embed_tokens" in name
        is_head = name.startswith("lm_head") or (is_embedding and is_tied)
        if recipe == "none" or len(shape) == 1 or (is_embedding and not is_tied):
            found["unquantized"] += item_bytes * math.prod(shape)
        else:
            found += (four_bits if recipe == "w4a16-g64" and not is_head else eight_bits)(*shape)
    return found


def exported(running: RunningService) -> dict[str, float]:
    kinds = ("codes", "scales", "unquantized")
    return {kind: running.metric("weight_bytes", kind=kind) for kind in kinds}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", ["none", "w8a16", "w4a16-g64"])
def test_weight_bytes_are_a_hand_count(recipe: str, model: str, tmp_path: Path) -> None:
    is_demo, dtype = MODELS[model]
    folder = model_folder() if is_demo else write_checkpoint("llama", tmp_path / "odd", intermediate_size=100)
    settings = {"device": "cpu", "threads": 1, "kv_memory": 2**24, "quantize": recipe, "dtype": dtype}
    expected = count(folder, recipe, ITEM[dtype])
    shapes = shapes_of(folder).values()
    num_parameters = sum(map(math.prod, shapes))
    total = expected.total()
    with run_service(settings if is_demo else settings | {"model": str(folder)}) as running:
        assert exported(running) == {kind: expected[kind] for kind in ("codes", "scales", "unquantized")}
        assert running.metric("weight_original_bytes") == ITEM[dtype] * num_parameters
        assert running.metric("weight_saving_ratio") == pytest.approx(
            1 - total / (ITEM[dtype] * num_parameters), rel=1e-12, abs=1e-15
        )
        assert running.metric("weight_bits_per_parameter") == pytest.approx(8 * total / num_parameters, rel=1e-12)
