"""TAPT tunes each image's own tokens in both towers as the published loop does, and leaves none of them behind."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlmdefend
from tests.defenses.fashion import TWO_TEMPLATES, fashion_batch, fashion_classifier, fingerprint, streams
from vlmdefend.defenses.base import features_of
from vlmdefend.defenses.test_time import _deep_tuning
from vlmdefend.defenses.test_time._deep_tuning import DeepTuned
from vlmdefend.defenses.test_time._token_statistics import TokenStatistics
from vlmdefend.defenses.test_time.tapt import Tapt
from vlmdefend.defenses.views.crops import augmented_views, marginal_entropy
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel
from vlmdefend.models.prompts.image_prompts import DeepPromptTower, ImagePrompts, first_image_tokens, reading
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch

pytestmark = pytest.mark.numerics

VIEWS = 24


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit", TWO_TEMPLATES, 4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(6)


def published(model: ZeroShotClassifier, batch: Batch, image: int, defense: Tapt, known: TokenStatistics) -> Tensor:
    """One image the way the official code goes: parameters, ``torch.optim.AdamW``, all blocks by hand."""
    one, clip = slice(image, image + 1), model.clip
    views = augmented_views(batch.images[one], streams(batch, one), VIEWS)[0]
    side = model.text_side
    assert side is not None
    tower = DeepPromptTower(side, defense.contexts, defense.depth)
    text = torch.nn.Parameter(tower.context.clone())
    start = first_image_tokens(clip, defense.contexts, defense.depth)
    assert start is not None
    visual = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([text, visual], lr=defense.lr)
    scale = clip.logit_scale.exp()

    def embed(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        vision = clip.visual
        x = vision.conv1((images - model.mean) / model.std).flatten(2).transpose(1, 2)
        x = torch.cat([vision.class_embedding.expand(len(x), 1, -1), x], dim=1) + vision.positional_embedding
        x, read = vision.ln_pre(torch.cat([x, visual[0].expand(len(x), -1, -1)], dim=1)), []
        for number, block in enumerate(vision.transformer.resblocks):
            if number:
                x = torch.cat([x[:, : -visual.shape[1]], visual[number].expand(len(x), -1, -1)], dim=1)
            read.append(x)
            x = block(x)
        return F.normalize(vision.ln_post(x[:, 0]) @ vision.proj, dim=1), read

    with torch.no_grad():
        p = (scale * embed(views)[0] @ model.text_features.T).softmax(dim=1)
    chosen = (-(p * p.log()).sum(dim=1)).argsort()[: int(0.1 * VIEWS)]
    for _ in range(defense.steps):
        z, read = embed(views[chosen])
        p = (scale * z @ tower(text[None])[0].T).softmax(dim=1).mean(dim=0)
        loss = -(p * p.log()).sum()
        for number, x in enumerate(read):
            mean, spread = x.mean(dim=0), x.var(dim=0, unbiased=False)
            for share, target in ((defense.gamma, known.adversarial), (1 - defense.gamma, known.clean)):
                apart = F.l1_loss(mean, target.mean[number]) + F.l1_loss(spread, target.variance[number])
                loss = loss + defense.weight / len(read) * share * 0.5 * apart
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = scale * embed(views[:1])[0] @ tower(text[None])[0].T
    return logits[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_batch_gets_what_the_published_procedure_gives_each_image(
    steps: int, classifier: ZeroShotClassifier, batch: Batch, statistics_file: Path
) -> None:
    defense = Tapt(views=VIEWS, steps=steps, lr=0.02, statistics=str(statistics_file), gamma=0.3)
    with torch.no_grad():
        found = defense.wrap(classifier)(batch.images, streams(batch)).logits
        entropy_alone = Tapt(views=VIEWS, steps=steps, lr=0.02).wrap(classifier)(batch.images, streams(batch)).logits
    known = TokenStatistics.load(statistics_file)
    expected = torch.stack([published(classifier, batch, i, defense, known) for i in range(3)])
    # the evaluator's own tolerance: a sign step turns the last bit of a small gradient into a step of its own
    assert torch.allclose(found[:3], expected, rtol=1e-3, atol=1e-2)
    assert (found - classifier(batch.images).logits).abs().amax(dim=1).min() > 0.1  # the agreement is about something
    assert (found - entropy_alone).abs().amax(dim=1).min() > 0.1


def test_a_batch_is_as_good_as_one_image_at_a_time(
    classifier: ZeroShotClassifier, batch: Batch, statistics_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Tapt(views=VIEWS, statistics=str(statistics_file)).wrap(classifier)
    together = pipeline(batch.images, streams(batch)).logits
    alone = [pipeline(batch.images[i : i + 1], streams(batch, slice(i, i + 1))).logits for i in range(6)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(_deep_tuning, "AT_ONCE", 7)
    assert torch.allclose(pipeline(batch.images, streams(batch)).logits, together, atol=1e-5, rtol=1e-5)


def hooks(classifier: ZeroShotClassifier) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in classifier.clip.modules())


@pytest.mark.parametrize("where", ["loss", "alignment"])
def test_nothing_of_the_model_changes_also_where_tuning_fails(
    where: str, classifier: ZeroShotClassifier, batch: Batch, statistics_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, defense = fingerprint(classifier), Tapt(views=VIEWS, statistics=str(statistics_file))
    first = defense.wrap(classifier)(batch.images, streams(batch)).logits
    bare = classifier(batch.images).logits
    with monkeypatch.context() as broken:
        broken.setattr(Tapt, where, lambda *_: 1 / 0)
        for pipeline in defense.surrogates(classifier):
            with pytest.raises(ZeroDivisionError):
                pipeline(batch.images.clone().requires_grad_(True), streams(batch))
    with pytest.raises(RuntimeError), reading(classifier.clip, ImagePrompts(visual=torch.zeros(4, 3, 2, 128))):
        classifier.features(batch.images)  # tokens for three images, and six images
    assert fingerprint(classifier) == before
    assert hooks(classifier) == 0
    assert torch.equal(classifier(batch.images).logits, bare)
    assert torch.equal(defense.wrap(classifier)(batch.images, streams(batch)).logits, first)
    assert all(p.grad is None and not p.requires_grad for p in classifier.clip.parameters())


def test_tuning_lowers_the_entropy_that_it_minimises(classifier: ZeroShotClassifier, batch: Batch) -> None:
    views = augmented_views(batch.images, streams(batch), 4)
    tuned = DeepTuned(classifier, Tapt(views=VIEWS, steps=5))
    before = marginal_entropy(classifier.logits(features_of(tuned._seen(views, tuned._start(6), streams(batch)))))
    visual, classes = tuned._tuned(views, streams(batch), unrolled=False)
    after = marginal_entropy(classifier.logits(features_of(tuned._seen(views, visual, streams(batch))), classes))
    assert (after < before).all()


def test_every_view_is_embedded_once_and_the_confident_once_more(classifier: ZeroShotClassifier, batch: Batch) -> None:
    counted = CountingModel(classifier)
    with torch.no_grad():
        Tapt(views=VIEWS, steps=2).wrap(counted)(batch.images, streams(batch))
    confident = int(0.1 * VIEWS)
    assert counted.forwards == 6 * (VIEWS + 2 * confident + 1)
    assert counted.backwards == 6 * 2 * confident


def test_of_a_resnet_the_text_alone_is_tuned(batch: Batch, statistics_file: Path) -> None:
    classifier = fashion_classifier("tiny-rn", TWO_TEMPLATES, 4)
    tuned = DeepTuned(classifier, Tapt(views=VIEWS, lr=0.05))
    assert tuned.visual is None
    found = tuned(batch.images, streams(batch))
    assert found.features is not None
    assert torch.allclose(found.features, classifier.features(batch.images), atol=1e-5)
    assert (found.logits - classifier(batch.images).logits).abs().amax(dim=1).min() > 0.02
    for statistics in (str(statistics_file), "uci-digits"):
        with pytest.raises(UserError, match="ModifiedResNet"):
            Tapt(statistics=statistics).wrap(classifier)


@pytest.fixture
def doubled() -> ZeroShotClassifier:
    loaded = vlmdefend.load_model("tiny-vit", device="cpu")
    loaded.clip.double()
    return loaded.zero_shot(("cat", "dog", "boat"), TWO_TEMPLATES[:1])


def test_the_unrolled_surrogate_has_the_gradient_through_the_tokens(
    doubled: ZeroShotClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A central difference, with a smooth step in place of Adam's, whose values and slope are no pair."""
    monkeypatch.setattr(_deep_tuning, "Adam", lambda: lambda gradient: torch.tanh(gradient))
    defense, generator = Tapt(lr=0.3, steps=2, views=20), torch.Generator().manual_seed(0)
    images, along = (torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    constant, unrolled = defense.surrogates(doubled)

    def value(at: Tensor, pipeline=unrolled) -> Tensor:  # type: ignore[no-untyped-def]
        return pipeline(at, ImageRng(0, ["a"])).logits[:, 0].sum()

    with sdpa_kernel(SDPBackend.MATH):
        step = 1e-5 * along
        slope = float((value(images + step) - value(images - step)).detach() / 2e-5)
        found = []
        for pipeline in (constant, unrolled):
            pixels = images.clone().requires_grad_(True)
            found.append(float((torch.autograd.grad(value(pixels, pipeline), pixels)[0] * along).sum()))
    assert found[1] == pytest.approx(slope, rel=1e-4)
    assert found[0] != pytest.approx(slope, rel=1e-3)


def test_bad_use_is_said_in_a_sentence() -> None:
    names = ("cat", "dog")
    bare = vlmdefend.load_model("tiny-vit", device="cpu").zero_shot(names, ["{c} on a table", "a {c}"])
    with pytest.raises(UserError, match="begin with a word"):
        Tapt().wrap(bare)
    for options, reason in (({"contexts": 0}, "contexts=0"), ({"gamma": 2.0}, "gamma=2"), ({"views": 0}, "views=0")):
        with pytest.raises(UserError, match=reason):
            Tapt(**options)  # type: ignore[arg-type]
    assert math.isclose(Tapt().weight / 9, 100 / 9)
