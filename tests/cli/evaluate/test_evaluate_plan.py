"""What is planned: the cells, their cost, the attackers that differ; and what does not change the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from vlmdefend.evaluation.grid.grid import Grid
from vlmdefend.evaluation.make_plan import make_plan

pytestmark = pytest.mark.numerics


def planned(evaluate: Cli, *options: str) -> list[list[str]]:
    """The cells that ``--dry-run`` prints: model, defense, attack, eps, attacker, seed, forwards, backwards."""
    outcome = evaluate(*options, "--dry-run")
    assert outcome.code == 0, outcome.err
    *tables, summary = outcome.out.split("\n\n")
    rows = []
    for table in tables:
        title, header, *lines = table.splitlines()
        assert header.split() == ["defense", "attack", "eps", "attacker", "seed", "forwards", "backwards"]
        rows += [[title.partition(" on ")[0], *re.split(r"\s{2,}", line.strip())] for line in lines if line.strip()]
    assert summary.startswith(f"{len(rows)} cells, ")
    return rows


def test_a_dry_run_computes_nothing_loads_no_weights_and_writes_nothing(
    evaluate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmdefend.models.clip.build.read_weights", lambda *args: pytest.fail("weights were read"))
    monkeypatch.setattr(
        "vlmdefend.evaluation.launchers.inline.load_model", lambda *args, **options: pytest.fail("loaded")
    )
    outcome = evaluate("-d", "none,jpeg", "-a", "none,pgd", "--eps", "4/255,8/255", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "Nothing was computed" in outcome.out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_model_that_must_be_downloaded_downloads_nothing(
    evaluate: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmdefend.models.weights.fetch.Repository.file", lambda *a: pytest.fail("the hub was asked"))
    assert [row[0] for row in planned(evaluate, "-m", "ViT-B/32", "-a", "none")] == ["ViT-B/32"]


def test_every_list_multiplies_the_grid(evaluate: Cli) -> None:
    rows = planned(evaluate, "-m", "tiny-vit,tiny-rn", "-d", "none", "-a", "pgd,fgsm", "--eps", "1/255,2/255,4/255")
    assert len(rows) == 2 * 2 * 3


def test_the_default_grid_is_the_embedded_model_on_the_embedded_images_at_the_protocols_radii(cli: Cli) -> None:
    outcome = cli("evaluate", "--attack", "pgd", "--dry-run")
    assert outcome.code == 0
    assert "3 cells" in outcome.out
    assert all(eps in outcome.out for eps in ("4/255", "8/255", "16/255"))


@pytest.mark.parametrize(
    ("defense", "attackers"),
    [
        ("none", ["whitebox"]),  # nothing to know: one attacker
        ("low_pass", ["transfer", "whitebox"]),  # autograd sees all of it: adaptive is white-box
        ("jpeg", ["transfer", "whitebox", "adaptive"]),
        ("noise", ["transfer", "whitebox", "adaptive"]),
    ],
)
def test_attackers_that_would_do_the_same_are_run_once(defense: str, attackers: list[str], evaluate: Cli) -> None:
    assert [row[4] for row in planned(evaluate, "-d", defense)] == attackers


def test_asking_for_the_adaptive_attacker_of_an_exact_defense_runs_the_white_box_one(evaluate: Cli) -> None:
    assert [row[4] for row in planned(evaluate, "-d", "low_pass", "--attacker", "adaptive")] == ["whitebox"]


def test_clean_accuracy_is_one_cell_whatever_the_radii_and_attackers(evaluate: Cli) -> None:
    assert len(planned(evaluate, "-d", "jpeg", "-a", "none", "--eps", "1/255,2/255")) == 1


def test_attacks_of_several_norms_take_one_radius_list_only_where_one_norm_suits_all(evaluate: Cli) -> None:
    assert len(planned(evaluate, "-a", "pgd,cw,none", "--norm", "l2", "--eps", "0.5")) == 3
    by_default = make_plan(Grid.build({}, {"attack": ["pgd", "patch"], "limit": 16}))  # each norm has its own
    assert [(cell.norm, round(cell.eps * 255)) for cell in by_default.cells if cell.eps > 0.03] == [
        ("linf", 8),
        ("linf", 16),
        ("patch", 13),
    ]


def test_a_cell_written_twice_is_run_once(evaluate: Cli) -> None:
    assert len(planned(evaluate, "-a", "pgd,pgd:steps=10", "--eps", "4/255,4.0/255")) == 1


def test_steps_reach_the_attacks_that_take_steps_and_do_not_say_how_many(evaluate: Cli) -> None:
    rows = planned(evaluate, "-a", "pgd,pgd:steps=3,fgsm", "--steps", "5")
    assert [int(row[-1]) // 16 for row in rows] == [5, 3, 1]
    rows = planned(evaluate, "-a", "pgd,repeated:n=2:attack=[pgd:steps=3]", "--steps", "5")
    assert [int(row[-1]) // 16 for row in rows] == [5, 6]


def test_the_plan_fits_into_80_columns_and_says_each_name_in_full(evaluate: Cli) -> None:
    outcome = evaluate("-d", "randomized_smoothing+ttc+jpeg", "-a", "torchattacks:DIFGSM", "--dry-run")
    *tables, summary = outcome.out.split("\n\n")
    assert max(len(line) for table in tables for line in table.splitlines()) <= 80
    cells = [line for line in tables[0].splitlines()[2:] if line]
    column = [line[: tables[0].splitlines()[1].index("attack ")].strip() for line in cells]
    assert "".join(column).count("randomized_smoothing+ttc+jpeg") == int(summary.split()[0])


def test_the_cost_of_a_defense_is_not_called_that_of_its_model(evaluate: Cli) -> None:
    """A call of a defense is as many of its model as it has views, which only the defense knows."""
    assert "may run it several times" not in evaluate("-d", "none", "--dry-run").out
    assert "forwards and" in evaluate("-d", "tte", "--dry-run").out
    assert "behind its defense, which may run it several times in each" in evaluate("-d", "none,tte", "--dry-run").out


def robust(out: Path) -> set[str]:
    (file,) = out.glob("cells/*/rows.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {r["id"] for r in rows if r["label"] == r["clean_prediction"] == r["adversarial_prediction"]}


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-rn"])
def test_the_verdict_depends_neither_on_the_batch_size_nor_on_the_threads(model: str, cli: Cli, tmp_path: Path) -> None:
    verdicts = []
    for batch_size, threads in (("8", "1"), ("32", "1"), ("32", "2")):
        out = tmp_path / f"{batch_size}-{threads}"
        options = ("-m", model, "--limit", "40", "--eps", "4/255", "--batch-size", batch_size, "--threads", threads)
        assert cli("evaluate", *options, "--device", "cpu", "--out", out).code == 0
        verdicts.append(robust(out))
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert 0 < len(verdicts[0]) < 40
