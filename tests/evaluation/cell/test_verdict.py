"""A cell checks what the attack and the defense return instead of relying on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.evaluation.conftest import COUNT, Around, Notes, Random, Verdict
from vlmdefend.attacks.base import Attack, AttackResult
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.none import NoAttack
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Pipeline, Threat

pytestmark = pytest.mark.numerics

EPS = 8 / 255


@dataclass(frozen=True, kw_only=True)
class Returns(Attack):
    """Whatever ``make`` makes of the images."""

    name: ClassVar[str] = "returns"
    make: Any

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        result: Tensor = self.make(images)
        return result


@dataclass(frozen=True, kw_only=True)
class Lawless(Returns):
    """The same, past the contract that holds every attack to its budget."""

    def __call__(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> AttackResult:  # type: ignore[misc]
        found = self.make(images)
        everything = torch.ones(len(images))
        return AttackResult(found, everything.bool(), everything, everything.long(), 0)


def test_an_image_that_is_wrong_without_an_attack_is_neither_attacked_nor_robust(verdict: Verdict) -> None:
    seen = []
    record, rows = verdict(attack=Returns(make=lambda images: seen.append(len(images)) or images))
    wrong = [row for row in rows if not row.clean_correct]
    assert len(wrong) == COUNT // 4
    assert not any(row.robust for row in wrong)
    assert all(row.distance == 0 and row.steps == 0 for row in wrong)
    assert sum(seen) == record.cost.attack_images == record.clean_correct == COUNT - len(wrong)


def test_an_attack_that_chances_on_the_label_of_a_wrong_image_makes_it_no_robust_one(verdict: Verdict) -> None:
    """Robust is clean-correct and adversarial-correct."""
    flips = Around(call=lambda model, images, rng: Outputs(model(images, rng).logits))
    record, rows = verdict(defense=flips, attack=NoAttack())
    assert record.robust == record.clean_correct == sum(row.clean_correct for row in rows)


def test_pgd_breaks_some_images_inside_the_ball_and_the_rows_add_up(verdict: Verdict) -> None:
    record, rows = verdict()
    assert record.robust < record.clean_correct
    assert (record.n, record.robust) == (len(rows), sum(row.robust for row in rows))
    assert all(row.distance <= EPS + 1e-6 for row in rows)
    assert [row.id for row in rows] == [f"image-{i:02d}" for i in range(COUNT)]
    assert record.checks.outside_budget == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_that_leaves_the_ball_is_counted_and_put_back(norm: str, verdict: Verdict) -> None:
    record, rows = verdict(attack=Returns(make=lambda images: 1 - images), norm=norm)
    assert record.checks.outside_budget == record.clean_correct
    assert all(row.distance <= EPS + 1e-6 for row in rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda images: 1 - images,
        lambda images: images + 1.01 * EPS,
        lambda images: images.mul_(0),  # in place: the evaluator's own images must not be the ones it changes
        lambda images: images * torch.nan,
        lambda images: images - 2,
    ],
    ids=["far away", "just outside", "in place", "nan", "below zero"],
)
def test_images_outside_the_ball_that_get_past_the_contract_break_nothing(make: Any, verdict: Verdict) -> None:
    record, rows = verdict(attack=Lawless(make=make))
    assert record.checks.outside_budget == record.clean_correct
    assert record.robust == record.clean_correct
    assert all(row.distance == 0 for row in rows)


def test_an_attack_that_changes_its_input_in_place_is_caught(verdict: Verdict) -> None:
    record, _ = verdict(attack=Returns(make=lambda images: images.mul_(0)))
    assert record.checks.outside_budget == record.clean_correct


def test_what_an_attack_claims_is_not_believed(verdict: Verdict) -> None:
    record, rows = verdict(attack=Lawless(make=lambda images: images.clone()))  # "all fooled"
    assert record.robust == record.clean_correct
    assert all(row.adversarial_prediction == row.clean_prediction for row in rows)


def test_nothing_moves_at_radius_zero(verdict: Verdict) -> None:
    record, rows = verdict(eps=0.0)
    assert record.robust == record.clean_correct
    assert all(row.distance == 0 for row in rows)


def test_the_deployed_pipeline_is_what_is_scored(verdict: Verdict) -> None:
    """A defense that always says class 0 is right on the images of class 0, attacked or not."""

    def first(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return Outputs(model(images, rng).logits * 0 + torch.tensor([1.0, 0.0, 0.0]))

    for attacker in ("transfer", "whitebox", "adaptive"):
        record, rows = verdict(defense=Around(call=first), attacker=attacker)
        assert record.robust == record.clean_correct == sum(row.label == 0 for row in rows)


# randomness


def noisy(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
    return model(images + 0.2 * rng.normal(images.shape[1:]), rng)


def test_a_random_defense_gives_the_same_rows_for_the_same_seed_and_others_for_another(verdict: Verdict) -> None:
    rows = [verdict(defense=Random(call=noisy), seed=seed)[1] for seed in (1, 1, 2)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_a_random_defense_does_not_depend_on_the_batch_size(verdict: Verdict) -> None:
    one, other = (
        verdict(defense=Random(call=noisy), attack=NoAttack(), batch_size=b, shard_size=2 * b)[1] for b in (2, 5)
    )
    assert [row.clean_prediction for row in one] == [row.clean_prediction for row in other]


def test_clean_and_adversarial_images_meet_the_same_draws(verdict: Verdict) -> None:
    _, rows = verdict(defense=Random(call=noisy), attack=NoAttack())
    assert all(row.clean_margin == row.adversarial_margin for row in rows)


# what a pipeline does wrong


def test_a_pipeline_that_draws_and_says_it_does_not_is_noticed(verdict: Verdict) -> None:
    def secretly(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return model(images + torch.rand_like(images), rng)

    record, _ = verdict(defense=Around(call=secretly), attack=NoAttack())
    assert record.checks.forwards_differ
    honest, _ = verdict(attack=NoAttack())
    assert not honest.checks.forwards_differ
    assert not honest.checks.batch_dependent


def test_a_prediction_that_changes_with_the_batch_mates_is_noticed(verdict: Verdict) -> None:
    def centred(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        return model(images - images.mean(dim=0), rng)

    record, _ = verdict(defense=Around(call=centred), attack=NoAttack())
    assert record.checks.batch_dependent


def test_what_a_rounding_makes_of_another_batch_size_is_not_taken_for_mates(verdict: Verdict) -> None:
    """A batch of one differs in the last bits; a JPEG behind a sign step turns them into a hundredth of a logit."""

    def rounded(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        outputs = model(images, rng)
        return outputs._replace(
            logits=outputs.logits + 0.05 * torch.eye(1, outputs.logits.shape[1]) * (len(images) == 1)
        )

    record, _ = verdict(defense=Around(call=rounded), attack=NoAttack())
    assert not record.checks.batch_dependent


def test_logits_that_are_not_numbers_are_one_sentence_with_the_image(verdict: Verdict) -> None:
    def sometimes(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        logits = model(images, rng).logits
        logits[[name == opaque("image-06") for name in rng.names]] = torch.nan
        return Outputs(logits)

    with pytest.raises(UserError, match="logits for image 'image-06' are not finite") as raised:
        verdict(defense=Around(call=sometimes), attack=NoAttack())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("attacker", ["whitebox", "adaptive"])
def test_a_defense_with_logits_that_are_not_numbers_under_attack_is_not_called_robust(
    attacker: str, value: float, verdict: Verdict
) -> None:
    """Images of whole 8-bit levels get an answer, others do not: every attack would fail blindly."""

    def evasive(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        levels = images.detach() * 255
        attacked = (levels - levels.round()).abs().flatten(1).amax(dim=1) > 1e-3
        return Outputs(torch.where(attacked[:, None], value, model(images, rng).logits))

    with pytest.raises(UserError, match=r"not finite.*its failures prove nothing") as raised:
        verdict(defense=Around(call=evasive), attacker=attacker)
    assert "\n" not in str(raised.value)


def test_a_gradient_that_is_not_a_number_counts_as_a_masked_one(verdict: Verdict) -> None:
    """No step moves along it, so an image that survives it was not attacked."""

    def cusp(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        logits = model(images, rng).logits
        return Outputs(logits + (images - images).sum((1, 2, 3)).abs().sqrt()[:, None])

    checks = verdict(defense=Around(call=cusp), attack=Pgd(steps=3))[0].checks
    assert checks.zero_gradients == checks.gradient_values > 0


# memory and bad images


def too_large(limit: int) -> Any:
    def call(model: Pipeline, images: Tensor, rng: ImageRng) -> Outputs:
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(images, rng)

    return Around(call=call)


def test_out_of_memory_halves_the_batch_until_it_fits_and_counts_no_image_twice(
    verdict: Verdict, progress: Notes
) -> None:
    record, rows = verdict(defense=too_large(2), batch_size=8, shard_size=16)
    assert progress.notes == [f"out of memory: the batch is halved to {b} images" for b in (4, 2)]
    assert progress.images == record.n == COUNT
    expected, fitting = verdict(defense=too_large(2), batch_size=2, shard_size=16)
    assert [row.robust for row in rows] == [row.robust for row in fitting]
    assert record.cost.clean_forwards == expected.cost.clean_forwards == COUNT


def test_an_image_that_does_not_fit_alone_is_one_sentence(verdict: Verdict) -> None:
    with pytest.raises(UserError, match="a single image does not fit into memory"):
        verdict(defense=too_large(0))


def test_a_bad_image_stops_the_cell_unless_it_may_be_skipped(verdict: Verdict) -> None:
    with pytest.raises(UserError, match="image-05: broken"):
        verdict(bad=(5, 9))
    record, rows = verdict(bad=(5, 9), skip_bad=True)
    assert [s.id for s in record.skipped] == ["image-05", "image-09"]
    assert record.n == len(rows) == COUNT - 2


def test_a_shard_of_bad_images_only_is_passed_over_and_a_set_of_them_is_refused(verdict: Verdict) -> None:
    record, _ = verdict(bad=tuple(range(8)), skip_bad=True)
    assert record.n == COUNT - 8
    with pytest.raises(UserError, match="no image was left to evaluate"):
        verdict(bad=tuple(range(COUNT)), skip_bad=True)
