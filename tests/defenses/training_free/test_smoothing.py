"""Randomized smoothing: the bound, the vote, what it certifies, and how a certificate reaches the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

import vlmdefend
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.defenses.training_free import randomized_smoothing
from vlmdefend.defenses.training_free.randomized_smoothing import RandomizedSmoothing, lower_bound
from vlmdefend.evaluation.store.records import ImageRow
from vlmdefend.reporting import render, verdict_rows
from vlmdefend.reporting.verdicts.certified import abstained, certified_curve, certified_text, mean_curve
from vlmdefend.rng import ImageRng
from vlmdefend.types import ABSTAINED, Outputs, Threat


class Halfspaces:
    """Class 1 where the first pixel is above 1/2, class 2 never: the distance to another prediction is known."""

    num_classes, stochastic = 3, False

    def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
        above = 20 * (images[:, 0, 0, 0] - 0.5)
        return Outputs(torch.stack([-above, above, torch.full_like(above, -1e4)], dim=1))


def images_at(first: torch.Tensor) -> tuple[torch.Tensor, ImageRng]:
    images = torch.full((len(first), 3, 2, 2), 0.5)
    images[:, 0, 0, 0] = first
    return images, ImageRng(0, [str(i) for i in range(len(first))])


@pytest.mark.parametrize("draws", [1, 2, 7, 100, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_the_bound_is_that_of_clopper_and_pearson_for_any_number_of_draws(draws: int, alpha: float) -> None:
    """At the bound, so many successes or more have probability alpha; without a success nothing is known."""
    counts = np.unique(np.array([0, 1, draws // 2, draws - 1, draws]))
    bound = lower_bound(counts, draws, alpha)
    assert bound[0] == 0
    assert binom.sf(counts[1:] - 1, draws, bound[1:]) == pytest.approx(alpha, rel=1e-6)
    assert bound[-1] == pytest.approx(alpha ** (1 / draws))


def test_radius_and_abstention_by_hand() -> None:
    defense = RandomizedSmoothing(sigma=0.5, draws=10, alpha=0.01)
    votes = torch.tensor([[10.0, 0, 0], [0, 10, 0], [6, 4, 0], [10, 0, 0]])
    silent, radius = defense.certify(torch.tensor([0, 1, 0, 1]), votes)
    most = 0.5 * norm.ppf(0.01**0.1)
    assert radius.tolist() == pytest.approx([most, most, 0.0, 0.0])
    assert silent.tolist() == [False, False, True, True]  # the last: the vote is not for the class that was selected


def test_so_few_draws_that_nothing_can_be_shown_always_abstain() -> None:
    """0.001^(1/9) = 0.46 < 1/2 < 0.50 = 0.001^(1/10)."""
    images, rng = images_at(torch.tensor([0.0, 1.0]))
    nine = RandomizedSmoothing(sigma=0.01, draws=9).wrap(Halfspaces())(images, rng)
    ten = RandomizedSmoothing(sigma=0.01, draws=10).wrap(Halfspaces())(images, rng)
    assert nine.predictions.tolist() == [ABSTAINED, ABSTAINED]
    assert nine.certified_radius.tolist() == [0, 0]
    assert ten.predictions.tolist() == [0, 1]


def test_the_radius_never_passes_the_distance_to_the_boundary_and_comes_close() -> None:
    """A linear classifier smoothed is itself, so the true radius is the distance; 100 bounds at alpha 0.001 hold.

    From a distance of 0.1 on, p is at least Phi(0.4) = 0.655, four standard errors above the 0.563 that 600 draws need.
    """
    first = torch.linspace(0.2, 0.8, 100)
    images, rng = images_at(first)
    defense = RandomizedSmoothing(sigma=0.25, draws=600, selection=300)
    outputs = defense.wrap(Halfspaces())(images, rng)
    distance = (first - 0.5).abs()
    answered = ~outputs.abstained
    assert answered[distance > 0.1].all()
    assert torch.equal(outputs.predictions[answered], (first > 0.5).long()[answered])
    assert (outputs.certified_radius <= distance).all()
    assert (distance - outputs.certified_radius)[answered].mean() < 0.05


def test_no_attack_within_the_certified_radius_succeeds() -> None:
    """Against the mean probability, whose winner here is the vote's."""
    images, rng = images_at(torch.linspace(0.0, 1.0, 20))
    defense = RandomizedSmoothing(sigma=0.25, draws=500)
    before = defense.wrap(Halfspaces())(images, rng)
    kept = (before.certified_radius > 0.02).nonzero()[:, 0]
    view = View(defense.surrogate(Halfspaces()), rng.select(kept), stop=False)
    labels, eps = before.predictions[kept], before.certified_radius[kept] * 0.9
    found = Pgd(steps=5)(view, images[kept], labels, Threat("l2", eps)).images
    moved = (found - images[kept]).flatten(1).norm(dim=1)
    assert (moved > 0.5 * eps).all()
    logits = defense.wrap(Halfspaces())(found, rng.select(kept)).logits
    assert torch.equal(logits.argmax(dim=1), labels)


