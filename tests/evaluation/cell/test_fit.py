"""Attacks that are fitted to a set, run in a whole cell: once per cell, on the same images, with their cost counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.evaluation.cell.test_verdict import noisy
from tests.evaluation.conftest import COUNT, Around, CellWriter, Linear, Notes, Random, Verdict, bench, pictures
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.composite.worst_of import WorstOf
from vlmdefend.attacks.corruptions.corruption import Corruption
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.query.square import Square
from vlmdefend.attacks.set_level.patch import Patch
from vlmdefend.attacks.set_level.universal import Universal
from vlmdefend.attacks.view import View
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.none import NoDefense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.grid.plan import attackers_of
from vlmdefend.evaluation.grid.planned import PlannedCell
from vlmdefend.evaluation.statistics.diagnostics import Result, reasons
from vlmdefend.evaluation.store.run_folder import StoredShard
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Pipeline, Threat


@dataclass(frozen=True, kw_only=True)
class Pupil(Attack):
    """Notes what it is shown, and learns nothing."""

    name: ClassVar[str] = "pupil"
    count: int
    seen: Any

    @property
    def learns_from(self) -> int:
        return self.count

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        self.seen.append((view.rng.names, len(labels), threat.eps, view(images)))
        return self

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        return images


def learning(**options: Any) -> Any:
    return {"attack": Universal(steps=4, batch=4, **options), "eps": 16 / 255}


SET_LEVEL = pytest.mark.parametrize(
    "options",
    [learning(), {"attack": Patch(steps=4, batch=4, place="center"), "norm": "patch", "eps": 0.3}],
    ids=["universal", "patch"],
)


def test_it_learns_once_from_images_spread_evenly_over_the_set(verdict: Verdict) -> None:
    seen: list[Any] = []
    verdict(attack=Pupil(count=4, seen=seen))
    assert len(seen) == 1
    assert seen[0][:3] == ([opaque(f"image-{i:02d}") for i in (0, 4, 8, 12)], 4, 8 / 255)
    seen.clear()
    verdict(attack=Pupil(count=1000, seen=seen))
    assert seen[0][1] == COUNT
    seen.clear()
    verdict(attack=Pupil(count=4, seen=seen), eps=0.0)
    assert seen == []


@SET_LEVEL
def test_a_run_that_goes_on_after_a_kill_learns_the_same_again(
    options: dict[str, Any], tmp_path: Path, progress: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tmp_path / "whole", **options) as (evaluator, writer):
        whole, rows = evaluator.run(writer, progress)
    add = CellWriter.add

    def killed(self: CellWriter, shard: StoredShard) -> None:
        add(self, shard)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, bench(tmp_path / "parts", **options) as (evaluator, writer):
        patched.setattr(CellWriter, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluator.run(writer, progress)
    with bench(tmp_path / "parts", **options) as (evaluator, writer):
        assert len(writer.finished_shards()) == 1
        resumed, again = evaluator.run(writer, progress)
    assert again == rows
    assert resumed.robust == whole.robust
    for name in ("attack_forwards", "attack_backwards"):  # the fitted was taken twice, and is counted once
        assert getattr(resumed.cost, name) == getattr(whole.cost, name)
    assert resumed.checks == whole.checks


@SET_LEVEL
def test_fitting_is_in_the_cost_and_its_gradients_in_the_checks(options: dict[str, Any], verdict: Verdict) -> None:
    record, _ = verdict(**options)
    assert record.set_level
    assert record.cost.attack_backwards == 4 * COUNT
    assert record.checks.gradient_values == 4 * COUNT * 3 * 6 * 6
    assert record.robust < record.clean_correct
    assert record.checks.loss_not_rising == 0  # a delta for all need not raise each margin
    assert record.checks.outside_budget == 0


@SET_LEVEL
def test_a_defense_that_masks_its_gradient_is_flagged_while_the_attack_is_fitted(
    options: dict[str, Any], verdict: Verdict
) -> None:
    def cut(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return Outputs(model(images.detach(), rng).logits)

    checks = verdict(**options, defense=Around(call=cut))[0].checks
    assert checks.zero_gradients == checks.gradient_values > 0


def test_logits_that_are_not_numbers_while_fitting_are_an_error(verdict: Verdict) -> None:
    def evasive(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        levels = images.detach() * 255
        attacked = (levels - levels.round()).abs().flatten(1).amax(dim=1) > 1e-3
        return Outputs(torch.where(attacked[:, None], torch.nan, model(images, rng).logits))

    with pytest.raises(UserError, match=r"not finite.*its failures prove nothing"):
        verdict(**learning(), defense=Around(call=evasive))


def test_memory_that_runs_out_while_fitting_halves_the_batch(verdict: Verdict, progress: Notes) -> None:
    def small(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(images, rng)

    _, rows = verdict(**learning(), defense=Around(call=small))
    assert progress.notes == ["out of memory: the batch is halved to 2 images"]
    _, plain = verdict(**learning())
    assert [row.robust for row in rows] == [row.robust for row in plain]


def test_the_transfer_attacker_learns_from_the_bare_model(verdict: Verdict) -> None:
    """Of a defense that mirrors the picture only the other attackers see the mirror."""

    def mirrored(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return model(images.flip(3), rng)

    shown = {}
    for attacker in ("transfer", "whitebox"):
        seen: list[Any] = []
        verdict(attack=Pupil(count=4, seen=seen), defense=Around(call=mirrored), attacker=attacker)
        shown[attacker] = seen[0][-1]
    model = Linear()
    images = load_batch(pictures(model), [0, 4, 8, 12], PixelTransform(None, "bicubic"), skip_bad=False)[0].images
    rng = ImageRng(0, [""] * 4)
    assert torch.allclose(shown["transfer"], model(images, rng).logits)
    assert torch.allclose(shown["whitebox"], model(images.flip(3), rng).logits)


def test_a_random_defense_is_learned_from_with_the_same_draws_each_time(verdict: Verdict) -> None:
    rows = [verdict(**learning(), defense=Random(call=noisy), attacker="adaptive")[1] for _ in range(2)]
    assert rows[0] == rows[1]


def test_a_set_without_a_readable_image_to_learn_from_is_one_sentence(verdict: Verdict) -> None:
    with pytest.raises(UserError, match="no image to learn from"):
        verdict(attack=Universal(images=2), bad=(0, 8), skip_bad=True)
    record, _ = verdict(attack=Universal(images=4), bad=(0, 8), skip_bad=True)
    assert record.n == COUNT - 2


def test_queries_that_beat_one_delta_for_all_are_no_sign_of_a_masked_gradient(verdict: Verdict) -> None:
    universal = verdict(attack=Universal(steps=1, alpha="0.0001"), eps=24 / 255)
    square = verdict(attack=Square(queries=200), eps=24 / 255)
    assert square[0].robust <= universal[0].robust - 5
    found = reasons([Result(*universal), Result(*square)])
    assert not any(reason.kind.startswith("gradient-free") for reason in found)


def test_an_attack_on_each_image_stays_under_suspicion_beside_one_that_learned_from_the_set(verdict: Verdict) -> None:
    def cut(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return model(images.detach(), rng)

    set_level, each = Universal(steps=4, batch=4), Pgd(steps=2, random_start=False)
    alone, _ = verdict(attack=set_level, defense=Around(call=cut))
    both, _ = verdict(attack=WorstOf(attacks=[set_level, each]), defense=Around(call=cut))
    assert alone.set_level
    assert alone.checks.attacked_survivors == 0
    assert not both.set_level
    assert both.checks.attacked_survivors == both.robust > 0


def test_a_corruption_is_one_column_and_the_worst_of_them_three() -> None:
    defense = Around(call=noisy)
    asked: Any = ["transfer", "whitebox", "adaptive"]
    assert attackers_of(defense, Corruption(), asked) == ["whitebox"]
    assert attackers_of(defense, Corruption(kind="worst"), asked)[0] == "transfer"
    assert len(attackers_of(defense, Universal(), asked)) > 1


def test_corruptions_are_scored_without_a_budget_check(verdict: Verdict) -> None:
    records = [verdict(attack=Corruption(), norm="corruption", eps=float(severity)) for severity in (0, 5)]
    assert records[0][0].robust == records[0][0].clean_correct
    assert records[1][0].checks.outside_budget == 0
    assert max(row.distance for row in records[1][1]) > 0.05
    assert records[1][0].cost.attack_backwards == 0


def test_a_dry_run_counts_the_cost_of_fitting() -> None:
    planned = PlannedCell(
        "linear", pictures(Linear()), NoDefense(), Universal(steps=4, images=10), "whitebox", "linf", 0.1, 0
    )
    assert planned.gradients() == (4 * COUNT + 4 * 10, 4 * 10)
