"""Linears that are tied, never called, asked for their dtype, or come after their head; parts named in other ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.errors import CheckpointError
from service.layers.embedding import QuantizedEmbedding, TiedHead
from service.loading import integrity
from service.loading.config import read_model
from service.loading.record import LoadRecord
from service.loading.source import ModelSource
from tests.families.recipes import CONTEXT, build
from tests.loading.support import load, logits, round_weights

TYPES = ["zamba2", "mamba", "xlstm", "camembert", "emu3", "dots3_note"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def folder_of(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            build(model_type).save_pretrained(folders[model_type])
        return folders[model_type]

    return folder_of


@pytest.mark.filterwarnings("default")  # of transformers' own code for these types
@pytest.mark.parametrize("model_type", TYPES)
def test_a_quantized_load_equals_the_unquantized_one_with_decoded_weights(
    model_type: str, written: Callable[[str], Path]
) -> None:
    loaded, reference = load(written(model_type), "w8a16"), load(written(model_type))
    unrounded = logits(reference.model)
    round_weights(reference.model, loaded)
    expected = logits(reference.model)
    assert not torch.equal(expected, unrounded)
    # Same values, other order of float32 sums: see the families.
    assert (logits(loaded.model) - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_linears_that_are_tied_to_others_are_stored_once(written: Callable[[str], Path]) -> None:
    loaded = load(written("zamba2"), "w8a16")
    first, second = (
        loaded.model.get_submodule(f"model.layers.{i}.shared_transformer.self_attn.q_proj") for i in (1, 3)
    )
    assert first is second
    rows = [row.name for row in loaded.report.layers if row.name.endswith("shared_transformer.self_attn.q_proj")]
    assert rows == ["model.layers.1.shared_transformer.self_attn.q_proj"]


def test_a_linear_that_is_never_called_stays_as_it_is_with_its_reason(written: Callable[[str], Path]) -> None:
    loaded, reference = load(written("mamba"), "w8a16"), load(written("mamba"))
    name = "backbone.layers.0.mixer.dt_proj"
    row = next(row for row in loaded.report.layers if row.name == name)
    assert (row.scheme, row.reason) == ("none", "MambaMixer multiplies its weight itself")
    weight = loaded.model.get_parameter(f"{name}.weight")
    assert torch.equal(weight, reference.model.get_parameter(f"{name}.weight"))


def test_a_quantized_head_tells_the_dtype_of_its_weight_and_holds_none(written: Callable[[str], Path]) -> None:
    for model_type in ("mamba", "xlstm"):
        head = load(written(model_type), "w8a16").model.get_submodule("lm_head")
        weight = head.weight
        assert isinstance(weight, torch.Tensor)
        assert weight.is_meta
        assert weight.dtype is torch.float32
        assert "weight" not in head.state_dict()


def test_a_head_may_come_before_the_embedding_that_it_is_tied_to(written: Callable[[str], Path]) -> None:
    model = load(written("camembert"), "w8a16").model
    names = [name for name, module in model.named_modules() if isinstance(module, TiedHead | QuantizedEmbedding)]
    assert sorted(names) == ["lm_head.decoder", "roberta.embeddings.word_embeddings"]


def test_positions_behind_the_padding_id_are_not_part_of_the_context(written: Callable[[str], Path]) -> None:
    source = ModelSource(folder=written("camembert"), name="camembert", revision="")
    assert read_model(source, trust_remote_code=False).context_length == CONTEXT - 1  # the padding id is 0


def test_a_layer_that_got_no_weight_is_refused_by_name(written: Callable[[str], Path]) -> None:
    record = LoadRecord(layers={"model.odd": None})  # type: ignore[dict-item]
    info = {"mismatched_keys": (), "missing_keys": (), "unexpected_keys": ()}
    with pytest.raises(CheckpointError, match=r"no weight of its own for model\.odd"):
        integrity.check_names(info, record, ())
