"""Each counter-attack is its formula, costs what it says, and is attacked through all its stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import vlmdefend
from tests.defenses.linear import Linear
from vlmdefend.attacks.pgd import Pgd
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.base import Defense, Paradigm, Recipe
from vlmdefend.defenses.training_free._counter_attack import ascent_sign, pixel_gradient
from vlmdefend.defenses.training_free.anti_adversary import AntiAdversary
from vlmdefend.defenses.training_free.csr import Csr
from vlmdefend.defenses.training_free.et3 import Et3
from vlmdefend.defenses.training_free.hedge import Hedge
from vlmdefend.defenses.training_free.low_pass import LowPass
from vlmdefend.defenses.training_free.noise import Noise
from vlmdefend.defenses.training_free.ttc import Ttc
from vlmdefend.errors import UserError
from vlmdefend.evaluation.attackers import Variant, craft, variants
from vlmdefend.evaluation.counting import Counted
from vlmdefend.models.zero_shot import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs, Pipeline, Threat

RNG_IDS = list("abcd")


def rng() -> ImageRng:
    return ImageRng(0, RNG_IDS)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Away from 0 and 1, so that no clamp interferes."""
    return 0.3 + 0.4 * torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(2, 48, generator=torch.Generator().manual_seed(1))


def test_anti_adversary_steps_towards_the_models_own_answer(images: torch.Tensor, weights: torch.Tensor) -> None:
    model = Linear(weights)
    said = model(images).logits.argmax(dim=1)
    direction = (weights[said] - weights[1 - said]).sign().view_as(images)  # of -CE for two classes
    model.std = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    seen = AntiAdversary(steps=2, alpha=0.01).counter(model, images, rng(), "cut").images
    assert torch.allclose(seen, images + 2 * 0.01 * model.std * direction, atol=1e-6)


def test_anti_adversary_may_leave_the_unit_interval_unless_told_not_to(weights: torch.Tensor) -> None:
    black = torch.zeros(4, 3, 4, 4)
    assert AntiAdversary().counter(Linear(weights), black, rng(), "cut").images.min() < 0
    assert AntiAdversary(clip=True).counter(Linear(weights), black, rng(), "cut").images.min() == 0


def test_anti_adversary_says_what_to_do_where_the_normalisation_is_unknown(images: torch.Tensor) -> None:
    model = Linear(torch.randn(2, 48))
    model.std = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="normalized=False"):
        AntiAdversary().counter(model, images, rng(), "cut")
    AntiAdversary(normalized=False).counter(model, images, rng(), "cut")


def test_hedge_ends_in_the_corner_that_raises_the_sum_of_cross_entropies(images: torch.Tensor) -> None:
    """Logits (s, -s): the sum is 2 log(2 cosh s), which grows with |s|."""
    row = torch.randn(48, generator=torch.Generator().manual_seed(2)).abs()  # s > 0 on every image
    seen = Hedge(eps=0.02, alpha=0.005, steps=20).counter(Linear(torch.stack([row, -row])), images, rng(), "cut").images
    assert torch.allclose(seen, images + 0.02, atol=1e-6)


def test_hedge_is_attacked_where_its_steps_start(images: torch.Tensor, weights: torch.Tensor) -> None:
    model, defense, pixels = Linear(weights, bend=True), Hedge(eps=0.02, steps=3), images.clone().requires_grad_(True)
    (stand_in,) = defense.surrogates(model)
    (found,) = torch.autograd.grad(stand_in(pixels, rng()).logits[:, 0].sum(), pixels)
    at = 3 * (images + rng().uniform((3, 4, 4), -0.02, 0.02)).flatten(1)
    assert torch.allclose(found.flatten(1), 3 * (1 - at.tanh() ** 2) * weights[0], atol=1e-5)
    with torch.no_grad():
        assert torch.equal(stand_in(images, rng()).logits, defense.wrap(model)(images, rng()).logits)


@pytest.mark.parametrize("threshold", [0.0, torch.inf])
def test_ttc_weighs_its_steps_where_tau_is_low_and_adds_noise_only_elsewhere(
    images: torch.Tensor, weights: torch.Tensor, threshold: float
) -> None:
    """Features are pixels, so the ascent on |delta|^2 steps along sign(delta_0)."""
    eps, alpha = 4 / 255, 1 / 255
    start = rng().uniform((3, 4, 4), -eps, eps)
    first = (start + alpha * start.sign()).clamp(-eps, eps)
    second = (first + alpha * start.sign()).clamp(-eps, eps)
    e = torch.e
    countered = (start + e**2 * first + e**4 * second) / (1 + e**2 + e**4)
    found = Ttc(threshold=threshold).counter(Linear(weights), images, rng(), "cut")
    assert torch.allclose(found.images - images, countered if threshold else start, atol=1e-6)
    tau = start.flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)
    if not threshold:
        assert found.detector_score is not None
        assert torch.allclose(found.detector_score, -tau, atol=1e-5)


