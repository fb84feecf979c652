"""The embedded demo model is what its card says, and its recipe makes a model like it."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from service.demo import model_folder
from service.demo.train import (
    CONTEXT,
    HELD_BACK,
    PEAK_LEARNING_RATE,
    VALIDATION,
    WARM_UP_STEPS,
    batches,
    encode,
    learning_rate,
    make_demo_model,
    read_novels,
    unwrap,
)
from service.errors import SettingError

CARD = (model_folder().parent / "README.md").read_text(encoding="utf-8")
TRAINING = json.loads((model_folder() / "training.json").read_text(encoding="utf-8"))
EXCERPT = Path(__file__).parent / "data" / "the_lost_world.txt"

PROMPT = '"I am afraid," said the old man,'
COMPLETION = ' "that I am not a man to be a man of the world. I am a man of the world, and'
"""24 tokens; the smallest gap between the first and the second choice is 0.079 logits, float32 noise is 1e-4."""

WINDOW_LOSS_DEVIATION = 0.143
"""Standard deviation, in nats, of the loss of the validation novel's 115 windows; the card states it."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(model_folder())
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def window_loss(model: PreTrainedModel, ids: list[int]) -> float:
    window = torch.tensor([ids])
    with torch.inference_mode():
        loss: float = model(input_ids=window, labels=window, use_cache=False).loss.item()
    return loss


def test_the_model_takes_at_most_16_mb() -> None:
    assert sum(path.stat().st_size for path in model_folder().iterdir()) <= 16_000_000


def test_every_user_may_read_the_model() -> None:
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in model_folder().iterdir())


def test_a_greedy_completion_is_the_known_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    output = model.generate(ids, do_sample=False, max_new_tokens=24)  # type: ignore[operator]
    assert tokenizer.decode(output[0, ids.shape[1] :]) == COMPLETION
    assert COMPLETION.strip() in CARD


def test_unseen_prose_is_within_three_deviations_of_the_validation_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    bound = math.log(TRAINING["validation_perplexity_1024"]) + 3 * WINDOW_LOSS_DEVIATION
    ids = encode(tokenizer, [EXCERPT.read_text(encoding="utf-8")]).tolist()[:CONTEXT]
    shuffled = random.Random(0).sample(ids, len(ids))
    assert len(ids) == CONTEXT
    assert window_loss(model, ids) < bound < window_loss(model, shuffled)


def test_text_survives_the_tokenizer_byte_for_byte(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "\"Ünïcode\" ☃\n\tna\u0308ive  'quotes'"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_is_plain_prose(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Chapter I"}, {"role": "user", "content": "It was night."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "Chapter I\nIt was night.\n"


def test_the_card_states_the_training_record() -> None:
    assert f"{TRAINING['parameters']:,} parameters" in CARD
    assert f"{TRAINING['tokens_seen']:,} tokens" in CARD
    assert f"{TRAINING['validation_perplexity_1024']:.2f}" in CARD
    assert f"{TRAINING['validation_characters_per_token']:.2f} characters per token" in CARD
    assert f"{TRAINING['minutes']:.0f} minutes" in CARD
    assert f"{WINDOW_LOSS_DEVIATION} nats" in CARD


def test_the_record_counts_the_parameters_that_the_file_holds() -> None:
    with safe_open(model_folder() / "model.safetensors", "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - not a dict
    assert sum(sizes) == TRAINING["parameters"]


def test_the_card_names_the_two_novels_that_were_not_trained_on() -> None:
    for name in (VALIDATION, HELD_BACK):
        assert re.search(name.split("_")[1], CARD)


@pytest.mark.parametrize(
    ("text", "unwrapped"),
    [
        ("One line\nof a paragraph.\n\nAnother\none.\n", "One line of a paragraph.\nAnother one."),
        (f"{'long ' * 30}\nshort\n{'long ' * 30}", f"{('long ' * 30).strip()}\nshort\n{('long ' * 30).strip()}"),
    ],
    ids=["hard-wrapped", "a-paragraph-per-line"],
)
def test_a_paragraph_becomes_one_line(text: str, unwrapped: str) -> None:
    assert unwrap(text) == unwrapped


def test_the_held_back_novel_is_neither_trained_nor_validated_on(tmp_path: Path) -> None:
    for name in (VALIDATION, HELD_BACK, "Anon_Clara_1864.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert read_novels(tmp_path) == (["Anon_Clara_1864.txt"], [VALIDATION])


def test_an_epoch_has_each_window_once() -> None:
    tokens = np.arange(64, dtype=np.uint16)
    stream = batches(tokens, rows=2, length=8, generator=np.random.default_rng(0))
    windows = torch.cat([next(stream) for _ in range(3)])
    assert len(set(windows[:, 0].tolist())) == 6
    assert (windows.diff(dim=1) == 1).all()


def test_too_little_text_is_refused() -> None:
    stream = batches(np.zeros(39, dtype=np.uint16), rows=2, length=8, generator=np.random.default_rng(0))
    with pytest.raises(SettingError, match="the corpus has 39 training tokens, a batch needs 40; add text"):
        next(stream)


def test_the_learning_rate_warms_up_and_falls_to_a_fiftieth() -> None:
    assert learning_rate(0, 0.0) == pytest.approx(PEAK_LEARNING_RATE / WARM_UP_STEPS)
    assert learning_rate(WARM_UP_STEPS, 0.0) == pytest.approx(PEAK_LEARNING_RATE)
    assert learning_rate(10_000, 1.0) == pytest.approx(PEAK_LEARNING_RATE / 50)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch.compile's own
def test_the_recipe_trains_a_model_of_the_same_shape(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = EXCERPT.read_text(encoding="utf-8").split()
    chance = random.Random(0)
    for name, num_words in (("Anon_Clara_1864.txt", 20_000), (VALIDATION, 1_500)):
        (corpus / name).write_text(" ".join(chance.choices(words, k=num_words)), encoding="utf-8")
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute and a compiler
        result = make_demo_model(corpus, tmp_path / "model", minutes=0.001)  # one step
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shipped = AutoModelForCausalLM.from_pretrained(model_folder())
    assert trained.config.to_diff_dict() == shipped.config.to_diff_dict()
    assert result.parameters == TRAINING["parameters"]
    assert json.loads((tmp_path / "model" / "training.json").read_text()).keys() == TRAINING.keys()
    assert result.tokens_seen > 0
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in model_folder().iterdir()}
