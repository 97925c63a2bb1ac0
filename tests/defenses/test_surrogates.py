"""An adaptive attacker keeps the best finding of all surrogates and of the bare model, however they mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.defenses.fashion import fashion_batch, fashion_classifier
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.training_free.anti_adversary import AntiAdversary
from vlmdefend.defenses.training_free.noise import Noise
from vlmdefend.evaluation.cell.attackers import Variant, craft, variants
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline, Threat


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(40)


def fooled(defense: Defense, classifier: ZeroShotClassifier, batch: Batch) -> int:
    attacks = dict.fromkeys(variants("adaptive", defense), Pgd())
    crafted = craft(
        "adaptive", attacks, defense, classifier, batch.images, batch.labels, Threat("linf", 8 / 255),
        ImageRng(0, batch.ids), 40,
    )  # fmt: skip
    with torch.no_grad():
        logits = defense.wrap(classifier)(crafted.images, ImageRng(0, batch.ids, "deployed")).logits
    return int((logits.argmax(dim=1) != batch.labels).sum())


@dataclass(frozen=True, kw_only=True)
class Misleading(Defense):
    """Its only surrogate has no gradient; the bare model's is what breaks it."""

    name: ClassVar[str] = "misleading"
    paradigm: ClassVar[Paradigm] = "training-free"
    recipe: ClassVar[Recipe] = Recipe("bare", bare=True)

    def wrap(self, model: Pipeline) -> Pipeline:
        class Cut:
            num_classes, stochastic = model.num_classes, False

            def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
                return Outputs(model(images.detach(), rng).logits)

        return Cut()


def test_an_adaptive_attacker_keeps_the_best_examples_of_surrogates_and_the_bare_model(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = Misleading()
    assert variants("adaptive", defense) == (Variant(), Variant(-1))
    assert variants("whitebox", defense) == (Variant(),)
    clean = int((classifier(batch.images).logits.argmax(dim=1) != batch.labels).sum())
    assert fooled(defense, classifier, batch) >= clean + 10


@dataclass(frozen=True, kw_only=True)
class Boasting(Defense):
    """A random pipeline whose second surrogate has no gradient and calls every image fooled, by far."""

    name: ClassVar[str] = "boasting"
    paradigm: ClassVar[Paradigm] = "training-free"
    stochastic: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe("two surrogates", surrogates=2)

    def wrap(self, model: Pipeline) -> Pipeline:
        return Noise(sigma=0.01).wrap(model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        class Boast:
            num_classes, stochastic = model.num_classes, True

            def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
                return Outputs(-1000 * model(images.detach(), rng).logits)

        return self.wrap(model), Boast()


def test_examples_against_a_random_pipeline_are_compared_under_the_first_surrogate(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    clean = int((classifier(batch.images).logits.argmax(dim=1) != batch.labels).sum())
    assert fooled(Boasting(), classifier, batch) >= clean + 10


def test_knowing_anti_adversary_finds_much_more_than_its_own_gradient_does(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = AntiAdversary()
    whitebox = dict.fromkeys(variants("whitebox", defense), Pgd())
    threat = Threat("linf", 8 / 255)
    found = craft(
        "whitebox", whitebox, defense, classifier, batch.images, batch.labels, threat, ImageRng(0, batch.ids), 40
    )
    with torch.no_grad():
        logits = defense.wrap(classifier)(found.images, ImageRng(0, batch.ids)).logits
    by_whitebox = int((logits.argmax(dim=1) != batch.labels).sum())
    assert fooled(defense, classifier, batch) >= by_whitebox + 5