def test_ttc_decides_image_by_image(images: torch.Tensor, weights: torch.Tensor) -> None:
    noise = rng().uniform((3, 4, 4), -4 / 255, 4 / 255).flatten(1).norm(dim=1)
    tau = noise / images.flatten(1).norm(dim=1)
    middle = tau.sort().values[1:3].mean().item()
    seen = Ttc(threshold=middle).counter(Linear(weights), images, rng(), "cut").images
    only_noise = Ttc(threshold=0.0).counter(Linear(weights), images, rng(), "cut").images
    same = [torch.allclose(a, b) for a, b in zip(seen, only_noise, strict=True)]
    assert same == (tau >= middle).tolist()
    assert sum(same) == 2


def test_ttc_costs_two_gradients_and_two_forwards(images: torch.Tensor, weights: torch.Tensor) -> None:
    model = Counted(Linear(weights))
    with torch.no_grad():
        Ttc().wrap(model)(images, rng())
    assert (model.forwards, model.backwards) == (4 * 4, 2 * 4)


def test_csr_steps_from_the_image_towards_its_low_pass_version(images: torch.Tensor, weights: torch.Tensor) -> None:
    """d/dx cos(x, l) - cos(x, x_0) at x_0 is the part of l / |l| that is orthogonal to x_0."""
    defense = Csr(threshold=1.0, alpha=0.001, steps=1, radius=0.2)
    smooth = F.normalize(LowPass(radius=0.2).filter(images).flatten(1), dim=1)
    own = F.normalize(images.flatten(1), dim=1)
    direction = (smooth - own) - ((smooth - own) * own).sum(dim=1, keepdim=True) * own
    seen = defense.counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(seen, images + 0.001 * direction.sign().view_as(images), atol=1e-6)


def test_csr_leaves_alone_what_agrees_and_pays_nothing_for_it(images: torch.Tensor, weights: torch.Tensor) -> None:
    agreement = F.cosine_similarity(images.flatten(1), LowPass(radius=0.2).filter(images).flatten(1))
    middle = agreement.sort().values[1:3].mean().item()
    model = Counted(Linear(weights))
    found = Csr(threshold=middle, radius=0.2).counter(model, images, rng(), "cut")
    changed = (found.images != images).flatten(1).any(dim=1)
    assert torch.equal(changed, agreement < middle)
    assert (model.forwards, model.backwards) == (2 * 4 + 4 * 2, 3 * 2)
    assert (found.images - images).abs().max() <= 4 / 255 + 1e-6


def test_csr_keeps_the_best_image_on_the_way(images: torch.Tensor, weights: torch.Tensor) -> None:
    """Steps far too long overshoot; one more step must never leave it with less than it had."""
    smooth = F.normalize(LowPass(radius=0.2).filter(images).flatten(1), dim=1)
    own = F.normalize(images.flatten(1), dim=1)

    def gain(steps: int) -> torch.Tensor:
        defense = Csr(threshold=1.0, eps=1.0, alpha=0.4, steps=steps, radius=0.2)
        seen = defense.counter(Linear(weights), images, rng(), "cut").images
        return (F.normalize(seen.flatten(1), dim=1) * (smooth - own)).sum(dim=1)

    gains = torch.stack([gain(steps) for steps in range(6)])
    assert (gains.diff(dim=0) >= -1e-6).all()
    assert (gains[-1] == gains[-2]).any()  # a last step that was not worth keeping


