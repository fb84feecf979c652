"""Quality on a text against plain transformers: the stock model in float32, with and without rounded weights."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import PreTrainedModel

from service.errors import SettingError
from service.loading.evaluation import BATCH_TOKENS, Evaluator, TextQuality, Windows, cut
from service.loading.planning import LoadOptions, find_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.loading.support import load, round_weights, stock
from tests.models import write_checkpoint

FAMILIES = ["llama", "llama_tied", "gpt2", "gemma2", "qwen3_moe", "gpt_oss", "granite"]
TOLERANCE = 1e-5


def text_ids(num_tokens: int) -> list[int]:
    return torch.randint(6, 300, (num_tokens,), generator=torch.Generator().manual_seed(1)).tolist()


def evaluated(folder: Path, windows: Windows, *recipes: str) -> list[TextQuality]:
    options = LoadOptions(model=str(folder), recipe=parse_recipe("none"), device="cpu")
    source, served = find_model(options, LoadProgress())
    with Evaluator(source, served, windows, torch.device("cpu")) as evaluator:
        found = [evaluator.original(lambda: None)]
        found += [evaluator.compare(load(folder, recipe).model, lambda: None) for recipe in recipes]
    return found


@torch.no_grad()
def expected(original: PreTrainedModel, other: PreTrainedModel, windows: Windows) -> TextQuality:
    """What transformers and torch's own functions make of it, window by window."""
    kl, agrees, losses = [], [], []
    for window in (window for batch in windows.batches for window in batch):
        scored = slice(windows.num_unscored - 1, len(window) - 1)
        p, q = (model(window[None]).logits[0, scored].log_softmax(-1) for model in (original, other))
        kl.append(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
        agrees.append(p.argmax(-1) == q.argmax(-1))
        losses.append(functional.nll_loss(q, window[windows.num_unscored :], reduction="none"))
    values = torch.cat(kl).sort().values
    return TextQuality(
        perplexity=math.exp(torch.cat(losses).double().mean()),
        kl_mean_nats=float(values.mean()),
        kl_p99_nats=float(values[math.ceil(0.99 * len(values)) - 1]),
        top1_ratio=float(torch.cat(agrees).double().mean()),
        num_tokens=len(values),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    windows = cut(text_ids(75), [], window_tokens=32)
    unquantized, quality = evaluated(folder, windows, "w4a16-g32")
    original, other = stock(folder), stock(folder)
    round_weights(other, load(folder, "w4a16-g32"))
    reference = expected(original, other, windows)
    assert reference.kl_mean_nats > 100 * TOLERANCE
    assert quality.num_tokens == reference.num_tokens == 31 + 31 + 10
    assert quality.perplexity == pytest.approx(reference.perplexity, rel=TOLERANCE)
    assert quality.kl_mean_nats == pytest.approx(reference.kl_mean_nats, abs=TOLERANCE)
    assert quality.kl_p99_nats == pytest.approx(reference.kl_p99_nats, abs=10 * TOLERANCE)
    assert quality.top1_ratio == reference.top1_ratio
    assert unquantized.perplexity == pytest.approx(expected(original, original, windows).perplexity, rel=TOLERANCE)
    assert (unquantized.kl_mean_nats, unquantized.kl_p99_nats, unquantized.top1_ratio) == (0, 0, 1)


def test_special_tokens_before_a_text_are_read_and_not_scored(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    windows = cut(text_ids(20), [0, 7], window_tokens=12)
    assert [batch.tolist() for batch in windows.batches] == [
        [[0, 7, *text_ids(20)[:10]], [0, 7, *text_ids(20)[10:]]],
    ]
    (found,) = evaluated(folder, windows)
    assert found.num_tokens == 20
    original = stock(folder)
    assert found.perplexity == pytest.approx(expected(original, original, windows).perplexity, rel=TOLERANCE)


def test_a_second_recipe_is_compared_as_if_it_were_alone(checkpoint: Callable[[str], Path]) -> None:
    windows = cut(text_ids(40), [], window_tokens=16)
    folder = checkpoint("llama_tied")
    _, first, second = evaluated(folder, windows, "nf4", "w8a16")
    assert [first] == evaluated(folder, windows, "nf4")[1:]
    assert [second] == evaluated(folder, windows, "w8a16")[1:]
    assert second.kl_mean_nats < first.kl_mean_nats


def test_weights_that_are_as_they_were_give_nothing_to_find(checkpoint: Callable[[str], Path]) -> None:
    windows = cut(text_ids(40), [], window_tokens=16)
    unquantized, same = evaluated(checkpoint("llama"), windows, "none")
    assert same == unquantized


def test_a_tied_weight_under_the_name_of_the_head_is_the_embedding(tmp_path: Path) -> None:
    folder = write_checkpoint("llama_tied", tmp_path / "model")
    windows = cut(text_ids(40), [], window_tokens=16)
    before = evaluated(folder, windows, "w8a16")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert evaluated(folder, windows, "w8a16") == before


def test_a_full_disk_is_told(checkpoint: Callable[[str], Path]) -> None:
    windows = cut(text_ids(200), [], window_tokens=200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # of one file; the process ignores the signal
    try:
        with pytest.raises(SettingError, match=r"cannot be kept there .*; set TMPDIR"):
            evaluated(checkpoint("llama"), windows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("num_tokens", "lengths"),
    [(2, [2]), (15, [15]), (16, [16]), (17, [16]), (18, [16, 2]), (40, [16, 16, 8])],
    ids=["two", "one short", "one", "one and a token", "one and two tokens", "several"],
)
def test_windows_do_not_overlap_and_a_last_short_one_counts(num_tokens: int, lengths: list[int]) -> None:
    ids = text_ids(num_tokens)
    windows = [window.tolist() for batch in cut(ids, [], window_tokens=16).batches for window in batch]
    assert list(map(len, windows)) == lengths
    assert [token_id for window in windows for token_id in window] == ids[: sum(lengths)]


def test_a_batch_has_windows_of_one_length_and_so_many_tokens() -> None:
    windows = cut(text_ids(5000), [], window_tokens=300, max_windows=9)
    assert [tuple(batch.shape) for batch in windows.batches] == [(BATCH_TOKENS // 300, 300), (3, 300)]
    (batch,) = cut(text_ids(5000), [], window_tokens=3000, max_windows=1).batches
    assert tuple(batch.shape) == (1, 3000)


@pytest.mark.parametrize(
    ("num_tokens", "prefix", "window_tokens"), [(0, [], 16), (1, [], 16), (0, [0, 1], 16), (9, [0, 1], 2)]
)
def test_a_text_without_a_token_to_score_is_refused(num_tokens: int, prefix: list[int], window_tokens: int) -> None:
    with pytest.raises(ValueError, match="no token to score"):
        cut(text_ids(num_tokens), prefix, window_tokens=window_tokens)
