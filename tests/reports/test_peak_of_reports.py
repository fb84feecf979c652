"""The memory of `inspect` and `evaluate` in processes of their own, beside what is planned for a load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.floors import ROOT
from tests.sparse import write_sparse_checkpoint

_START = """
import json, sys
from dataclasses import replace
from service.loading.loader import load_model
from service.loading.memory import peak_resident_bytes
from service.loading.planning import LoadOptions, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from service.reports.evaluate import TextIds, evaluate
from service.reports.evaluate_options import Evaluation, parse_recipes
from service.reports.inspect_watch import EncodingWatch
options = LoadOptions(model=sys.argv[1], recipe=parse_recipe("w8a16"), device="cpu", dtype="bfloat16")
planned = plan_model(options, LoadProgress()).peak_bytes
"""
_COMMANDS = {
    "inspect": "load_model(replace(options, watch=EncodingWatch()), LoadProgress())",
    "evaluate": """
evaluate(
    Evaluation(recipes=parse_recipes("w8a16;w4a16;nf4"), text="", max_windows=1),
    options, lambda *_: TextIds([], [1, 2, 3, 4] * 20), lambda *_: None,
)
""",
}
_END = "print(json.dumps([peak_resident_bytes(), planned]))"


@pytest.mark.nightly
@pytest.mark.parametrize("command", _COMMANDS)
def test_memory_is_that_of_a_load(command: str, tmp_path: Path) -> None:
    """The weights are 400 MB in bfloat16, so that a second copy of them would show."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=64000,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    folder = write_sparse_checkpoint(tmp_path / "model", config)
    script = _START + _COMMANDS[command] + "\n" + _END
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    peak, planned = json.loads(result.stdout.splitlines()[-1])
    assert peak <= planned
