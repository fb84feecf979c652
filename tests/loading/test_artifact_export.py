from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.assembly import read_tokenizer
from service.cli import main
from service.errors import ArtifactError, DoesNotFit, ModelNotFound, SettingError
from service.loading.artifact import DATA_NAME, MANIFEST_NAME
from service.loading.artifact_export import export_artifact
from service.loading.loader import load_model
from service.loading.plan import Limits
from service.loading.planning import LoadOptions, open_checkpoint, plan_model
from service.loading.progress import LoadProgress
from service.numerics.recipe import parse_recipe
from tests.loading.artifacts import lasting, load_and_save, load_through, the_entry
from tests.loading.support import load, logits
from tests.loading.test_artifact import sign
from tests.loading.test_text_part import write_multimodal

RECIPE = "w4a16-g64,lm_head=w8a16-g64"


@pytest.fixture(scope="module")
def original(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of a tiny Llama; not to be changed."""
    output = tmp_path_factory.mktemp("exported") / "deep" / "quantized"
    flags = ["--quantize", RECIPE, "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    assert main(["quantize", str(original), "--output", str(output), *flags, "--json"]) == 0
    return output


def options(folder: Path, recipe: str = RECIPE) -> LoadOptions:
    return LoadOptions(model=str(folder), recipe=parse_recipe(recipe), device="cpu")


def test_an_exported_model_is_that_of_the_load(original: Path, exported: Path) -> None:
    first, second = load(original, RECIPE), load_model(options(exported), LoadProgress())
    assert lasting(second.report) == lasting(first.report)
    assert torch.equal(logits(second.model), logits(first.model))
    assert (second.name, second.uncached) == ("quantized", None)
    assert (second.context_length, second.eos_token_ids) == (first.context_length, first.eos_token_ids)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_text_part_is_exported_and_cached_by_itself(kind: str, tmp_path: Path) -> None:
    folder = write_multimodal(kind, tmp_path / "whole")
    loaded = load_and_save(tmp_path / "cache", folder, "w8a16")
    export_artifact(loaded, tmp_path / "out", save_tokenizer=lambda _: None, on_bytes=lambda _: None)
    cached = load_through(tmp_path / "cache", folder, "w8a16")
    exported = load_model(options(tmp_path / "out", "w8a16"), LoadProgress())
    assert cached.uncached is exported.uncached is None
    for other in (cached, exported):
        assert lasting(other.report) == lasting(loaded.report)
        assert torch.equal(logits(other.model), logits(loaded.model))


def test_a_model_without_its_weights_says_so(exported: Path) -> None:
    loaded = load_model(options(exported), LoadProgress())
    with pytest.raises(ModelNotFound, match="quantized is quantized, and the weights that it was made from are not"):
        open_checkpoint(loaded.source, loaded.served, LoadProgress())


def test_its_tokenizer_is_that_of_the_model(original: Path, exported: Path) -> None:
    ours = read_tokenizer(exported, "quantized", trust_remote_code=False)
    own = AutoTokenizer.from_pretrained(original)
    text = "The sea, <|endoftext|> 12 é\n"
    assert ours(text).input_ids == own(text).input_ids
    assert ours.chat_template == own.chat_template
    assert (ours.eos_token_id, ours.backend_tokenizer.to_str()) == (own.eos_token_id, own.backend_tokenizer.to_str())


def test_plain_transformers_refuses_it(exported: Path) -> None:
    assert not (exported / "config.json").exists()
    with pytest.raises(ValueError, match="Unrecognized model"):
        AutoModelForCausalLM.from_pretrained(exported)


def test_the_figures_of_the_command_are_those_of_the_load(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--output", str(tmp_path / "out"), "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    assert main(["quantize", str(original), *flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    report = load(original, "w8a16").report
    assert (facts["quantized_bytes"], facts["original_bytes"]) == (report.weight_bytes.total, report.original_bytes)
    assert facts["system_fingerprint"] == report.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_recipe_or_dtype_is_refused(exported: Path) -> None:
    with pytest.raises(SettingError, match=rf"--quantize w8a16: {exported} was quantized with w4a16-g64,lm_head="):
        load_model(options(exported, "w8a16"), LoadProgress())
    with pytest.raises(SettingError, match=r"--dtype bfloat16: .* was quantized with float32; leave --dtype out"):
        plan_model(replace(options(exported), dtype="bfloat16"), LoadProgress())


def test_its_plan_is_that_of_the_recipe(original: Path, exported: Path) -> None:
    plans = [plan_model(replace(options(folder), dtype="float32"), LoadProgress()) for folder in (original, exported)]
    assert plans[0].weight_bytes == plans[1].weight_bytes
    assert plans[1].working_set.source == "the blocks of the artifact"
    limits = Limits(memory_bytes=1)
    with pytest.raises(DoesNotFit, match="this process can have 1; give more memory, or quantize the model with fewer"):
        load_model(replace(options(exported), limits=limits), LoadProgress())


def test_a_damaged_export_is_not_served(exported: Path, tmp_path: Path) -> None:
    for path in exported.iterdir():
        content = bytearray(path.read_bytes())
        if path.name == DATA_NAME:
            content[-1] ^= 1
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tensors.bin: damaged, the block at byte \d+ is not what was written"):
        load_model(options(tmp_path), LoadProgress())
    (tmp_path / DATA_NAME).write_bytes((exported / DATA_NAME).read_bytes())
    sign(tmp_path, sha256="0" * 64)
    load_model(options(tmp_path), LoadProgress())
    with pytest.raises(ArtifactError, match=r"tensors.bin: damaged, its sha256 is another"):
        load_model(replace(options(tmp_path), verify="full"), LoadProgress())
    (tmp_path / MANIFEST_NAME).write_bytes(b"{}")
    with pytest.raises(ArtifactError, match="damaged"):
        load_model(options(tmp_path), LoadProgress())


def test_a_cache_entry_is_no_model(original: Path, tmp_path: Path) -> None:
    load_and_save(tmp_path, original)
    with pytest.raises(ArtifactError, match="holds the tensors of a model only; give the model that it was made from"):
        load_model(options(the_entry(tmp_path), "w8a16"), LoadProgress())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output: not given; name a folder"),
        (["--output", "{used}"], "--output .*: is there already; name a folder that is not"),
        (["--output", "{used}/file/below"], "--output .*: "),
        (["--output", "{free}", "--quantize", "none"], "--quantize none: there is nothing to quantize"),
    ],
    ids=["none", "used", "below a file", "unquantized"],
)
def test_what_cannot_be_exported_is_told(
    flags: list[str], message: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    words = [flag.format(used=used, free=tmp_path / "free") for flag in flags]
    assert main(["quantize", str(original), "--threads", "1", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pennyweight: ")
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_a_limit_of_loss_holds_for_what_is_written(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quantize", "w4a16-g64", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--json"]
    command = ["quantize", str(original), "--output", str(tmp_path / "out"), *flags]
    assert main([*command, "--max-kl", "1e-9"]) == 1
    assert re.search(r"w4a16-g64 moves .* nats .*, --max-kl allows 1e-09; use a recipe", capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
    assert main([*command, "--max-kl", "100"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl_mean_nats"] < 100


def test_an_export_is_not_exported_again(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(exported), "--output", str(tmp_path / "again"), "--threads", "1"]) == 2
    assert "is quantized already; copy it" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
