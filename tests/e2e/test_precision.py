"""In bfloat16 neighbours change the logits of a row only as far as bfloat16 arithmetic changes them anyway."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.demo import model_folder
from service.engine.batch import Work
from service.engine.runner import Runner
from service.engine.sequence import Sequence
from service.loading.loader import load_model
from service.loading.planning import LoadOptions
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.engine.support import greedy, make_prompt

LENGTHS = (9, 33, 5, 60, 17, 24, 12, 40)
BLOCKS_PER_SEQUENCE = 8


def load(folder: Path, recipe: str, dtype: str) -> PreTrainedModel:
    options = LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu", dtype=dtype)
    model = load_model(options, LoadProgress()).model
    assert isinstance(model, PreTrainedModel)
    return model


def sequences() -> list[Sequence]:
    return [
        Sequence(
            request_id=str(i),
            token_ids=make_prompt(length, seed=i),
            num_prompt_tokens=length,
            params=greedy(1),
            submitted_at=0.0,
            block_table=array("q", range(i * BLOCKS_PER_SEQUENCE, (i + 1) * BLOCKS_PER_SEQUENCE)),
        )
        for i, length in enumerate(LENGTHS)
    ]


def decode_logits(model: PreTrainedModel, *, together: bool) -> Tensor:
    """Logits float32[8, vocab] behind the last token of each sequence, decoded in one step or each alone."""
    runner = Runner(model)
    rows = sequences()
    runner.forward([Work(rows[0], 0, 1)])  # shows the sizes of keys and values
    runner.allocate(1 << 24, max_num_seqs=len(rows), max_model_len=16 * BLOCKS_PER_SEQUENCE)
    for row in rows:
        runner.forward([Work(row, 0, len(row.token_ids) - 1)])
    last = [Work(row, len(row.token_ids) - 1, 1) for row in rows]
    return runner.forward(last) if together else torch.cat([runner.forward([work]) for work in last])


@pytest.mark.parametrize("recipe", ["none", "w8a16", "w4a16-g32"])
def test_logits_alone_and_among_neighbours_agree_within_the_error_of_bfloat16(recipe: str) -> None:
    exact = decode_logits(load(model_folder(), recipe, "float32"), together=False)
    model = load(model_folder(), recipe, "bfloat16")
    alone, together = decode_logits(model, together=False), decode_logits(model, together=True)
    # One row runs the int8 operator, eight run blocks: both are within `error` of exact arithmetic, or nearly so.
    error = (alone - exact).abs().amax(1)
    assert (error > 0).all()
    assert (error < 0.1 * exact.abs().amax(1)).all()
    bound = 2 * 2 * error  # triangle inequality, and twice for the error of the other regime
    assert ((together - alone).abs().amax(1) <= bound).all()
    top = alone.topk(2).values
    is_clear = top[:, 0] - top[:, 1] > 2 * bound
    assert is_clear.any(), "no gap is wide enough to prove anything"
    assert torch.equal(together.argmax(1)[is_clear], alone.argmax(1)[is_clear])
