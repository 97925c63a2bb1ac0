"""TTP detects by a fixed border, tunes one border for each suspect image, and forgets it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmdefend
from tests.defenses.fashion import Blind, fashion_batch, fashion_classifier, fingerprint, streams
from tests.defenses.linear import Linear
from vlmdefend.defenses.test_time import ttp
from vlmdefend.defenses.test_time.ttp import Ttp
from vlmdefend.defenses.views.border import framed
from vlmdefend.defenses.views.crops import augmented_views
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

VIEWS = 20
ALL = {"threshold": 1.0, "views": VIEWS}  # everything is suspect


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-rn")


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(6)


def test_a_frame_surrounds_the_shrunk_image() -> None:
    images = torch.full((2, 3, 9, 9), 0.5)
    found = framed(images, torch.tensor(1.0), 1.0)  # a third of the side is left
    expected = torch.ones(2, 3, 9, 9)
    expected[..., 3:6, 3:6] = 0.5
    assert torch.allclose(found, expected, atol=1e-6)
    noisy = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(framed(noisy, torch.tensor(1.0), 0.0), noisy, atol=1e-6)


def test_an_image_is_suspect_where_a_fixed_border_moves_its_embedding() -> None:
    """Features are pixels. Dark in the middle and bright outside: a black border changes everything."""
    images = torch.zeros(3, 3, 9, 9)
    images[0, :, 3:6, 3:6] = 1.0
    images[1] = 1.0
    images[2, :, 0] = 1.0
    fixed = framed(images, torch.tensor(0.0), 0.25)
    cosine = F.cosine_similarity(images.flatten(1), fixed.flatten(1))
    model = CountingModel(Linear(torch.randn(2, 243, generator=torch.Generator().manual_seed(0))))
    middle = cosine.sort().values[:2].mean().item()
    with torch.no_grad():
        found = Ttp(threshold=middle, border=0.25, views=10).wrap(model)(images, ImageRng(0, ["a", "b", "c"]))
    assert found.detector_score is not None
    assert torch.allclose(found.detector_score, middle - cosine, atol=1e-6)
    changed = (found.logits != model(images, ImageRng(0, ["a", "b", "c"])).logits).any(dim=1)
    assert changed.tolist() == (cosine <= middle).tolist()
    assert changed.sum() == 1
    assert model.forwards == 2 * 3 + (10 + 1 + 10) + 3  # detect; choose, tune on one, average; the line above
    assert model.backwards == 1


def test_the_border_that_detects_may_be_white() -> None:
    images = torch.ones(1, 3, 9, 9)
    for shade, suspect in (("black", True), ("white", False)):
        found = Ttp(shade=shade, threshold=0.9, border=0.25, views=4).wrap(Linear(torch.randn(2, 243)))(  # type: ignore[arg-type]
            images, ImageRng(0, ["a"])
        )
        assert found.detector_score is not None
        assert bool(found.detector_score > 0) == suspect


def test_weights_by_hand() -> None:
    """z(pad x) = (1, 0), z(x) = (0, 1): exponents are the first less the second entry of each unit vector."""
    padded, own = torch.tensor([[[2.0, 0.0], [0.6, 0.8], [0.0, 5.0]]]), torch.tensor([[0.0, 3.0]])
    found = Ttp().weights(padded, own)[0]
    parts = [math.e, math.exp(-0.2), math.exp(-1)]
    assert found.tolist() == pytest.approx([part / sum(parts) for part in parts], rel=1e-5)


def one_by_one(model: ZeroShotClassifier, batch: Batch, image: int, defense: Ttp) -> Tensor:
    """One image with a parameter and an optimizer of torch's, in levels of 256."""
    one = slice(image, image + 1)
    draws, pixels = streams(batch, one), batch.images[one]
    views = augmented_views(pixels, draws, defense.views)[0]
    levels = torch.nn.Parameter(255 * draws.uniform((3, 32, 32), 0.0, 10 / 255)[0])
    kind = torch.optim.Adam if defense.step == "adam" else torch.optim.SGD
    optimizer = kind([levels], lr=defense.lr)

    def say(some: Tensor) -> Outputs:
        return model(framed(some, levels / 255, defense.border))

    with torch.no_grad():
        p = say(views).logits.softmax(dim=1)
    confident = (-(p * p.log()).sum(dim=1)).argsort()[: int(0.1 * VIEWS)]
    for _ in range(defense.steps):
        p = say(views[confident]).logits.softmax(dim=1)
        optimizer.zero_grad()
        (-(p * p.log()).sum(dim=1).mean()).backward()
        optimizer.step()
        with torch.no_grad():
            levels.clamp_(0, 255)
    with torch.no_grad():
        seen, whole, own = say(views), say(pixels), model(pixels)
    assert seen.features is not None
    assert whole.features is not None
    assert own.features is not None
    z = F.normalize(seen.features, dim=1)
    exponent = z @ F.normalize(whole.features, dim=1)[0] - z @ F.normalize(own.features, dim=1)[0]
    weights = exponent.exp() / exponent.exp().sum()
    if defense.average == "confident":
        weights = weights[confident] / weights[confident].sum()
        return weights @ seen.logits[confident]
    return weights @ seen.logits


