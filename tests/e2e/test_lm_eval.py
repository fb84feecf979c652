"""lm-evaluation-harness, unmodified, over HTTP: a small task of our own, against transformers in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.demo import model_folder
from tests.e2e.support import clean_environment, ready

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness: pip install '.[nightly]'"),
]

TIMEOUT_S = 300.0
TOLERANCE = 1e-3
"""A continuation has up to 10 tokens, and each log-probability is right within 1e-4."""
CHOICES = [
    ("The old man looked out over the", [" sea", " and", " sea and the sky", " seventeen"], 0),
    ("She opened the door and went into the", [" room", " blue of", " house.", " xylophone"], 0),
    ("In the morning the sun", [" rose", " was in the sky", " cat", " Wednesday mornings"], 1),
    ("He took her by the", [" hand", " hands of the captain", " mountain!", " 1849"], 0),
    ("It was a dark and stormy", [" night", " night; the rain fell", " day, said he", " the"], 1),
    ("They sailed for three days before the", [" wind", " storm broke", " of", " \u6d77"], 0),
]
"""Contexts, continuations and the number of the right one; of one and several tokens, likely and absurd."""
STARTS = ["The captain said", "There was once a", "When the night came, they", "I do not know"]
ROLLING = ["The sea was calm and the night was long.", "Nobody knew where the old house had stood."]
MAX_NEW_TOKENS = 24

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
num_fewshot: 0
metadata: {{version: 1}}
"""
TASKS = {
    "own_choice": """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""",
    "own_start": """
task: own_start
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [".", ","], max_gen_toks: 24, do_sample: false, temperature: 0.0}}
metric_list: [{{metric: exact_match}}]
""",
    "own_rolling": """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
}


class Oracle:
    """The embedded model in float32, by transformers alone."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether it is what greedy decoding gives."""
        start = self.tokenizer.encode(context) if context else [self.tokenizer.eos_token_id]
        ids = start + self.tokenizer.encode(context + continuation)[len(start) if context else 0 :]
        with torch.inference_mode():
            rows = self._model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(start) - 1 : -1]
        own = rows.gather(1, torch.tensor(ids[len(start) :])[:, None])
        return own.sum().item(), bool((own[:, 0] == rows.amax(1)).all())

    def generate(self, start: str) -> str:
        """Greedy text up to the first full stop or comma."""
        ids = torch.tensor([self.tokenizer.encode(start)])
        out = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        text = self.tokenizer.decode(out[0], skip_special_tokens=True)
        assert isinstance(text, str)
        text = text[len(start) :]
        return text[: min(text.find(stop) % (len(text) + 1) for stop in (".", ","))]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the embedded model, unquantized and in float32."""
    with ready("--quantize", "none", "--dtype", "float32") as (_, client):
        yield str(client.base_url)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Path:
    """A folder with the tasks and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    targets = [oracle.generate(start) for start in STARTS]
    targets[0] += " not"  # one in four is wrong
    documents: dict[str, list[dict[str, Any]]] = {
        "own_choice": [{"context": c, "choices": choices, "label": label} for c, choices, label in CHOICES],
        "own_start": [{"start": start, "target": target} for start, target in zip(STARTS, targets, strict=True)],
        "own_rolling": [{"text": text} for text in ROLLING],
    }
    for name, rows in documents.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text((TASKS[name] + COMMON).format(data=data), encoding="utf-8")
    return folder


def evaluate(url: str, tasks: Path, output: Path, *, names: str, batch_size: int = 1, **arguments: object) -> Any:
    """Run the harness; the results, and the answers to each document by task."""
    model_args = {"model": "pennyweight-demo", "base_url": f"{url}/v1/completions", "max_length": 1024} | arguments
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())),
        *("--tasks", names, "--include_path", str(tasks), "--batch_size", str(batch_size)),
        *("--output_path", str(output), "--log_samples"),
    ]
    environment = clean_environment() | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = output.rglob("results_*.json")
    samples = {}
    for name in names.split(","):
        (path,) = output.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[name] = [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


@pytest.mark.parametrize(
    ("batch_size", "arguments"),
    [
        (1, {}),
        (4, {"tokenizer_backend": "huggingface"}),
        (3, {"tokenizer_backend": "huggingface", "num_concurrent": 2}),
        (2, {"tokenizer_backend": "huggingface", "tokenized_requests": False}),
    ],
    ids=["defaults", "batches", "concurrent", "texts"],
)
def test_scores_are_those_of_transformers(
    url: str, tasks: Path, oracle: Oracle, tmp_path: Path, batch_size: int, arguments: dict[str, Any]
) -> None:
    arguments = {"tokenizer": model_folder()} | arguments
    results, samples = evaluate(
        url, tasks, tmp_path, names="own_choice,own_start,own_rolling", batch_size=batch_size, **arguments
    )
    right = 0
    for (context, choices, label), answers in zip(CHOICES, samples["own_choice"], strict=True):
        expected = [oracle.score(context, choice) for choice in choices]
        assert [float(logprob) for logprob, _ in answers] == pytest.approx([e[0] for e in expected], abs=TOLERANCE)
        assert [str(is_greedy) for _, is_greedy in answers] == [str(e[1]) for e in expected]
        right += max(range(len(choices)), key=lambda i: expected[i][0]) == label
    assert 0 < right < len(CHOICES)  # else the comparison would show little
    assert results["own_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))
    assert [answers[0] for answers in samples["own_start"]] == [oracle.generate(start) for start in STARTS]
    assert results["own_start"]["exact_match,none"] == 0.75
    scores = [oracle.score("", text)[0] for text in ROLLING]
    assert [float(answers[0]) for answers in samples["own_rolling"]] == pytest.approx(scores, abs=TOLERANCE)


def test_generation_works_without_a_tokenizer_on_the_clients_side(
    url: str, tasks: Path, oracle: Oracle, tmp_path: Path
) -> None:
    results, samples = evaluate(url, tasks, tmp_path, names="own_start", tokenizer_backend=None)
    assert [answers[0] for answers in samples["own_start"]] == [oracle.generate(start) for start in STARTS]
    assert results["own_start"]["exact_match,none"] == 0.75
