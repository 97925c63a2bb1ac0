"""``vlmdefend list defenses`` says of each defense what it does, changes, and how it is attacked, in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

PLUGIN = """
from dataclasses import dataclass
from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Recipe

@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Charm(Defense):
    name = "charm"
    paradigm = "test-time adaptation"
    summary = "a charm"
    citation = "Nobody 2026"
    changes = "nothing at all"
    evidence = "none, here 0.0 % adaptive"
    stochastic = True
    recipe = Recipe("wait until it wears off")

    def wrap(self, model):
        return model
"""


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    from vlmdefend.cli.main import app
    from vlmdefend.defenses import DEFENSES

    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "charm.py"
    file.write_text(PLUGIN)
    outcome = CliRunner().invoke(app, ["list", "defenses", "--plugin", str(file)])
    assert outcome.exit_code == 0, outcome.output
    yield outcome.output.splitlines()
    del DEFENSES._classes["charm"]


def test_each_thing_that_is_known_starts_a_line(listed: list[str]) -> None:
    about = listed[0].index("about")
    at = next(i for i, line in enumerate(listed) if line.startswith("charm "))
    assert [line[:about].split() for line in listed[at : at + 2]] == [["charm", "test-time"], ["adaptation"]]
    assert [line[about:].strip() for line in listed[at : at + 4]] == [
        "a charm (Nobody 2026); random",
        "changes: nothing at all",
        "adaptive attack: wait until it wears off",
        "evidence: none, here 0.0 % adaptive",
    ]


def test_it_fits_80_columns(listed: list[str]) -> None:
    assert max(map(len, listed)) <= 80


def test_every_defense_says_how_it_is_attacked_and_all_but_none_what_they_change(listed: list[str]) -> None:
    from vlmdefend.defenses import DEFENSES

    text = "\n".join(listed)
    assert text.count("adaptive attack: ") == len(DEFENSES.names())
    assert text.count("changes: ") == len(DEFENSES.names()) - 1