@pytest.mark.parametrize(
    "defense",
    [
        Ttp(**ALL),
        Ttp(**ALL, steps=3),
        Ttp(**ALL, step="gradient", lr=2e4),
        Ttp(**ALL, average="confident"),
    ],
)
def test_a_batch_gets_what_the_procedure_gives_each_image(
    defense: Ttp, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    with torch.no_grad():
        found = defense.wrap(classifier)(batch.images, streams(batch)).logits
        untuned = Ttp(**{**defense.spec(), "steps": 0}).wrap(classifier)(batch.images, streams(batch)).logits
    expected = torch.stack([one_by_one(classifier, batch, i, defense) for i in range(3)])
    # the evaluator's own tolerance: a sign step turns the last bit of a small gradient into a step of its own
    assert torch.allclose(found[:3], expected, rtol=1e-3, atol=1e-2)
    assert (found - untuned).abs().amax(dim=1).max() > 0.05  # the agreement above is about something


def test_a_plain_gradient_step_of_five_moves_nothing(classifier: ZeroShotClassifier, batch: Batch) -> None:
    """Why the step is read as Adam's."""
    tuned, untuned = (
        Ttp(**ALL, step="gradient", steps=steps).wrap(classifier)(batch.images, streams(batch)).logits
        for steps in (1, 0)
    )
    assert (tuned - untuned).abs().max() < 0.01


def test_a_batch_is_as_good_as_one_image_at_a_time(classifier: ZeroShotClassifier, batch: Batch) -> None:
    with torch.no_grad():
        bare = Ttp(threshold=-1.0).wrap(classifier)(batch.images, streams(batch))
        assert bare.detector_score is not None
        middle = -1 - bare.detector_score.sort().values[2:4].mean().item()  # half of the images are suspect
        pipeline = Ttp(threshold=middle, views=VIEWS).wrap(classifier)
        together = pipeline(batch.images, streams(batch))
        alone = [pipeline(batch.images[i : i + 1], streams(batch, slice(i, i + 1))).logits for i in range(6)]
    changed = (together.logits - bare.logits).abs().amax(dim=1) > 1e-3
    assert 0 < int(changed.sum()) < 6
    assert torch.allclose(together.logits, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_nothing_of_the_model_changes_also_where_tuning_fails(
    classifier: ZeroShotClassifier, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, defense = fingerprint(classifier), Ttp(**ALL)
    first = defense.wrap(classifier)(batch.images, streams(batch)).logits
    with monkeypatch.context() as broken:
        broken.setattr(ttp, "entropy", lambda *_: 1 / 0)
        for pipeline in defense.surrogates(classifier):
            with pytest.raises(ZeroDivisionError):
                pipeline(batch.images.clone().requires_grad_(True), streams(batch))
    assert fingerprint(classifier) == before
    assert torch.equal(defense.wrap(classifier)(batch.images, streams(batch)).logits, first)
    assert all(p.grad is None and not p.requires_grad for p in classifier.clip.parameters())


def test_the_unrolled_surrogate_has_the_gradient_through_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """A central difference, with a smooth step in place of Adam's, whose values and slope are no pair."""
    monkeypatch.setattr(ttp, "Adam", lambda: lambda gradient: torch.tanh(50 * gradient))
    loaded = vlmdefend.load_model("tiny-rn", device="cpu")
    loaded.clip.double()
    model = loaded.zero_shot(("cat", "dog", "boat"), ["a photo of a {c}."])
    generator = torch.Generator().manual_seed(0)
    images, along = (torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    constant, unrolled = Ttp(threshold=1.0, views=10, lr=20.0, brightest=0.5).surrogates(model)

    def value(at: Tensor, pipeline=unrolled) -> Tensor:  # type: ignore[no-untyped-def]
        return pipeline(at, ImageRng(0, ["a"])).logits[:, 0].sum()

    step = 1e-6 * along
    slope = float((value(images + step) - value(images - step)) / 2e-6)
    found = []
    for pipeline in (constant, unrolled):
        pixels = images.clone().requires_grad_(True)
        found.append(float((torch.autograd.grad(value(pixels, pipeline), pixels)[0] * along).sum()))
    assert found[1] == pytest.approx(slope, rel=1e-3)
    assert found[0] != pytest.approx(slope, rel=1e-2)


def test_the_detector_has_a_gradient_for_those_who_evade_it(classifier: ZeroShotClassifier, batch: Batch) -> None:
    pixels = batch.images.clone().requires_grad_(True)
    score = Ttp().surrogate(classifier)(pixels, streams(batch)).detector_score
    assert score is not None
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_bad_use_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match="random_pad"):
        Ttp().wrap(Blind())(torch.zeros(1, 3, 4, 4), ImageRng(0, ["a"]))
    for options, reason in (({"views": 0}, "views=0"), ({"keep": 0.0}, "keep=0"), ({"border": -0.1}, "border=-0.1")):
        with pytest.raises(UserError, match=reason):
            Ttp(**options)  # type: ignore[arg-type]
