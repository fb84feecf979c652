from __future__ import annotations

from array import array

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from service.engine.batch import Work
from service.engine.runner import Runner
from service.engine.sequence import Sequence
from service.errors import UnsupportedModel
from tests.engine.support import greedy, make_model, make_prompt, running, solo
from tests.kernels.support import computing_with


def test_a_layer_that_attends_twice_is_refused() -> None:
    model = make_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 2)
    model.config.num_hidden_layers = 2
    sequence = Sequence(
        request_id="a",
        token_ids=[1, 2],
        num_prompt_tokens=2,
        params=greedy(1),
        submitted_at=0.0,
        block_table=array("q", [0]),
    )
    with pytest.raises(UnsupportedModel, match="layer 0 attends twice in one forward"):
        Runner(model).forward([Work(sequence, 0, 2)])


class AllRowsLlama(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Returns the logits of every token, as models do that do not know `logits_to_keep`."""

    def forward(
        self, input_ids: torch.Tensor, *, logits_to_keep: object = 0, **kwargs: object
    ) -> CausalLMOutputWithPast:
        assert logits_to_keep is not None
        output: CausalLMOutputWithPast = super().forward(input_ids, **kwargs)
        return output


def test_a_model_that_returns_all_rows_gives_the_same_tokens() -> None:
    model = make_model("llama")
    assert isinstance(model.config, LlamaConfig)
    all_rows = AllRowsLlama(model.config)
    all_rows.load_state_dict(model.state_dict())
    prompts = [make_prompt(n) for n in (4, 21)]
    with running(all_rows, max_num_batched_tokens=7) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(9))
        for i in range(2):
            recorder.end(str(i))
    assert [recorder.tokens(str(i)) for i in range(2)] == [solo(model, prompt, greedy(9)) for prompt in prompts]


@pytest.mark.parametrize("isa", ["auto", "torch"])
def test_decodes_of_very_different_length_give_the_same_tokens(isa: str) -> None:
    model = make_model("mistral")
    prompts = [make_prompt(n) for n in (3, 450, 30, 6, 400)]  # more than 16 blocks apart: two batches in a step
    with computing_with(isa), running(model) as (engine, recorder):
        for i, prompt in enumerate(prompts):
            engine.submit(str(i), prompt, greedy(40))
        for i in range(len(prompts)):
            recorder.end(str(i))
    for i, prompt in enumerate(prompts):
        assert recorder.tokens(str(i)) == solo(model, prompt, greedy(40))
