"""The tokens that TAPT tunes begin at what the model reads, learned or not, and reach the image that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vlmdefend
from tests.defenses.fashion import TWO_TEMPLATES, fashion_batch, fashion_classifier, streams
from tests.training.clip.test_train_methods import training
from vlmdefend.defenses.base import features_of
from vlmdefend.defenses.test_time._deep_tuning import DeepTuned
from vlmdefend.defenses.test_time.tapt import Tapt
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.prompts.image_prompts import DeepPromptTower, ImagePrompts, reading
from vlmdefend.models.prompts.learned_prompts import LearnedPrompts
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.progress import Progress
from vlmdefend.types import Batch

VIEWS = 24


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return fashion_classifier("tiny-vit", TWO_TEMPLATES, 4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return fashion_batch(6)


def test_text_tokens_start_from_what_the_model_reads(classifier: ZeroShotClassifier) -> None:
    side = classifier.text_side
    assert side is not None
    tower = DeepPromptTower(side, 5, 9)
    assert (tower.length, tower.depth) == (1, 2)  # "one", the shorter template; two blocks
    assert tower.context.shape == (2, 2, 64)
    assert torch.allclose(tower(tower.context[None])[0], classifier.text_features, atol=1e-6)
    deeper = tower.context.clone()
    deeper[:, 1] *= -1
    assert not torch.allclose(tower(deeper[None])[0], classifier.text_features, atol=1e-3)


def test_image_tokens_of_a_batch_reach_their_own_image(classifier: ZeroShotClassifier, batch: Batch) -> None:
    tokens = torch.randn(4, 6, 2, 128, generator=torch.Generator().manual_seed(0))
    with reading(classifier.clip, ImagePrompts(visual=tokens)):
        together = classifier.features(batch.images)
    for i in (0, 4):
        with reading(classifier.clip, ImagePrompts(visual=tokens[:, i])):  # (D, N, V), for all images
            alone = classifier.features(batch.images)
        assert torch.allclose(alone[i], together[i], atol=1e-5)
        assert not torch.allclose(alone[i - 1], together[i - 1], atol=1e-2)


def learned(model: VisionLanguageModel) -> LearnedPrompts:
    generator = torch.Generator().manual_seed(0)
    prompts = LearnedPrompts(
        template="X X X {c}.",
        context=torch.randn(3, 64, generator=generator),
        visual=torch.randn(3, 4, 128, generator=generator),
        text=torch.randn(1, 3, 64, generator=generator),
    )
    model.add_prompts(prompts)
    return prompts


def test_what_the_model_has_learned_is_where_tuning_starts_and_where_it_returns(batch: Batch) -> None:
    model = vlmdefend.load_model("tiny-vit", device="cpu")
    prompts = learned(model)
    classifier = model.zero_shot(("cat", "dog", "boat"), ["unused {c}"])
    bare = classifier(batch.images).logits
    tuned = DeepTuned(classifier, Tapt(views=VIEWS, lr=0.02))
    assert tuned.visual is not None
    assert prompts.visual is not None
    assert torch.equal(tuned.visual, prompts.visual.detach())
    assert (tuned.tower.length, tuned.tower.depth) == (3, 2)
    assert torch.allclose(tuned.tower(tuned.tower.context[None])[0], classifier.text_features, atol=1e-6)
    features = features_of(tuned._seen(batch.images[:, None], tuned._start(6), streams(batch)))
    assert torch.allclose(features[:, 0], classifier.features(batch.images), atol=1e-5)
    found = tuned(batch.images, streams(batch)).logits
    assert (found - bare).abs().amax(dim=1).min() > 0.05
    assert torch.equal(classifier(batch.images).logits, bare)
    assert "visual_tokens" not in vars(prompts)
    assert "text_tokens" not in vars(prompts)


def test_what_fap_wrote_into_a_folder_is_where_tuning_starts(batch: Batch, tmp_path: Path) -> None:
    """Eight steps of training; with a rate of zero the whole of tuning leaves the folder's own answers."""
    options = {"dataset": "fashion", "eps": "4/255", "limit": 72, "held_out": 8, "epochs": 1, "batch_size": 8}
    training(tmp_path / "fap", "fap", **options).run(Progress())
    model = vlmdefend.load_model(f"local-dir:{tmp_path / 'fap'}", device="cpu")
    classifier = model.zero_shot(("cat", "dog", "boat"), ["unused {c}"])
    prompts = model.prompts
    assert prompts is not None
    assert prompts.visual is not None
    assert prompts.text is not None
    tuned = DeepTuned(classifier, Tapt())
    assert tuned.visual is not None
    assert torch.equal(tuned.visual, prompts.visual)
    assert torch.allclose(tuned.tower.context[:, :2], prompts.context, atol=1e-6)
    assert torch.allclose(tuned.tower.context[:, 2:], prompts.text[0], atol=1e-6)
    bare = classifier(batch.images).logits
    still, moved = (
        Tapt(views=VIEWS, lr=lr).wrap(classifier)(batch.images, streams(batch)).logits for lr in (0.0, 0.05)
    )
    assert torch.allclose(still, bare, atol=1e-3)
    assert (moved - bare).abs().amax(dim=1).min() > 0.05
