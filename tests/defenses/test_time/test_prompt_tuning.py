"""Prompt tuning is the published procedure, for a whole batch at once, and leaves no trace of itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlmdefend
from tests.defenses.fashion import (
    TWO_TEMPLATES,
    Blind,
    fashion_batch,
    fashion_classifier,
    fingerprint,
    streams,
)
from vlmdefend.defenses.test_time import _prompt_tuning
from vlmdefend.defenses.test_time._prompt_tuning import Adam, PromptTuning, Tuned
from vlmdefend.defenses.test_time.c_tpt import CTpt, spread
from vlmdefend.defenses.test_time.r_tpt import RTpt
from vlmdefend.defenses.test_time.tpt import Tpt
from vlmdefend.defenses.views.crops import augmented_views, marginal_entropy, most_confident
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.models.prompts.prompt_tower import PromptTower
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.types import Batch

VIEWS = 24
METHODS = [Tpt, CTpt, RTpt]
every = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-rn", TWO_TEMPLATES)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(6)


def published(method: type[PromptTuning], model: ZeroShotClassifier, batch: Batch, image: int, steps: int):  # type: ignore[no-untyped-def]
    """One image the way the official codes go: a parameter, ``torch.optim.AdamW``, all views predicted again."""
    one = slice(image, image + 1)
    views = augmented_views(batch.images[one], streams(batch, one), VIEWS)[0]
    side = model.text_side
    assert side is not None
    tower = PromptTower(side)
    context = torch.nn.Parameter(tower.context.clone())
    optimizer = torch.optim.AdamW([context], lr=5e-3)
    with torch.no_grad():
        features = F.normalize(model.features(views), dim=1)
    scale = model.clip.logit_scale.exp()
    chosen = (scale * features @ model.text_features.T).softmax(dim=1)
    chosen = (-(chosen * chosen.log()).sum(dim=1)).argsort()[: int(0.1 * VIEWS)]
    for _ in range(steps):
        classes = tower(context[None])[0]
        p = (scale * features[chosen] @ classes.T).softmax(dim=1)
        pointwise, marginal = -(p * p.log()).sum(dim=1).mean(), -(p.mean(dim=0) * p.mean(dim=0).log()).sum()
        loss = pointwise if method is RTpt else marginal
        if method is CTpt:
            loss = loss - 50.0 * torch.linalg.norm(classes - classes.mean(dim=0), dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = scale * features @ tower(context[None])[0].detach().T
    if method is not RTpt:
        return logits[0]
    alike = features @ features.T
    alike[range(VIEWS), range(VIEWS)] = -math.inf
    weights = F.softmax(alike.topk(20, dim=1).values.mean(dim=1) / 0.01, dim=0)
    return weights @ logits


@every
@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_gets_what_the_published_procedure_gives_each_image(
    method: type[PromptTuning], steps: int, classifier: ZeroShotClassifier, batch: Batch
) -> None:
    with torch.no_grad():
        found = method(views=VIEWS, steps=steps).wrap(classifier)(batch.images, streams(batch)).logits
    expected = torch.stack([published(method, classifier, batch, i, steps) for i in range(3)])
    untuned = method(views=VIEWS, steps=0).wrap(classifier)(batch.images, streams(batch)).logits
    assert torch.allclose(found[:3], expected, atol=1e-3)
    assert (found - untuned).abs().amax(dim=1).min() > 0.02  # the agreement above is about something


@every
def test_a_batch_is_as_good_as_one_image_at_a_time(
    method: type[PromptTuning], classifier: ZeroShotClassifier, batch: Batch
) -> None:
    pipeline = method(views=VIEWS).wrap(classifier)
    together = pipeline(batch.images, streams(batch)).logits
    alone = [pipeline(batch.images[i : i + 1], streams(batch, slice(i, i + 1))).logits for i in range(6)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, rtol=1e-6)


@every
def test_nothing_of_the_model_changes_also_where_tuning_fails(
    method: type[PromptTuning], classifier: ZeroShotClassifier, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(classifier)
    pipeline = method(views=VIEWS).wrap(classifier)
    first = pipeline(batch.images, streams(batch)).logits
    with monkeypatch.context() as broken:
        broken.setattr(method, "loss", lambda *_: 1 / 0)
        for sight in ("cut", "unrolled"):
            pixels = batch.images.clone().requires_grad_(True)
            with pytest.raises(ZeroDivisionError):
                Tuned(classifier, method(views=VIEWS), sight)(pixels, streams(batch))  # type: ignore[arg-type]
    assert fingerprint(classifier) == before
    assert torch.equal(pipeline(batch.images, streams(batch)).logits, first)  # no state of one image reaches the next
    assert all(p.grad is None and not p.requires_grad for p in classifier.clip.parameters())
    assert not classifier.clip.token_embedding._forward_hooks


def test_tuning_lowers_the_entropy_that_it_minimises(classifier: ZeroShotClassifier, batch: Batch) -> None:
    views = augmented_views(batch.images, streams(batch), VIEWS)
    seen = classifier(views.flatten(0, 1))
    confident = most_confident(seen.logits.view(6, VIEWS, -1), 0.1)
    rows = torch.arange(6)[:, None]
    chosen = seen.features.view(6, VIEWS, -1)[rows, confident]  # type: ignore[union-attr]
    before = marginal_entropy(classifier.logits(chosen))
    classes = Tuned(classifier, Tpt(views=VIEWS, steps=5), "cut")._tuned(chosen, unrolled=False)
    after = marginal_entropy(classifier.logits(chosen, classes))
    assert (after < before).all()


def test_marginal_entropy_and_spread_by_hand() -> None:
    """Views that are sure of different classes: the mean is a coin toss. Two classes at right angles: sqrt(1/2)."""
    logits = torch.tensor([[[90.0, 0.0], [0.0, 90.0]], [[90.0, 0.0], [90.0, 0.0]]])
    assert marginal_entropy(logits).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.55, 0.35]]]))
    expected = -(0.3 * math.log(0.3) + 0.4 * math.log(0.4) + 0.3 * math.log(0.3))
    assert float(marginal_entropy(logits)) == pytest.approx(expected, abs=1e-6)
    assert float(spread(torch.eye(2)[None])) == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_the_weights_of_r_tpt_by_hand() -> None:
    """Views a, a, b with cos(a, b) = 0.6, one neighbour: r = (1, 1, 0.6); two: r = (0.8, 0.8, 0.6)."""
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.6, 0.8]]])
    one = RTpt(neighbours=1, temperature=0.4).weights(features)[0]
    assert one.tolist() == pytest.approx([1 / (2 + math.exp(-1)), 1 / (2 + math.exp(-1)), 1 / (1 + 2 * math.e)])
    two = RTpt(neighbours=20, temperature=0.1).weights(features)[0]
    assert two.tolist() == pytest.approx([1 / (2 + math.exp(-2)), 1 / (2 + math.exp(-2)), 1 / (1 + 2 * math.e**2)])
    assert RTpt().weights(features[:, :1]).tolist() == [[1.0]]


def test_adam_has_the_values_of_torch_and_the_slope_of_a_soft_sign() -> None:
    gradients = torch.tensor([[[0.5, -2.0]], [[1.0, 1e-9]], [[-3.0, 0.25]]])  # 3 steps of one image
    parameter = torch.nn.Parameter(torch.tensor([[0.3, -0.7]]))
    optimizer, adam, ours = torch.optim.AdamW([parameter], lr=0.1), Adam(), parameter.detach().clone()
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        ours = ours * (1 - 0.1 * 0.01) - 0.1 * adam(gradient)
        assert torch.allclose(ours, parameter.detach(), atol=1e-6)
    seen = torch.tensor([[1.0, -3.0]], requires_grad=True)
    direction = Adam()(seen)
    assert torch.allclose(direction, torch.tensor([[1.0, -1.0]]), atol=1e-6)
    (slope,) = torch.autograd.grad(direction.sum(), seen)
    assert slope.tolist() == [pytest.approx([2 / 3**2, 2 / 5**2])]  # s / (|g| + s)^2 with s = mean |g| = 2


@every
def test_surrogates_have_the_deployed_values_where_they_have_a_graph(
    method: type[PromptTuning], classifier: ZeroShotClassifier, batch: Batch
) -> None:
    defense, pixels = method(views=VIEWS), batch.images.clone().requires_grad_(True)
    deployed = defense.wrap(classifier)(batch.images, streams(batch)).logits
    for surrogate in defense.surrogates(classifier):
        logits = surrogate(pixels, streams(batch)).logits
        assert torch.allclose(logits, deployed, atol=1e-2)
        assert torch.autograd.grad(logits[:, 0].sum(), pixels)[0].isfinite().all()


@every
def test_the_unrolled_surrogate_has_the_gradient_through_the_tuning(
    method: type[PromptTuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A central difference, with a smooth step in place of Adam's, whose values and slope are no pair."""
    monkeypatch.setattr(_prompt_tuning, "Adam", lambda: lambda gradient: torch.tanh(gradient / 4))
    loaded = vlmdefend.load_model("tiny-rn", device="cpu")
    loaded.clip.double()
    pipeline = Tuned(loaded.zero_shot(("cat", "dog", "boat"), TWO_TEMPLATES), method(lr=0.05, steps=2), "unrolled")
    generator = torch.Generator().manual_seed(0)
    features, along, wanted = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 64), (2, 3, 64), (2, 3, 64))
    )

    def value(at: torch.Tensor) -> torch.Tensor:
        return (pipeline._tuned(at, unrolled=True) * wanted).sum()

    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(value(features.requires_grad_(True)), features)
        step = 1e-4 * along
        expected = float((value(features + step) - value(features - step)).detach()) / 2e-4
    assert float((gradient * along).sum()) == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-6


