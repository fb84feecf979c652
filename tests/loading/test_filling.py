"""Weights that are read and encoded in runs of rows, or expert by expert, beside those that are encoded at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from service.errors import CheckpointError, QuantizationError
from service.kernels.dispatch import encode
from service.layers.embedding import QuantizedEmbedding
from service.layers.experts import QuantizedExperts
from service.layers.linear import quantized_linear
from service.layers.replace import QuantizedLayer, Slot
from service.loading.checkpoint import Checkpoint
from service.loading.filling import fill, fill_unread
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.loading.record import LoadRecord, UnreadExperts
from service.loading.shards import SINGLE_NAME
from service.loading.tensors import PIECE_BYTES
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import parse_scheme
from tests.loading.support import load
from tests.models import write_checkpoint
from tests.sparse import write_sparse_checkpoint

SCHEMES = [
    *("w8a16", "w8a16-g16", "w8a16-tensor", "w4a16-g64", "w4a16-g32-sym", "w4a16-g64-float", "w4a16-row+mse"),
    *("w2a16-g32", "w3a16-g64", "w5a16-g64", "w6a16-g64", "nf4", "nf4-dq", "fp4", "fp8"),
    *("q8_0", "q4_1", "q5_0", "q4_k"),
]
FEW_SCHEMES = ["w8a16", "w8a16-tensor", "w4a16-g64", "w5a16-g64", "nf4-dq"]
OUT, IN, NUM_EXPERTS = 71, 100, 3
"""Rows that no number of strips holds exactly, columns that fill no tile and no group."""
K_IN = 256
"""Columns that every scheme takes."""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def columns_of(scheme_name: str) -> int:
    return K_IN if scheme_name.endswith("_k") else IN


def slot_and_layer(scheme_name: str, kind: str) -> tuple[Slot, QuantizedLayer]:
    scheme, columns = parse_scheme(scheme_name), columns_of(scheme_name)
    with torch.device("meta"):
        if "experts" in kind:
            experts = QuantizedExperts(NUM_EXPERTS, OUT, columns, scheme)
            is_turned = kind == "turned experts"
            shape = (NUM_EXPERTS * OUT, columns)
            slot = Slot(name="w", shape=shape, scheme=scheme, is_transposed=is_turned, num_experts=NUM_EXPERTS)
            return slot, experts
        slot = Slot(name="w", shape=(OUT, columns), scheme=scheme, is_transposed=kind == "turned")
        if kind == "embedding":
            return slot, QuantizedEmbedding(OUT, columns, scheme, dtype=torch.float32)
        return slot, quantized_linear(columns, OUT, scheme, bias=False, dtype=torch.float32)


def buffers(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in layer.named_buffers() if tensor is not None}


def write(folder: Path, **tensors: Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_NAME)
    return folder


def ignore_bytes(_: int) -> None:
    """A progress callback for tests that do not look at it."""


CASES = [(scheme, "linear", torch.bfloat16) for scheme in SCHEMES]
CASES += [(scheme, kind, torch.bfloat16) for scheme in FEW_SCHEMES for kind in ("turned", "experts")]
CASES += [("w8a16", kind, torch.float32) for kind in ("linear", "embedding", "turned", "experts", "turned experts")]
CASES += [("w4a16-g64", "turned experts", torch.float16)]


@pytest.mark.parametrize(("scheme", "kind", "dtype"), CASES, ids=lambda value: str(value))
def test_runs_of_any_length_give_the_buffers_of_the_whole_weight(
    scheme: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    slot, layer = slot_and_layer(scheme, kind)
    weight = normal(*slot.stored_shape, dtype=dtype)
    whole = LoadRecord(layers={"w": (slot, layer)})
    fill(whole, "w", weight)
    expected = buffers(layer)
    with Checkpoint(write(tmp_path, w=weight), ignore_bytes) as checkpoint:
        for piece_bytes in (1, 40 * IN * dtype.itemsize, PIECE_BYTES):
            slot, layer = slot_and_layer(scheme, kind)
            record = LoadRecord(layers={"w": (slot, layer)}, unread={"w": checkpoint.refs["w"]})
            fill_unread(record, piece_bytes=piece_bytes)
            assert record.unread == {}
            found = buffers(layer)
            assert found.keys() == expected.keys()
            assert [name for name, buffer in found.items() if not torch.equal(buffer, expected[name])] == []
            assert record.encoded["w"].signal == pytest.approx(whole.encoded["w"].signal, rel=1e-5)
            assert record.encoded["w"].noise == pytest.approx(whole.encoded["w"].noise, rel=1e-5)


@pytest.mark.parametrize("scheme", FEW_SCHEMES)
def test_experts_of_two_matrices_each_are_encoded_as_if_they_had_been_merged(scheme: str, tmp_path: Path) -> None:
    columns = columns_of(scheme)
    gates, ups = normal(NUM_EXPERTS, 30, columns).bfloat16(), normal(NUM_EXPERTS, OUT - 30, columns).bfloat16()
    matrices = {f"gate{i}": gates[i] for i in range(NUM_EXPERTS)} | {f"up{i}": ups[i] for i in range(NUM_EXPERTS)}
    slot, layer = slot_and_layer(scheme, "experts")
    with Checkpoint(write(tmp_path, **matrices), ignore_bytes) as checkpoint:
        refs = checkpoint.refs
        source = UnreadExperts(tuple((refs[f"gate{i}"], refs[f"up{i}"]) for i in range(NUM_EXPERTS)))
        assert source.shape == slot.stored_shape
        fill_unread(LoadRecord(layers={"w": (slot, layer)}, unread={"w": source}))
    assert isinstance(layer, QuantizedExperts)
    for index in range(NUM_EXPERTS):
        expected = encode(torch.cat([gates[index], ups[index]]), slot.scheme)
        assert torch.equal(layer.qweight[index], expected.qweight)
        assert torch.equal(layer.scales[index], expected.scales)


def test_a_weight_of_another_shape_is_refused() -> None:
    slot, layer = slot_and_layer("w8a16", "linear")
    with pytest.raises(CheckpointError, match=rf"w.weight has shape \[2, 3\] .* the config asks for \[{OUT}, {IN}\]"):
        fill(LoadRecord(layers={"w": (slot, layer)}), "w", torch.ones(2, 3))


def test_a_value_that_is_no_number_in_the_last_run_is_refused_by_name(tmp_path: Path) -> None:
    weight = normal(OUT, IN)
    weight[-1, -1] = torch.nan
    record = LoadRecord(layers={"w": slot_and_layer("w8a16", "linear")})
    with Checkpoint(write(tmp_path, w=weight), ignore_bytes) as checkpoint:
        record.unread["w"] = checkpoint.refs["w"]
        with pytest.raises(QuantizationError, match=r"w\.weight: .*NaN"):
            fill_unread(record, piece_bytes=1)


@pytest.mark.parametrize("recipe", ["none", "w8a16", "w8a16,lm_head=none"])
def test_every_byte_of_a_checkpoint_is_read_once(recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "moe")
    progress = LoadProgress()
    load_model(LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu"), progress)
    snapshot = progress.snapshot()
    assert snapshot.done_bytes == snapshot.total_bytes > 0


def test_names_that_do_not_fit_are_found_before_a_weight_is_encoded(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=1, vocab_size=40_000, hidden_size=256)
    folder = write_sparse_checkpoint(tmp_path / "m", config)
    config.num_hidden_layers = 2
    config.save_pretrained(folder)
    progress = LoadProgress()
    with pytest.raises(CheckpointError, match="the checkpoint lacks "):
        load_model(LoadOptions(model=str(folder), recipe=parse_recipe("w8a16"), device="cpu"), progress)
    embedding_and_norms = 2 * (40_000 * 256 + 3 * 256)
    assert progress.snapshot().done_bytes == embedding_and_norms


def test_seconds_of_the_phases_add_up_to_those_of_the_load(tmp_path: Path) -> None:
    report = load(write_checkpoint("llama", tmp_path / "m"), "w8a16").report
    seconds = report.phase_seconds
    assert all(value >= 0 for value in seconds.values())
    assert sum(value for name, value in seconds.items() if name != "probe") >= report.total_seconds * 0.999
