"""Models that bring their own code: it runs only when it is trusted and needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils

from service.errors import ModelError, UnsupportedModel
from service.layers.linear import QuantizedLinear
from tests.loading.support import load, logits
from tests.models import VOCAB_SIZE, write_checkpoint

CONFIG = """
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""

MODEL = """
from pathlib import Path
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from {config_import} import {config_class}

Path({marker!r}).touch()


class OwnModel(PreTrainedModel):
    config_class = {config_class}

    def __init__(self, config):
        super().__init__(config)
        {first_line}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        return CausalLMOutput(logits=self.head(x + self.down(self.up(x).relu())))
"""


@pytest.fixture(autouse=True)
def modules_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the copies of code that transformers makes, and the modules that it imports, to one test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def write_own(
    folder: Path, *, marker: Path, model_type: str = "own_llama", first_line: str = "pass", own_config: bool = True
) -> Path:
    """A model folder with a modeling file; the marker appears when any of its code runs."""
    folder.mkdir()
    fields = {
        "model_type": model_type,
        "architectures": ["OwnModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"},
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    if own_config:
        fields["auto_map"] = {**fields["auto_map"], "AutoConfig": "configuration_own.OwnConfig"}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration_own.py").write_text(CONFIG.format(marker=str(marker)))
    config = (".configuration_own", "OwnConfig") if own_config else ("transformers", "LlamaConfig")
    code = MODEL.format(marker=str(marker), first_line=first_line, config_import=config[0], config_class=config[1])
    (folder / "modeling_own.py").write_text(code)
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (VOCAB_SIZE, 32), "up": (48, 32), "down": (32, 48), "head": (VOCAB_SIZE, 32)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights | {"up.bias": torch.randn(48), "down.bias": torch.randn(32)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("model_type", ["own_llama", "llama"], ids=["unknown type", "known type"])
def test_untrusted_code_is_refused_and_does_not_run(model_type: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = write_own(tmp_path / "own", marker=marker, model_type=model_type)
    with pytest.raises(UnsupportedModel, match=r"own brings its own code, which is not run .*--trust-remote-code"):
        load(folder, "w8a16")
    assert not marker.exists()
    assert not (tmp_path / "modules").exists()


@pytest.mark.parametrize("own_config", [True, False], ids=["own config", "known config"])
def test_trusted_code_is_loaded_and_its_linears_are_quantized(own_config: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    model_type = "own_llama" if own_config else "llama"
    folder = write_own(tmp_path / "own", marker=marker, own_config=own_config, model_type=model_type)
    plain = load(folder, trust_remote_code=True)
    assert marker.exists()
    quantized = load(folder, "w8a16", trust_remote_code=True)
    linears = {name for name, module in quantized.model.named_modules() if isinstance(module, QuantizedLinear)}
    assert linears == {"up", "down", "head"}
    assert {row.name for row in quantized.report.layers if row.scheme == "w8a16"} == linears
    assert (quantized.vocab_size, quantized.context_length) == (VOCAB_SIZE, 64)
    error = (logits(quantized.model) - logits(plain.model)).norm() / logits(plain.model).norm()
    assert 0 < error < 0.05


def test_code_for_a_class_that_transformers_has_does_not_run(tmp_path: Path) -> None:
    folder = write_checkpoint("llama", tmp_path / "m")
    expected = logits(load(folder).model)
    (folder / "modeling_own.py").write_text("raise AssertionError('this ran')")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    for trust_remote_code in (False, True):
        assert torch.equal(logits(load(folder, trust_remote_code=trust_remote_code).model), expected)


def test_code_that_fails_is_named(tmp_path: Path) -> None:
    folder = write_own(tmp_path / "own", marker=tmp_path / "marker", first_line="raise ValueError('no such luck')")
    with pytest.raises(ModelError, match="could not load this model: ValueError: no such luck"):
        load(folder, trust_remote_code=True)
    (folder / "modeling_own.py").write_text("import no_such_package_of_a_model")
    with pytest.raises(UnsupportedModel, match=r"own: its code does not work with .*no_such_package_of_a_model"):
        load(folder, trust_remote_code=True)


def test_code_without_a_model_class_is_refused(tmp_path: Path) -> None:
    folder = write_own(tmp_path / "own", marker=tmp_path / "marker")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModelForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="its code has no AutoModelForCausalLM"):
        load(folder, trust_remote_code=True)
