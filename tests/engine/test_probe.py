"""The parity probe and the choice of a path, with models that look packable and are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's documentation uses
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from service.engine.attention import ATTENTION_NAME
from service.engine.filters import packing_obstacle
from service.engine.paths import choose_runner
from service.engine.probe import Probe, row_errors
from service.engine.runner import ModelRunner, Runner
from service.engine.stats import EnginePath
from service.errors import UnsupportedModel
from tests.engine.families import make_unpackable
from tests.engine.support import SIZES, generate, greedy, make_model, make_prompt, running
from tests.models import VOCAB_SIZE

PROMPTS = [make_prompt(n) for n in (5, 17, 33)]


class ColumnLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Adds a wave over the columns of a row to the embeddings, counted on from the cache."""

    counts_cached = True

    def forward(self, input_ids: Tensor, *, past_key_values: Any = None, **kwargs: Any) -> Any:
        first = past_key_values.get_seq_length() if past_key_values is not None and self.counts_cached else 0
        columns = torch.arange(first, first + input_ids.shape[1])
        embeddings = self.get_input_embeddings()(input_ids)
        embeddings = embeddings + 0.1 * columns.sin()[:, None].to(embeddings.dtype)
        return super().forward(inputs_embeds=embeddings, past_key_values=past_key_values, **kwargs)


class RowColumnLlama(ColumnLlama):  # type: ignore[no-untyped-call]
    """Counts the columns of each forward from 0, so that no sequence can be continued."""

    counts_cached = False


class HeadMixer(nn.Module):
    """Causal attention over the row, whatever the attention interface says.

    Its name and source keep transformers from seeing that the model cannot take another one.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, *, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        own: Any = self.inner
        shape = (*hidden_states.shape[:-1], -1, own.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, own.layer_idx)
        key, value = (repeat_kv(x, own.num_key_value_groups) for x in (key, value))
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return own.o_proj(out.transpose(1, 2).flatten(2)), None


class DeafLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Claims to take an attention function, and never calls it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = HeadMixer(layer.self_attn)


def like_llama(model_class: type[LlamaForCausalLM]) -> PreTrainedModel:
    """A model of a class with random weights."""
    torch.manual_seed(0)
    config = make_model("llama").config
    assert isinstance(config, LlamaConfig)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    nn.Module.eval(model)
    return model


def choose(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> ModelRunner:
    nn.Module.to(model, dtype)
    return choose_runner(model, vocab_size=VOCAB_SIZE, max_model_len=256)


@pytest.mark.parametrize("model_class", [ColumnLlama, DeafLlama], ids=["columns", "own-attention"])
def test_a_model_that_only_looks_packable_is_served_per_request(
    model_class: type[LlamaForCausalLM], caplog: pytest.LogCaptureFixture
) -> None:
    expected = [generate(like_llama(model_class), prompt, 20) for prompt in PROMPTS]
    model = like_llama(model_class)
    assert packing_obstacle(model) is None
    with running(model, max_num_batched_tokens=7) as (engine, recorder):
        assert engine.path is EnginePath.PER_REQUEST
        for i, prompt in enumerate(PROMPTS):
            engine.submit(str(i), prompt, greedy(20))
        for i in range(len(PROMPTS)):
            recorder.end(str(i))
            assert recorder.tokens(str(i)) == expected[i]
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "model type 'llama' is computed per-request" in warning
    assert "packed: its logits are off by" in warning
    assert model.config._attn_implementation != ATTENTION_NAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_class", [ColumnLlama, DeafLlama], ids=["columns", "own-attention"])
def test_what_is_wrong_is_told_from_rounding_in_each_dtype(
    model_class: type[LlamaForCausalLM], dtype: torch.dtype
) -> None:
    assert choose(like_llama(model_class), dtype).path is EnginePath.PER_REQUEST
    assert choose(like_llama(LlamaForCausalLM), dtype).path is EnginePath.PACKED


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mistral", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_family_that_packs_right_passes_in_each_dtype(family: str, dtype: torch.dtype) -> None:
    assert choose(make_model(family), dtype).path is EnginePath.PACKED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "std"), [("mixtral", 0.2), ("llama", 0.5)])
def test_a_model_that_enlarges_rounding_still_passes(family: str, std: float, seed: int) -> None:
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "mixtral":  # a router that chooses another expert changes a row altogether
        model = MixtralForCausalLM(MixtralConfig(**SIZES | {"num_hidden_layers": 6, "num_local_experts": 8}))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": 24}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    assert choose(nn.Module.eval(model), torch.bfloat16).path is EnginePath.PACKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_cannot_go_on_inside_a_prompt_gets_whole_prompts(dtype: torch.dtype) -> None:
    runner = choose(make_unpackable("mamba"), dtype)
    assert (runner.path, runner.chunked) == (EnginePath.PER_REQUEST, False)
    runner = choose(make_unpackable("mamba2"), dtype)
    assert (runner.path, runner.chunked) == (EnginePath.PER_REQUEST, True)


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 8, 20, 256])
def test_the_probe_stays_within_the_context(max_model_len: int) -> None:
    model = make_model("gpt2")
    probe = Probe(model, vocab_size=VOCAB_SIZE, max_model_len=max_model_len, thorough=True)
    assert probe.error(Runner(model)) <= 1


def test_a_model_that_is_wrong_in_every_way_is_refused() -> None:
    message = r"'llama' is computed wrongly in every way \(packed: .*; per-request: .*; single: .*; use another model"
    with pytest.raises(UnsupportedModel, match=message):
        choose(like_llama(RowColumnLlama))


def broken(change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    model = make_model("llama")
    change(model)
    return model


@torch.no_grad()
def test_a_model_that_gives_nan_or_raises_by_itself_is_refused() -> None:
    nan = r"'llama' gives NaN or infinity in torch\.float32, first out of lm_head \(Linear\), whose input reaches [1-9]"
    with pytest.raises(UnsupportedModel, match=nan):
        choose(broken(lambda model: model.lm_head.weight.fill_(math.nan)))
    with pytest.raises(
        UnsupportedModel, match=r"first out of model\.layers\.1\.mlp\.down_proj \(Linear\), whose input"
    ):
        choose(broken(lambda model: model.model.layers[1].mlp.down_proj.weight.fill_(3e38)))
    with pytest.raises(UnsupportedModel, match=r"'llama' raises RuntimeError in its own forward \(.*use another model"):
        choose(broken(lambda model: setattr(model, "lm_head", nn.Linear(3, 3))))


def test_a_model_of_one_sequence_at_a_time_runs_no_two() -> None:
    runner = choose(make_unpackable("recurrent_gemma"))
    assert (runner.path, runner.chunked) == (EnginePath.SINGLE, False)
    assert runner.allocate(1 << 20, max_num_seqs=64, max_model_len=256).num_seqs == 1


def test_row_errors_are_shares_of_the_spread_and_pass_over_masked_logits() -> None:
    expected = torch.tensor([[3.0, 5.0, 4.0, 4.0], [1.0, -1.0, torch.finfo(torch.float32).min, -torch.inf]])
    actual = expected + torch.tensor([[0.3, 0.0, 0.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert row_errors(actual, expected).tolist() == pytest.approx([0.5 / math.sqrt(2), 0.0])
    actual[1, 0] = math.nan
    assert row_errors(actual, expected)[1] == math.inf
