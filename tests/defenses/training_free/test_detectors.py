"""A detector is scored by what it turns away, clean images included, and attacked by someone who keeps quiet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmdefend
from tests.defenses.fashion import fashion_batch, fashion_classifier
from tests.defenses.linear import Linear
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.defenses.training_free.agreement import Agreement
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.attackers import craft, variants
from vlmdefend.evaluation.statistics.rejection import accuracy_against_rejection, rejection_text
from vlmdefend.evaluation.store.records import ImageRow
from vlmdefend.reporting.verdicts.verdict import verdict_rows
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


def row(number: int, *, right: bool, robust: bool, clean: float, adversarial: float) -> ImageRow:
    return ImageRow(
        id=str(number),
        label=0,
        clean_prediction=0 if right else 1,
        clean_margin=-1.0 if right else 1.0,
        adversarial_prediction=0 if robust else 1,
        adversarial_margin=-1.0 if robust else 1.0,
        distance=0.01,
        steps=10,
        clean_score=clean,
        adversarial_score=adversarial,
    )


ROWS = [
    row(0, right=True, robust=True, clean=0.1, adversarial=0.9),  # stays right: turned away or not, no harm
    row(1, right=True, robust=False, clean=0.2, adversarial=0.8),  # fooled, and conspicuous
    row(2, right=True, robust=False, clean=0.3, adversarial=0.15),  # fooled, and quiet
    row(3, right=True, robust=False, clean=0.9, adversarial=0.95),  # conspicuous even when clean
    row(4, right=False, robust=False, clean=0.4, adversarial=0.4),  # wrong anyway
]


def test_accuracy_against_rejection_counts_clean_images_turned_away_as_lost() -> None:
    nothing, one, two = accuracy_against_rejection(ROWS, (0.0, 0.2, 0.4))
    assert nothing.threshold == 0.9
    assert (nothing.rejected, nothing.accuracy, nothing.robust) == (0.0, 0.8, 0.4)  # 0; 3, caught above 0.9
    assert nothing.detected == pytest.approx(1 / 3)
    assert one.threshold == 0.4
    assert (one.rejected, one.accuracy, one.robust) == (pytest.approx(0.2), 0.6, 0.4)  # 3 is lost; 1 is caught
    assert one.detected == pytest.approx(2 / 3)
    assert two.threshold == 0.3
    assert (two.rejected, two.accuracy, two.robust) == (pytest.approx(0.4), 0.6, 0.4)  # 4 was wrong anyway


def test_rows_without_scores_have_no_curve() -> None:
    assert accuracy_against_rejection([r.model_copy(update={"clean_score": None}) for r in ROWS]) == []
    assert rejection_text([]) == ""


def test_the_score_is_one_minus_the_mean_cosine_to_the_changed_images() -> None:
    """Features are pixels: a checkerboard keeps its mean only under a narrow filter, and a wide one keeps it all."""
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2).float().expand(1, 3, 8, 8)
    model, streams = Linear(torch.randn(2, 192)), ImageRng(0, ["a"])
    narrow = Agreement(radius=0.01).wrap(model)(board, streams).detector_score
    wide = Agreement(radius=100.0).wrap(model)(board, streams).detector_score
    assert narrow is not None
    assert wide is not None
    assert narrow.item() == pytest.approx(1 - 0.5**0.5, abs=1e-4)  # cos(board, its mean) = 1 / sqrt(2)
    assert wide.item() == pytest.approx(0.0, abs=1e-4)
    even = Agreement(other="shifts", crops=0).wrap(model)(torch.full((1, 3, 8, 8), 0.5), streams).detector_score
    assert even is not None
    assert even.item() == pytest.approx(0.0, abs=1e-5)  # the flip of an even image is itself


def test_someone_who_knows_the_detector_fools_as_many_images_and_stays_quieter() -> None:
    batch, classifier = fashion_batch(40), fashion_classifier("tiny-rn")
    defense, threat = Agreement(), Threat("linf", 8 / 255)

    def attacked(attacker) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
        attacks = dict.fromkeys(variants(attacker, defense), Pgd())
        found = craft(
            attacker, attacks, defense, classifier, batch.images, batch.labels, threat, ImageRng(0, batch.ids), 40
        )
        with torch.no_grad():
            outputs = defense.wrap(classifier)(found.images, ImageRng(0, batch.ids))
        assert outputs.detector_score is not None
        return outputs.logits.argmax(dim=1) != batch.labels, outputs.detector_score

    unaware, loud = attacked("transfer")
    whitebox, plain = attacked("whitebox")  # leaves the image at the first iterate that fools, which is quieter
    aware, quiet = attacked("adaptive")
    assert aware.sum() >= max(unaware.sum(), whitebox.sum()) - 1  # they start at other random points
    assert quiet[aware & unaware].mean() < 0.8 * loud[aware & unaware].mean()
    assert quiet[aware & whitebox].mean() < 0.95 * plain[aware & whitebox].mean()


def test_scores_reach_the_rows_and_the_report(tmp_path: Path) -> None:
    found = vlmdefend.evaluate(tmp_path, defense="agreement", eps="8/255", limit=16, attacker="transfer", threads=1)
    ((record, rows),) = found.results
    assert all(row.clean_score is not None and row.adversarial_score is not None for row in rows)
    (line,) = verdict_rows([(record, rows)])
    assert any("rejecting 0 / 1 / 5 / 10 / 20 % of the clean images" in note for note in line.notes)


def test_a_score_that_only_steers_the_defense_is_not_reported(tmp_path: Path) -> None:
    found = vlmdefend.evaluate(tmp_path, defense="ttc", eps="8/255", limit=4, attacker="transfer", threads=1)
    assert all(row.clean_score is None for _, rows in found.results for row in rows)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError):
        Agreement(radius=0.0)
