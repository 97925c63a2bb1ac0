"""``vlmdefend list defenses`` is one line per defense in 80 columns; with a name it prints the whole of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    stochastic = True
    recipe = Recipe("wait until it wears off")

    def wrap(self, model):
        return model
"""


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """``listing("jpeg")``: the printed lines of ``list defenses jpeg`` in 80 columns, the plugin loaded."""
    from vlmdefend.cli.main import app
    from vlmdefend.defenses import DEFENSES

    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "charm.py"
    file.write_text(PLUGIN)

    def call(*args: str) -> list[str]:
        outcome = CliRunner().invoke(app, ["list", "defenses", *args, "--plugin", str(file)])
        assert outcome.exit_code == 0, outcome.output
        return outcome.output.splitlines()

    yield call
    DEFENSES._classes.pop("charm", None)


def test_every_defense_is_one_line_of_80_columns(listing: Callable[..., list[str]]) -> None:
    from vlmdefend.defenses import DEFENSES

    lines = listing()
    table = lines[1 : lines.index("")]
    assert [line.split()[0] for line in table] == sorted(
        DEFENSES.names(), key=lambda name: (name != "none", DEFENSES.get(name).paradigm, name)
    )
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["defense", "paradigm", "changes", "worst", "here", "gradient"]


def test_a_line_shows_paradigm_changes_worst_and_gradient(listing: Callable[..., list[str]]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in listing() if line.strip()}
    assert rows["charm"] == ["test-time", "nothing", "at", "all", "surrogate"], "a plugin has no measured row"
    assert rows["jpeg"] == ["training-free", "image", "51.0", "masked"]
    assert rows["low_pass"] == ["training-free", "image", "53.0", "exact"]


def test_the_page_of_one_has_options_recipe_citation_and_evidence(listing: Callable[..., list[str]]) -> None:
    page = " ".join(" ".join(listing("jpeg")).split())
    for part in (
        "quality=75",
        "Dziugaite et al. 2016",
        "adaptive attack: BPDA: the codec's values",
        "Measured here tiny-rn on fashion (n = 200), pgd:steps=10 linf 4/255: clean 92.5, transfer 77.5",
        "worst 51.0 [44.1, 57.8] %",
    ):
        assert part in page
    charm = " ".join(" ".join(listing("charm")).split())
    assert "adaptive attack: wait until it wears off" in charm
    assert "random" in charm


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("attacks", "apgd-ce", "Croce & Hein 2020"),
        ("methods", "tecoa", "Mao et al."),
        ("adaptations", "mdd", "margin"),
        ("datasets", "fashion", "embedded"),
        ("models", "tiny-vit", "embedded"),
        ("protocols", "unified", "pixel_space: model"),
    ],
)
def test_every_kind_has_a_page(kind: str, name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmdefend.cli.main import app

    monkeypatch.setenv("COLUMNS", "80")
    outcome = CliRunner().invoke(app, ["list", kind, name])
    assert outcome.exit_code == 0, outcome.output
    assert expected in " ".join(outcome.output.split())
    assert max(map(len, outcome.output.splitlines())) <= 80


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    from vlmdefend.cli.main import app
    from vlmdefend.errors import UserError

    outcome = CliRunner().invoke(app, ["list", "defenses", "jpge"])
    assert isinstance(outcome.exception, UserError)
    assert "did you mean 'jpeg'" in str(outcome.exception)
