"""The table of kinds: each test that it names exists, and each kind has its row."""

from __future__ import annotations

import re

import pytest

from tests.floors import ROOT

TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", TABLE)))
KINDS = [*(f"S{number}" for number in range(1, 14)), "S2b", *(f"F{number}" for number in range(1, 17))]


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{file} {test}" for file, test in NAMED])
def test_a_test_that_is_named_exists(file: str, test: str) -> None:
    path = ROOT / (file if file.startswith("tests/") else f"tests/{file}")
    text = path.read_text(encoding="utf-8")
    assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_row(kind: str) -> None:
    covered = r"F5-F8" if kind in ("F5", "F6", "F7", "F8") else kind
    assert re.search(rf"^\| {covered} \|", TABLE, re.MULTILINE)