def test_logits_are_vote_shares_and_the_mean_probability_decides_ties() -> None:
    images, rng = images_at(torch.tensor([0.5]))
    outputs = RandomizedSmoothing(sigma=0.1, draws=50).wrap(Halfspaces())(images, rng)
    shares = outputs.logits.exp()[0] * 51
    assert shares.sum() == pytest.approx(51, abs=1e-3)
    assert 10 < shares[0].item() < 41
    assert outputs.logits.isfinite().all()
    assert not outputs.logits.requires_grad


def test_draws_do_not_depend_on_the_batch_or_on_how_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images, rng = images_at(torch.linspace(0.4, 0.6, 5))
    pipeline = RandomizedSmoothing(sigma=0.1, draws=33, selection=3).wrap(Halfspaces())
    whole = pipeline(images, rng)
    alone = pipeline(images[3:4], ImageRng(0, ["3"]))
    monkeypatch.setattr(randomized_smoothing, "AT_ONCE", 12)
    parts = pipeline(images, ImageRng(0, list("01234")))
    assert torch.allclose(whole.logits, parts.logits, atol=1e-4)
    assert torch.allclose(whole.logits[3:4], alone.logits, atol=1e-4)
    assert not torch.allclose(pipeline(images, rng).logits, whole.logits, atol=1e-4)  # the streams went on


def test_the_attacker_climbs_the_log_of_the_mean_probability() -> None:
    images, rng = images_at(torch.tensor([0.55, 0.45]))
    defense = RandomizedSmoothing(sigma=0.1)
    pixels = images.clone().requires_grad_(True)
    logits = defense.surrogate(Halfspaces())(pixels, rng).logits
    noisy = defense.noisy(images, ImageRng(0, ["0", "1"]), defense.surrogate_draws)[:, :, 0, 0, 0]
    probability = torch.sigmoid(40 * (noisy - 0.5))
    assert torch.allclose(logits[:, 1].exp(), probability.mean(dim=1), atol=1e-5)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), pixels)
    slope = (40 * probability * (1 - probability)).mean(dim=1) / probability.mean(dim=1)
    assert torch.allclose(gradient[:, 0, 0, 0], slope, rtol=1e-3)
    assert gradient.count_nonzero() == 2


def row(number: int, *, right: bool, radius: float | None, silent: bool = False) -> ImageRow:
    prediction = ABSTAINED if silent else 0 if right else 1
    return ImageRow(
        id=str(number),
        label=0,
        clean_prediction=prediction,
        clean_margin=-1.0,
        adversarial_prediction=prediction,
        adversarial_margin=-1.0,
        distance=0.0,
        steps=0,
        certified_radius=radius,
    )


def test_the_curve_counts_what_is_right_and_certified() -> None:
    rows = [
        row(0, right=True, radius=0.3),
        row(1, right=True, radius=0.1),
        row(2, right=False, radius=0.9),
        row(3, right=True, radius=0.0, silent=True),
    ]
    curve = certified_curve(rows)
    assert curve == {0.0: 0.5, 0.05: 0.5, 0.1: 0.5, 0.15: 0.25, 0.2: 0.25, 0.25: 0.25, 0.5: 0.0}
    assert abstained(rows) == 0.25
    assert certified_curve([row(0, right=True, radius=None)]) == {}
    assert mean_curve([{0.0: 1.0, 0.05: 0.5}, {0.0: 0.5}]) == {0.0: 0.75, 0.05: 0.25}
    assert certified_text({0.0: 0.5, 0.05: 0.0}, 0.25) == (
        "certified accuracy by L2 radius: 0 50.0 %, 0.05 0.0 %; it abstains on 25.0 % of the clean images"
    )


def test_certificates_reach_rows_and_report_and_abstention_counts_as_wrong(tmp_path: Path) -> None:
    found = vlmdefend.evaluate(
        tmp_path,
        model="tiny-rn",
        defense="randomized_smoothing:sigma=0.25:draws=20",
        attack="fgsm",
        attacker=["transfer"],
        eps="4/255",
        limit=30,
        threads=1,
    )
    ((record, rows),) = found.results
    largest = 0.25 * norm.ppf(0.001 ** (1 / 20))
    assert all(row.certified_radius is not None and 0 <= row.certified_radius <= largest + 1e-6 for row in rows)
    silent = [row for row in rows if row.clean_prediction == ABSTAINED]
    assert silent
    assert all(row.certified_radius == 0 and not row.clean_correct and not row.robust for row in silent)
    assert all(row.certified_radius > 0 for row in rows if row not in silent)
    right = sum(row.clean_correct for row in rows)
    assert right == record.clean_correct > 0
    lines = verdict_rows(found.results)
    assert lines[0].certified[0.0] == pytest.approx(right / 30)
    assert lines[0].abstained == pytest.approx(len(silent) / 30)
    for format in ("terminal", "markdown"):
        text = " ".join(render(lines, format).replace("\\", "").split())
        assert f"certified accuracy by L2 radius: 0 {100 * right / 30:.1f} %" in text