def test_et3_is_one_normalised_step_down_the_energy(images: torch.Tensor, weights: torch.Tensor) -> None:
    gradient = F.normalize(torch.softmax(images.flatten(1) @ weights.T, dim=1) @ weights, dim=1).view_as(images)
    unscaled = Et3(alpha=0.1, steps=1, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(unscaled, images + 0.1 * gradient, atol=1e-6)
    scaled = Et3(alpha=0.1, steps=1).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose(scaled, images + 0.1 * 4 / 224 * gradient, atol=1e-6)


def test_et3_stays_in_its_ball(images: torch.Tensor, weights: torch.Tensor) -> None:
    seen = Et3(alpha=0.1, radius=0.15, steps=5, scaled=False).counter(Linear(weights), images, rng(), "cut").images
    assert torch.allclose((seen - images).flatten(1).norm(dim=1), torch.full((4,), 0.15), atol=1e-5)


def test_unrolled_et3_has_the_gradient_of_finite_differences_and_the_deployed_one_has_not() -> None:
    generator = torch.Generator().manual_seed(3)
    model = Linear(torch.randn(3, 48, generator=generator).double(), bend=True)
    image = (0.3 + 0.4 * torch.rand(1, 3, 4, 4, generator=generator)).double()
    defense = Et3(alpha=0.2, radius=10.0, steps=2, scaled=False)

    def value(pipeline: Pipeline, at: torch.Tensor) -> torch.Tensor:
        return pipeline(at, ImageRng(0, ["a"])).logits[:, 0].sum()

    direction = torch.randn(image.shape, generator=generator).double()
    deployed = defense.wrap(model)
    slope = (value(deployed, image + 1e-5 * direction) - value(deployed, image - 1e-5 * direction)) / 2e-5
    constant, unrolled = (
        (torch.autograd.grad(value(pipeline, pixels), pixels)[0] * direction).sum()
        for pipeline in defense.surrogates(model)
        for pixels in [image.clone().requires_grad_(True)]
    )
    assert torch.allclose(unrolled, slope, rtol=1e-4)
    assert not torch.allclose(constant, slope, rtol=0.05)


def test_the_sign_of_an_unrolled_step_has_a_slope() -> None:
    values = torch.tensor([[-2.0, 0.0, 1.0, 1.0]], requires_grad=True)  # mean magnitude 1
    signs = ascent_sign(values)
    assert signs.tolist() == [[-1.0, 0.0, 1.0, 1.0]]
    (slope,) = torch.autograd.grad(signs.sum(), values)
    assert torch.allclose(slope, torch.tensor([[1 / 9, 1.0, 1 / 4, 1 / 4]]))  # 1 / (1 + |g|)^2


def test_the_inner_gradient_is_found_under_no_grad_and_leaves_no_graph_behind() -> None:
    at = torch.tensor([[2.0, 3.0]])
    with torch.no_grad():
        gradient, values = pixel_gradient(lambda x: x.square().sum(dim=1), at, unrolled=True)
    assert gradient.tolist() == [[4.0, 6.0]]
    assert values.tolist() == [13.0]
    assert not gradient.requires_grad
    assert not values.requires_grad
    assert not at.requires_grad


@dataclass(frozen=True, kw_only=True)
class Misleading(Defense):
    """Its only stand-in has no gradient; the bare model's is what breaks it."""

    name: ClassVar[str] = "misleading"
    paradigm: ClassVar[Paradigm] = "training-free"
    recipe: ClassVar[Recipe] = Recipe("bare", bare=True)

    def wrap(self, model: Pipeline) -> Pipeline:
        class Cut:
            num_classes, stochastic = model.num_classes, False

            def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
                return Outputs(model(images.detach(), rng).logits)

        return Cut()


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    names = vlmdefend.load_dataset("fashion", limit=1).class_names
    return vlmdefend.load_model("tiny-vit", device="cpu").zero_shot(names, ["a photo of a {c}."])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return load_batch(vlmdefend.load_dataset("fashion", limit=40), range(40), PixelTransform(32), skip_bad=False)[0]


def fooled(defense: Defense, classifier: ZeroShotClassifier, batch: Batch) -> int:
    attacks = dict.fromkeys(variants("adaptive", defense), Pgd())
    crafted = craft(
        "adaptive", attacks, defense, classifier, batch.images, batch.labels, Threat("linf", 8 / 255),
        ImageRng(0, batch.ids), 40,
    )  # fmt: skip
    with torch.no_grad():
        logits = defense.wrap(classifier)(crafted.images, ImageRng(0, batch.ids, "deployed")).logits
    return int((logits.argmax(dim=1) != batch.labels).sum())


def test_an_adaptive_attacker_keeps_the_best_of_stand_ins_and_the_bare_models_examples(
    classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense = Misleading()
    assert variants("adaptive", defense) == (Variant(), Variant(-1))
    assert variants("whitebox", defense) == (Variant(),)
    clean = int((classifier(batch.images).logits.argmax(dim=1) != batch.labels).sum())
    assert fooled(defense, classifier, batch) >= clean + 10


@dataclass(frozen=True, kw_only=True)
class Boasting(Defense):
    """A random pipeline whose second stand-in has no gradient and calls every image fooled, by far."""

    name: ClassVar[str] = "boasting"
    paradigm: ClassVar[Paradigm] = "training-free"
    stochastic: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe("two stand-ins", surrogates=2)

    def wrap(self, model: Pipeline) -> Pipeline:
        return Noise(sigma=0.01).wrap(model)

    def surrogates(self, model: Pipeline) -> tuple[Pipeline, ...]:
        class Boast:
            num_classes, stochastic = model.num_classes, True

            def __call__(self, images: torch.Tensor, rng: ImageRng) -> Outputs:
                return Outputs(-1000 * model(images.detach(), rng).logits)

        return self.wrap(model), Boast()


def test_findings_against_a_random_pipeline_are_compared_by_the_first_stand_in(
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: AntiAdversary(steps=-1),
        lambda: Hedge(eps=-0.1),
        lambda: Ttc(steps=0),
        lambda: Csr(radius=0.0),
        lambda: Et3(temperature=0.0),
    ],
)
def test_impossible_settings_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError):
        make()
