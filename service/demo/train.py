"""Train the embedded demo model.

    python -m service.demo.train --corpus DIR --out DIR --minutes 62

DIR of the corpus has one UTF-8 text file per novel, named `Author_Title_Year.txt`. Written are
config.json, generation_config.json, model.safetensors (bf16), the tokenizer's files and training.json.
The learning rate follows elapsed time, so that a run ends when its minutes are over, on any machine;
how many tokens it saw, and therefore the weights, depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from service.errors import SettingError

VALIDATION = "Doyle_Lost_1912.txt"
HELD_BACK = "Haggard_She_1887.txt"
"""Neither trained on nor validated on: pages of Greek make it text outside the training distribution."""

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = [END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>"]
"""The first has id 0 and begins each novel; the others are reserved and the model never saw them."""

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
"""Plain prose: the model has seen no marks of dialogue."""

VOCAB_SIZE = 4096
CONTEXT = 1024
PEAK_LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
FINAL_LEARNING_RATE_RATIO = 0.02
LONG_WINDOWS_FROM = 0.85
"""Share of the time after which windows have the full context length."""
STEPS_PER_LOG_ROW = 250
HARD_WRAPPED_LENGTH = 90
"""Lines of a file that wraps its paragraphs have a smaller median length, in characters."""

TokenArray = npt.NDArray[np.uint16]


class Novels(NamedTuple):
    """Unwrapped novels, one string each."""

    training: list[str]
    validation: list[str]


class LogRow(NamedTuple):
    """The training loss of one step, in nats per token."""

    step: int
    tokens: int
    loss: float


class TrainingRun(NamedTuple):
    """Tokens trained on, and a row every `STEPS_PER_LOG_ROW` steps."""

    tokens_seen: int
    log: list[LogRow]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What training.json holds."""

    parameters: int
    tokens_seen: int
    minutes: float
    validation_perplexity_1024: float
    validation_characters_per_token: float
    log: list[LogRow]

    def to_json(self) -> str:
        """Render with the log's rows as objects."""
        return json.dumps(asdict(self) | {"log": [row._asdict() for row in self.log]}, indent=1)


def unwrap(text: str) -> str:
    """Put each paragraph on one line; a file that has them so already keeps its lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    if statistics.median(map(len, lines)) > HARD_WRAPPED_LENGTH:
        return "\n".join(line.strip() for line in lines)
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())


def read_novels(corpus: Path) -> Novels:
    """Read and unwrap all novels of a folder but the one that is held back."""
    novels = Novels([], [])
    for path in sorted(corpus.glob("*_*.txt")):
        if path.name != HELD_BACK:
            part = novels.validation if path.name == VALIDATION else novels.training
            part.append(unwrap(path.read_text(encoding="utf-8")))
    return novels


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> TokenArray:
    """Join the tokens of all texts, each text behind an end of text."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(0)
        ids.extend(encoding.ids)
    return np.array(ids, dtype=np.uint16)


def batches(tokens: TokenArray, *, rows: int, length: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """Yield int64[rows, length] without end: every epoch has all windows once, in a new order and at a new offset.

    Raises:
        SettingError: there is not enough text for a batch of every offset.
    """
    num_needed = (rows + 3) * length
    if len(tokens) < num_needed:
        raise SettingError(f"the corpus has {len(tokens)} training tokens, a batch needs {num_needed}; add text to it")
    while True:
        offset = int(generator.integers(length))
        starts = np.arange(offset, len(tokens) - length, length)
        generator.shuffle(starts)
        for i in range(0, len(starts) - rows, rows):
            window = np.stack([tokens[start : start + length] for start in starts[i : i + rows]])
            yield torch.from_numpy(window.astype(np.int64))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: TokenArray) -> float:
    """Compute exp(mean next-token loss) over windows of `CONTEXT` tokens that do not overlap."""
    losses = []
    for start in range(0, len(tokens) - CONTEXT, CONTEXT):
        ids = torch.from_numpy(tokens[start : start + CONTEXT].astype(np.int64))[None].to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.float().item())
    return math.exp(sum(losses) / len(losses))


def build_model() -> LlamaForCausalLM:
    """Build the untrained model: 5.77 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=768,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms' weights alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, done: float) -> float:
    """Warm up by steps, then fall along a cosine of the share of time that is `done`, 0 to 1."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return PEAK_LEARNING_RATE * warm_up * (FINAL_LEARNING_RATE_RATIO + (1 - FINAL_LEARNING_RATE_RATIO) * cosine)


def train(model: LlamaForCausalLM, tokens: TokenArray, minutes: float) -> TrainingRun:
    """Train in place until the minutes are over."""
    compiled, optimizer = torch.compile(model), build_optimizer(model)
    generator = np.random.default_rng(0)
    short = batches(tokens, rows=32, length=256, generator=generator)
    long = batches(tokens, rows=8, length=CONTEXT, generator=generator)
    step, tokens_seen = 0, 0
    log: list[LogRow] = []
    started = time.monotonic()
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, done)
        ids = next(long if done > LONG_WINDOWS_FROM else short).to(model.device)
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens_seen = step + 1, tokens_seen + ids.numel()
        if step % STEPS_PER_LOG_ROW == 0:
            log.append(LogRow(step, tokens_seen, round(loss.item(), 4)))
            print(f"{done:6.1%} step {step} tokens {tokens_seen / 1e6:.1f}M loss {loss.item():.3f}", flush=True)
    return TrainingRun(tokens_seen, log)


def make_demo_model(corpus: Path, out: Path, minutes: float) -> TrainingResult:
    """Train tokenizer and model on a corpus, measure both on the validation novel, and write them to `out`."""
    torch.manual_seed(0)
    novels = read_novels(corpus)
    tokenizer = train_tokenizer(novels.training[::4])  # a quarter of the novels settles 4096 tokens
    tokens, validation = encode(tokenizer, novels.training), encode(tokenizer, novels.validation)
    print(f"{len(tokens)} training tokens, {len(validation)} validation tokens", flush=True)
    model = build_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    run = train(model, tokens, minutes)
    model.eval()  # type: ignore[no-untyped-call]
    result = TrainingResult(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens_seen=run.tokens_seen,
        minutes=minutes,
        validation_perplexity_1024=round(perplexity(model, validation), 3),
        validation_characters_per_token=round(sum(map(len, novels.validation)) / len(validation), 3),
        log=run.log,
    )
    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(result.to_json(), encoding="utf-8")
    return result


def main() -> None:
    """Run the command line above."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of novels, one UTF-8 file each")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=62.0, help="time to train for")
    arguments = parser.parse_args()
    result = make_demo_model(arguments.corpus, arguments.out, arguments.minutes)
    print(f"validation perplexity {result.validation_perplexity_1024}, {result.tokens_seen} tokens seen")


if __name__ == "__main__":
    main()
