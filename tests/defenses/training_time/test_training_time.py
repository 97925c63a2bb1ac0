"""Each training-time objective against values worked out by hand on two images and three classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time._attack import ascend
from vlmdefend.defenses.training_time.base import Terms
from vlmdefend.defenses.training_time.tga_zsr import attention_map, map_distance
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

LN2, LN3 = log(2), log(3)
IMAGES = torch.full((2, 3, 4, 4), 0.5)
BATCH = Batch(["one", "two"], IMAGES, torch.tensor([0, 1]))

ADVERSARIAL = torch.tensor([[0.25, 0.5, 0.25], [0.125, 0.75, 0.125]])  # class probabilities
CLEAN = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
VANILLA = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])

FEATURES_ADVERSARIAL = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
FEATURES_CLEAN = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
FEATURES_VANILLA = torch.tensor([[4.0, 3.0], [2.0, 0.0]])

CLASSES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
# (2, 4, 2): what the towers say of 2 x 2 places; times the true class: the numbers that are not 0
PLACES_ADVERSARIAL = torch.tensor([[[0, 0], [1, 0], [2, 0], [4, 0]], [[0, 1], [0, 1], [0, 3], [0, 3]]]).float()
PLACES_CLEAN = torch.tensor([[[0, 0], [1, 0], [1, 0], [1, 0]], [[0, 1], [0, 1], [0, 3], [0, 3]]]).float()
PLACES_VANILLA = torch.tensor([[[0, 0], [1, 0], [1, 0], [1, 0]], [[0, 1], [0, 3], [0, 3], [0, 3]]]).float()


def is_clean(images: Tensor) -> bool:
    return torch.equal(images, IMAGES)


@dataclass
class Says:
    """A model whose answers are written down: of the clean images, and of any others."""

    clean: tuple[Tensor, Tensor, Tensor]
    adversarial: tuple[Tensor, Tensor, Tensor]
    class_features: Tensor = field(default_factory=lambda: CLASSES)

    def __call__(self, images: Tensor) -> Outputs:
        probabilities, features, _ = self.clean if is_clean(images) else self.adversarial
        return Outputs(probabilities.log(), features)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        return self(images), (self.clean if is_clean(images) else self.adversarial)[2]

    def attacked(self, images: Tensor) -> Tensor:
        raise AssertionError("no step of an attack was asked for")

    attacked_features = attacked


def terms(name: str, **options: Any) -> Terms:
    """At the random start of an attack without steps."""
    student = Says((CLEAN, FEATURES_CLEAN, PLACES_CLEAN), (ADVERSARIAL, FEATURES_ADVERSARIAL, PLACES_ADVERSARIAL))
    teacher = Says((VANILLA, FEATURES_VANILLA, PLACES_VANILLA), (VANILLA, FEATURES_VANILLA, PLACES_VANILLA))
    objective = OBJECTIVES.create(name, **({"eps": 8 / 255, "steps": 0} | options))
    return objective.losses(student, teacher, BATCH, ImageRng(0, BATCH.ids, "test"))


def check(found: Tensor, *expected: float) -> None:
    assert torch.allclose(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6), (found, expected)


CROSS_ENTROPY = (2 * LN2, 2 * LN2 - LN3)  # -ln 1/4, -ln 3/4


def test_tecoa_is_the_cross_entropy_at_the_adversarial_images() -> None:
    found = terms("tecoa")
    assert list(found.losses) == ["cross_entropy"]
    check(found.losses["cross_entropy"], *CROSS_ENTROPY)
    check(found.metrics["accuracy_adversarial"], 0.0, 1.0)


KL_ORIGINAL = (0.25 * LN2, 1.25 * LN2 - 0.25 * LN3)  # KL(vanilla || adversarial)
KL_CLEAN = (0.25 * LN2, 0.25 * LN2 + 0.5 * log(2 / 3) + 0.25 * LN2)  # KL(clean || adversarial)


@pytest.mark.parametrize(("options", "weight"), [({}, 1), ({"kl_reduction": "sum", "batch_size": 32}, 32)])
def test_pmg_aft_adds_two_divergences_and_as_a_sum_they_weigh_as_much_as_the_batch_has_images(
    options: dict[str, Any], weight: int
) -> None:
    found = terms("pmg-aft", **options).losses
    check(found["cross_entropy"], *CROSS_ENTROPY)
    check(found["kl_original"], *(weight * value for value in KL_ORIGINAL))
    check(found["kl_clean"], *(weight * value for value in KL_CLEAN))


def test_trades_is_the_clean_cross_entropy_and_six_times_the_divergence() -> None:
    found = terms("trades").losses
    check(found["cross_entropy"], LN2, LN2)
    check(found["divergence"], *(6 * value for value in KL_CLEAN))


def test_fare_is_the_squared_distance_of_the_unnormalised_features_summed_over_entries() -> None:
    found = terms("fare").losses
    check(found["distance"], (3 - 4) ** 2 + (4 - 3) ** 2, 2**2 + 2**2)


def test_sim_clip_in_code_is_half_a_cosine_to_the_vanilla_features() -> None:
    found = terms("sim-clip").losses
    check(found["cosine"], -0.5 * (3 * 4 + 4 * 3) / 25, 0.0)


def test_sim_clip_on_paper_is_half_a_cosine_twice_between_the_models_own_features() -> None:
    found = terms("sim-clip", variant="paper").losses
    for term in ("cosine_adversarial", "cosine_clean"):
        check(found[term], -0.5 * 3 / 5, -0.5 * 4 / 5)


def test_sim_clip_on_paper_sends_the_gradient_of_each_term_to_one_side_only() -> None:
    features = [FEATURES_CLEAN.clone().requires_grad_(), FEATURES_ADVERSARIAL.clone().requires_grad_()]
    student = Says((CLEAN, features[0], PLACES_CLEAN), (ADVERSARIAL, features[1], PLACES_ADVERSARIAL))
    objective = OBJECTIVES.create("sim-clip", steps=0, variant="paper")
    found = objective.losses(student, student, BATCH, ImageRng(0, BATCH.ids, "test")).losses
    for term, (wants, not_wants) in {"cosine_clean": features, "cosine_adversarial": features[::-1]}.items():
        gradients = torch.autograd.grad(found[term].sum(), [wants, not_wants], allow_unused=True, retain_graph=True)
        assert gradients[0] is not None
        assert gradients[1] is None


def test_agft_is_the_cross_entropy_to_the_softened_vanilla_predictions() -> None:
    found = terms("agft", softness=2.0).losses  # squares of (1/2, 1/4, 1/4), as shares: 4, 1, 1 of 6
    first = (4 * 2 * LN2 + 1 * LN2 + 1 * 2 * LN2) / 6
    second = (4 * 3 * LN2 + (2 * LN2 - LN3) + 3 * LN2) / 6
    check(found["cross_entropy"], first, second)


def test_hpt_gpd_is_the_divergence_of_target_and_proxy_in_either_direction() -> None:
    check(terms("hpt-gpd").losses["hpt"], *KL_ORIGINAL)
    turned = terms("hpt-gpd", direction="target-first", anchored=True).losses["ga"]
    check(turned, 0.25 * LN2, 0.75 * LN3 - 0.375 * LN2)  # -1/4 ln 2 + 1/2 ln 2; -1/8 ln 4 + 3/4 ln 3 - 1/8 ln 2


def test_an_attention_map_is_the_agreement_with_the_true_class_stretched_and_enlarged() -> None:
    found = attention_map(PLACES_ADVERSARIAL, CLASSES[:2], 2)
    assert torch.allclose(found, torch.tensor([[[0, 0.25], [0.5, 1]], [[0, 0], [1, 1]]]), atol=1e-6)
    larger = attention_map(PLACES_ADVERSARIAL, CLASSES[:2], 4)
    check(larger[1].mean(dim=1), 0.0, 0.25, 0.75, 1.0)  # bilinear, as images are enlarged


def test_token_norm_divides_each_entry_by_its_norm_over_the_tokens_as_the_authors_code_does() -> None:
    places = torch.tensor([[[3.0, 0.0], [4.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    plain, normed = (attention_map(places, torch.tensor([[0.6, 0.8]]), 2, token_norm=on) for on in (False, True))
    check(plain.flatten(), 1.8 / 2.4, 1.0, 1.6 / 2.4, 0.0)
    check(normed.flatten(), 0.6 * 3 / 5 / 0.8, 0.6 * 4 / 5 / 0.8, 1.0, 0.0)


def test_tga_zsr_adds_the_distances_of_two_attention_maps_to_the_vanilla_one_scaled_to_224_pixels() -> None:
    def distance(first: Tensor, second: Tensor) -> Tensor:
        """Of 4 x 4 maps, written out."""
        maps = [attention_map(places, CLASSES[:2], 4) for places in (first, second)]
        return torch.stack([sum(((a - b) ** 2).flatten()).sqrt() * 56 for a, b in zip(*maps, strict=True)])

    found = terms("tga-zsr").losses
    check(found["cross_entropy"], *CROSS_ENTROPY)
    check(found["attention_adversarial"], *(0.08 * distance(PLACES_ADVERSARIAL, PLACES_VANILLA)).tolist())
    clean = 0.05 * distance(PLACES_CLEAN, PLACES_VANILLA)
    assert clean[0] == 0
    assert clean[1] > 0
    check(found["attention_clean"], *clean.tolist())


def test_the_distance_of_two_maps_is_euclidean_and_has_a_gradient_of_zero_where_they_are_one() -> None:
    first, second = torch.zeros(2, 2, 2, requires_grad=True), torch.zeros(2, 2, 2)
    second[1] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    found = map_distance(first, second)
    check(found.detach(), 0.0, sqrt(3) * 112)
    (gradient,) = torch.autograd.grad(found.sum(), first)
    assert gradient.isfinite().all()
    assert gradient[0].abs().max() == 0


def test_a_map_that_is_the_same_everywhere_is_zero_and_not_a_division_by_zero() -> None:
    places = torch.ones(1, 4, 2, requires_grad=True)
    found = attention_map(places, CLASSES[:1], 4)
    assert found.abs().max() == 0
    (gradient,) = torch.autograd.grad(found.sum(), places)
    assert gradient.isfinite().all()


# as published


@pytest.mark.parametrize(
    ("name", "optimizer", "rate", "decay", "batch", "epochs", "warm_up", "levels", "steps"),
    [
        ("tecoa", "sgd", 1e-5, 0.0, 256, 10, 1000, 1, 2),
        ("pmg-aft", "sgd", 5e-5, 0.0, 256, 10, 1000, 1, 2),
        ("tga-zsr", "sgd", 1e-4, 0.0, 128, 10, 1000, 1, 2),
        ("at", "sgd", 1e-4, 0.0, 128, 10, 1000, 1, 2),
        ("agft", "sgd", 4e-4, 0.0, 128, 10, 1000, 1, 2),
        ("fare", "adamw", 1e-5, 1e-4, 128, 2, 1400, 4, 10),
        ("sim-clip", "adamw", 1e-5, 1e-5, 64, 1, 1400, 4, 10),
        ("adv-lora", "adamw", 2e-4, 1e-2, 32, 16, 0, 1, 2),
    ],
)
def test_schedules_are_those_of_the_published_runs(
    name: str, optimizer: str, rate: float, decay: float, batch: int, epochs: int, warm_up: int, levels: int, steps: int
) -> None:
    cls = OBJECTIVES.get(name)
    found = cls.schedule
    assert found is not None
    assert (found.optimizer, found.rate, found.weight_decay) == (optimizer, rate, decay)
    assert (found.batch_size, found.epochs, found.warm_up) == (batch, epochs, warm_up)
    options: Any = cls()
    assert (options.eps * 255, options.alpha * 255, options.steps) == pytest.approx((levels, 1, steps))


# the attack


def test_each_step_goes_along_the_sign_of_the_present_gradient_as_fares_signed_again_momentum_does() -> None:
    """The gradients of two pixels are given; 0.9 times a sign, and a sign added, has the sign of the latter."""
    pixel, given = torch.full((1, 3, 1, 2), 0.5), iter([(2.0, -8.0), (0.5, -1.0), (-1.0, -1.0)])

    def loss(images: Tensor) -> Tensor:
        return (images * torch.tensor(next(given))).sum()

    found = ascend(loss, pixel, ImageRng(0, ["a"]), eps=0.4, steps=3, alpha=0.1, start=0.0)
    check(found[0, 0, 0], 0.5 + 0.1 + 0.1 - 0.1, 0.5 - 0.3)


@pytest.mark.parametrize("name", ["tecoa", "fare", "pmg-aft", "trades", "tga-zsr", "sim-clip", "agft"])
def test_a_negative_number_of_steps_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: steps=-1 must be zero or more"):
        OBJECTIVES.create(name, steps=-1)
