"""Every family with linears that share an input computed together, and models that this does not suit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.engine.attention import set_attention, stock_attention
from service.engine.paths import choose_runner
from service.engine.stats import EnginePath
from service.kernels import dispatch
from service.layers.fusion import num_fused_groups, unfuse
from service.layers.linear import QuantizedLinear
from service.loading.loader import LoadedModel
from tests.engine.support import generate, greedy, make_prompt, running
from tests.loading.support import load, round_weights, stock
from tests.models import FAMILIES, MORE_FAMILIES, VOCAB_SIZE

RECIPES = ["w8a16", "w4a16-g32", "nf4"]
NUM_GROUPS = {
    **dict.fromkeys(["llama", "llama_tied", "qwen2"], 6),
    **dict.fromkeys(["mistral", "qwen3", "gemma2", "gemma3", "smollm3", "olmo2", "granite", "qwen2_moe"], 4),
    "qwen3_moe": 3,  # the experts of its second layer are stacked
    **dict.fromkeys(["opt", "mixtral", "gpt_oss"], 2),
    "deepseek_v3": 1,  # its first layer has gate and up; all else has widths of 40
    **dict.fromkeys(["gpt2", "phi3", "gpt_neox", "falcon", "bloom"], 0),  # one matrix already
}
IDS = torch.randint(10, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))

Written = Callable[[str], Path]


def choose(loaded: LoadedModel) -> EnginePath:
    return choose_runner(loaded.model.eval(), vocab_size=VOCAB_SIZE, max_model_len=64).path


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(IDS, use_cache=False).logits
    return result


def num_bytes(model: nn.Module) -> int:
    """Of the storages behind all weights."""
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def weights(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {name: layer.dequantize() for name, layer in layers.items()}


def test_every_family_says_how_many_groups_it_has() -> None:
    assert NUM_GROUPS.keys() == {*FAMILIES, *MORE_FAMILIES}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", NUM_GROUPS)
def test_a_family_computes_the_same_with_its_layers_together(family: str, recipe: str, checkpoint: Written) -> None:
    loaded = load(checkpoint(family), recipe, "bfloat16")
    model, before, attention = loaded.model, weights(loaded.model), stock_attention(loaded.model)
    choose(loaded)
    set_attention(model, attention)
    assert num_fused_groups(model) == NUM_GROUPS[family]
    assert num_bytes(model) == loaded.report.weight_bytes.total
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    together = logits(model)
    unfuse(model)
    if dispatch.kernel_name() != "torch":
        assert torch.equal(together, logits(model))


@pytest.mark.parametrize("family", [family for family, num_groups in NUM_GROUPS.items() if num_groups])
def test_the_engine_gives_the_tokens_of_generate_with_its_layers_together(family: str, checkpoint: Written) -> None:
    loaded, reference = load(checkpoint(family), "w8a16"), stock(checkpoint(family))
    round_weights(reference, loaded)
    prompts = [make_prompt(5), make_prompt(17)]
    for _ in range(2):  # the second engine finds the model as the first leaves it
        with running(loaded.model, max_model_len=64) as (engine, recorder):
            assert num_fused_groups(loaded.model) == NUM_GROUPS[family]
            for i, prompt in enumerate(prompts):
                engine.submit(str(i), prompt, greedy(8))
            for i, prompt in enumerate(prompts):
                recorder.end(str(i))
                assert recorder.tokens(str(i)) == generate(reference, prompt, 8)


class Flat(nn.Module):
    """Passes the output of a layer on by a view that columns of a product do not have."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y.view(-1).view(y.shape)


class Grown(nn.Module):
    """Gives something else for columns of a product of several rows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if y.is_contiguous() else y * 1.5


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [(Flat, "RuntimeError: view size"), (Grown, r"its logits are off by .* times the tolerance")],
    ids=["raises", "differs"],
)
def test_a_model_that_fused_layers_do_not_suit_is_computed_without(
    wrapper: Callable[[nn.Module], nn.Module], reason: str, checkpoint: Written, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(checkpoint("llama"), "w8a16")
    attention = loaded.model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    attention.k_proj = wrapper(attention.k_proj)
    assert choose(loaded) is EnginePath.PACKED
    assert num_fused_groups(loaded.model) == 0
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(rf"linears that share an input are computed one by one \(together: {reason}.*\)", warning)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_log_says_how_many_groups_there_are(
    family: str, checkpoint: Written, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    choose(load(checkpoint(family), "w8a16"))
    said = [record.message for record in caplog.records if "share an input" in record.message]
    expected = f"{NUM_GROUPS[family]} groups of linears that share an input are computed together"
    assert said == ([expected] if NUM_GROUPS[family] else [])