def test_r_tpt_is_attacked_with_the_gradient_of_milder_weights() -> None:
    features = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    logits, defense = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1)), RTpt(temperature=0.1)
    exact = defense.predict(logits, features, "cut")
    attacked = defense.predict(logits, features, "constant")
    assert torch.allclose(exact, attacked, atol=1e-6)
    mild = RTpt(temperature=0.5).predict(logits, features, "cut")
    along = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    found, expected, sharp = (torch.autograd.grad(out, features, along)[0] for out in (attacked, mild, exact))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, sharp, atol=1e-2)


def test_an_attack_on_the_prompts_reaches_the_tuned_ones(classifier: ZeroShotClassifier, batch: Batch) -> None:
    side = classifier.text_side
    assert side is not None
    pipeline = RTpt(views=VIEWS).wrap(classifier)
    clean = pipeline(batch.images, streams(batch)).logits
    attacked = classifier.text_features.roll(1, dims=0).clone().requires_grad_(True)
    with side.using(attacked):
        logits = pipeline(batch.images, streams(batch)).logits
        bare = Tpt(steps=0).wrap(classifier)(batch.images, streams(batch)).logits
        assert torch.equal(bare, classifier(batch.images).logits)
    assert torch.equal(logits.argmax(dim=1), (clean.argmax(dim=1) + 1) % 10)
    assert torch.autograd.grad(logits[:, 0].sum(), attacked)[0].abs().sum() > 0


def test_every_view_is_embedded_once(classifier: ZeroShotClassifier, batch: Batch) -> None:
    for method in METHODS:
        counted = CountingModel(classifier)
        with torch.no_grad():
            method(views=VIEWS, steps=2).wrap(counted)(batch.images, streams(batch))
        assert (counted.forwards, counted.backwards) == (6 * VIEWS, 0)


def test_bad_use_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match="no text tower"):
        Tpt().wrap(Blind())
    with pytest.raises(UserError, match="views=0"):
        RTpt(views=0)
    with pytest.raises(UserError, match="steps=-1"):
        CTpt(steps=-1)
    with pytest.raises(UserError, match="dispersion=-1"):
        CTpt(dispersion=-1.0)
    with pytest.raises(UserError, match="temperature=0"):
        RTpt(temperature=0.0)
