"""Loading tiny checkpoints of several families: the right weights in the right places, or an error that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.errors import CheckpointError, ModelError, ModelNotFound, RecipeError, UnsupportedModel
from service.layers.embedding import QuantizedEmbedding, TiedHead
from service.layers.linear import PackedLinear, UnquantizedLinear, W8A16Linear
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress, Phase
from service.loading.shards import SINGLE_NAME
from service.numerics.encode import encode
from service.numerics.recipe import parse_recipe
from service.numerics.schemes import parse_scheme
from tests.loading.support import load, logits, round_weights, stock
from tests.models import write_checkpoint

FAMILIES = ["llama", "llama_tied", "qwen2", "gpt2"]
TIED = {"llama_tied", "gpt2"}


def quantized_modules(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (W8A16Linear, PackedLinear, QuantizedEmbedding, TiedHead)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("num_shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unquantized_load_equals_the_stock_load_bit_for_bit(family: str, num_shards: int, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path / "m", num_shards=num_shards)
    loaded, reference = load(folder).model, stock(folder)
    expected = reference.state_dict()
    assert [n for n, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[n])] == []
    # Equal weights at other addresses may be summed in another order: float32 rounding of a few hundred terms.
    difference = (logits(loaded) - logits(reference)).abs().max()
    assert difference <= 1e-5 * logits(reference).abs().max()


@pytest.mark.parametrize("recipe", ["w8a16", "w8a16-g32", "w4a16-g32", "w4a16-g32-sym"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_load_equals_the_stock_model_with_decoded_weights(family: str, recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint(family, tmp_path / "m")
    loaded = load(folder, recipe)
    reference = stock(folder)
    round_weights(reference, loaded)
    expected, found = logits(reference), logits(loaded.model)
    # Same values, other order of float32 sums and roundings: 4 layers of at most 128 terms, each within 2^-23.
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_and_the_head_are_quantized_by_default(family: str, tmp_path: Path) -> None:
    model = load(write_checkpoint(family, tmp_path / "m"), "w4a16").model
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear or type(m) is Conv1D}
    assert linears == set()
    head = model.get_submodule("lm_head")
    assert isinstance(head, TiedHead if family in TIED else W8A16Linear)
    embeddings = [n for n, m in model.named_modules() if type(m) is nn.Embedding]
    assert embeddings == (["transformer.wpe"] if family == "gpt2" else [] if family in TIED else ["model.embed_tokens"])


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_pair_has_one_storage_and_its_rows_are_what_the_head_multiplies(family: str, tmp_path: Path) -> None:
    loaded = load(write_checkpoint(family, tmp_path / "m"), "w8a16")
    embedding = next(m for m in loaded.model.modules() if isinstance(m, QuantizedEmbedding))
    head = loaded.model.get_submodule("lm_head")
    assert not any(name.startswith("lm_head") for name in loaded.model.state_dict())
    x = torch.eye(embedding.embedding_dim)
    rows = embedding(torch.arange(embedding.num_embeddings))
    assert torch.allclose(head(x).t(), rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", sorted(TIED))
def test_the_head_opts_out_together_with_its_tied_embedding(family: str, tmp_path: Path) -> None:
    loaded = load(write_checkpoint(family, tmp_path / "m"), "w8a16,lm_head=none")
    names = quantized_modules(loaded.model)
    assert names
    assert not {name for name in names if "lm_head" in name or "embed" in name or "wte" in name}
    assert loaded.model.get_parameter("lm_head.weight") is loaded.model.get_input_embeddings().weight  # type: ignore[operator]


def test_a_tied_pair_cannot_have_two_schemes(tmp_path: Path) -> None:
    folder = write_checkpoint("llama_tied", tmp_path / "m")
    with pytest.raises(RecipeError, match="share one weight"):
        load(folder, "w8a16,lm_head=none,model.embed_tokens=w8a16")


def test_the_last_matching_pattern_rules(tmp_path: Path) -> None:
    recipe = "w8a16,*.mlp.*=w4a16-g32,*.down_proj=none"
    model = load(write_checkpoint("llama", tmp_path / "m"), recipe).model
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), PackedLinear)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is UnquantizedLinear
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), W8A16Linear)


@pytest.mark.parametrize(("recipe", "kernel_is_ours"), [("w8a16,lm_head=none", True), ("none", False)])
def test_what_stays_unquantized_keeps_its_weight_and_is_stock_only_in_an_unquantized_model(
    recipe: str, kernel_is_ours: bool, tmp_path: Path
) -> None:
    write_checkpoint("llama", tmp_path)
    loaded = load(tmp_path, recipe)
    head = loaded.model.get_submodule("lm_head")
    assert type(head) is (UnquantizedLinear if kernel_is_ours else nn.Linear)
    assert torch.equal(head.get_parameter("weight"), stock(tmp_path).get_parameter("lm_head.weight"))
    assert (loaded.report.kernel == "torch") or kernel_is_ours


def test_a_pattern_that_matches_nothing_is_refused_with_examples(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    with pytest.raises(RecipeError, match=r"pattern '\*\.nope' matches no layer .*, such as model\.embed_tokens"):
        load(folder, "w8a16,*.nope=none")


@pytest.mark.parametrize("file_dtype", ["float32", "bfloat16"])
def test_weights_are_quantized_from_the_dtype_of_the_file(
    file_dtype: Literal["float32", "bfloat16"], tmp_path: Path
) -> None:
    folder = write_checkpoint("llama", tmp_path / "m", dtype=file_dtype)
    name = "model.layers.0.mlp.up_proj"
    weight = load_file(folder / SINGLE_NAME)[f"{name}.weight"]
    expected = encode(weight, parse_scheme("w8a16"))
    for dtype in ("float32", "bfloat16"):
        layer = load(folder, "w8a16", dtype=dtype).model.get_submodule(name)
        assert isinstance(layer, W8A16Linear)
        assert torch.equal(layer.qweight, expected.qweight)
        assert torch.equal(layer.scales, expected.scales)


def test_an_untied_embedding_is_quantized_when_a_pattern_names_it(tmp_path: Path) -> None:
    loaded = load(write_checkpoint("llama", tmp_path / "m"), "w8a16,model.embed_tokens=w8a16")
    assert isinstance(loaded.model.get_submodule("model.embed_tokens"), QuantizedEmbedding)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_NAME)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("recipe", ["none", "w8a16"])
def test_a_tied_checkpoint_may_hold_its_weight_twice_or_under_the_head_only(recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint("llama_tied", tmp_path / "m")
    expected = logits(load(folder, recipe).model)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert torch.equal(logits(load(folder, recipe).model), expected)
    rewrite(folder, lambda tensors: tensors.pop(EMBEDDING))
    assert torch.equal(logits(load(folder, recipe).model), expected)


@pytest.mark.parametrize("recipe", ["none", "w8a16"])
def test_two_different_weights_are_served_untied_whatever_the_config_says(recipe: str, tmp_path: Path) -> None:
    folder = write_checkpoint("llama_tied", tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] * 2}))
    loaded = load(folder, recipe)
    assert loaded.plan.weight_bytes == loaded.report.weight_bytes
    with_config_tied = logits(loaded.model)
    edit_config(folder, tie_word_embeddings=False)
    assert torch.equal(with_config_tied, logits(load(folder, recipe).model))


def nan_in(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = float("nan")

    return change


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[ModelError], str]] = {
    "missing tensor": (lambda t: t.pop(UP), CheckpointError, f"the checkpoint lacks {UP}; config"),
    "missing norm": (lambda t: t.pop(NORM), CheckpointError, f"the checkpoint lacks {NORM};"),
    "extra tensor": (lambda t: t.update(extra=torch.ones(3)), CheckpointError, "the checkpoint holds extra, which"),
    "other shape": (lambda t: t.update({UP: t[UP][:-1]}), CheckpointError, rf"{UP} has shape .* the config asks for"),
    "other norm shape": (lambda t: t.update({NORM: t[NORM][:-1]}), CheckpointError, f"{NORM} has shape"),
    "NaN in a linear": (nan_in(UP), ModelError, UP),
    "NaN in a norm": (nan_in(NORM), CheckpointError, f"NaN or infinite values in {NORM};"),
}


@pytest.mark.parametrize(("change", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], None], error: type[ModelError], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    rewrite(folder, change)
    for recipe in ("none", "w8a16"):
        with pytest.raises(error, match=message):
            load(folder, recipe)


EXPERT = "model.layers.1.mlp.experts.5.gate_proj.weight"
EXPERT_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[ModelError], str]] = {
    "one missing": (lambda t: t.pop(EXPERT), CheckpointError, "gate_up_proj: the checkpoint lacks weights of some exp"),
    "other shape": (lambda t: t.update({EXPERT: t[EXPERT][:-1]}), CheckpointError, "gate_up_proj: .*differ in shape"),
    "all of a layer missing": (
        lambda t: [t.pop(name) for name in list(t) if ".1.mlp.experts" in name and "down" in name],
        CheckpointError,
        r"the checkpoint lacks model\.layers\.1\.mlp\.experts\.down_proj;",
    ),
    "the last one missing": (
        lambda t: [t.pop(name) for name in list(t) if ".1.mlp.experts.7." in name],
        CheckpointError,
        r"experts\.\w+ has shape \[7, .* the config asks for \[8, ",
    ),
    "NaN": (nan_in(EXPERT), ModelError, "gate_up_proj"),
}


@pytest.mark.parametrize(("change", "error", "message"), EXPERT_DAMAGE.values(), ids=EXPERT_DAMAGE.keys())
def test_experts_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], None], error: type[ModelError], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint("qwen3_moe", tmp_path / "m")
    rewrite(folder, change)
    for recipe in ("none", "w8a16"):
        with pytest.raises(error, match=message):
            load(folder, recipe)


def test_an_already_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"already quantized \(gptq.*give the full-precision model"):
        load(folder, "w8a16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "is a BertForMaskedLM, which does not continue"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForConditionalGeneration"),
        ({"model_type": "no-such-model"}, "no model of this type"),
    ],
    ids=["encoder", "encoder-decoder", "unknown"],
)
def test_a_model_that_does_not_continue_text_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match=message):
        load(folder)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        load(tmp_path)


def test_a_config_that_does_not_parse_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json does not parse"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 256), ({"max_position_embeddings": None, "n_positions": 77}, 77), ({"max_position_embeddings": None}, 2048)],
    ids=["stated", "stated under another name", "not stated"],
)
def test_the_context_is_the_config_s_where_it_states_one(
    changes: dict[str, object], expected: int, tmp_path: Path
) -> None:
    folder = write_checkpoint("bloom", tmp_path / "m")
    edit_config(folder, **{"max_position_embeddings": 256, **changes})
    assert load(folder).context_length == expected


def test_progress_ends_with_all_bytes_of_the_checkpoint_read(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    progress = LoadProgress()
    load_model(LoadOptions(model=str(folder), recipe=parse_recipe("w8a16"), device="cpu"), progress)
    phase, done, total, _, remaining_s = progress.snapshot()
    assert phase is Phase.LOAD
    assert done == total == sum(tensor.nbytes for tensor in load_file(folder / SINGLE_NAME).values())
    assert remaining_s == 0


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load(folder).eos_token_ids == {1, 7}
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=9)
    assert load(folder).eos_token_ids == {9}
