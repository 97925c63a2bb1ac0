"""Tests of the trained classifier: it equals the deployed model, and only the chosen parameters train."""

from __future__ import annotations

import pytest
import torch

from tests.training.conftest import CLASSES, SIZE, TEMPLATES, batch_of, classifier, student_of
from vlmdefend.errors import UserError
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.training.clip.classifier import TrainedClassifier, choose_trained


def test_its_logits_are_those_of_the_deployed_model(target: VisionLanguageModel) -> None:
    batch = batch_of(4)
    deployed = target.zero_shot(CLASSES, TEMPLATES)
    with torch.no_grad():
        expected = deployed(batch.images).logits
        assert torch.equal(classifier(target)(batch.images).logits, expected)
        assert torch.allclose(student_of(target)(batch.images).logits, expected, atol=1e-5)


def test_resizing_inside_at_the_models_own_size_changes_no_bit(target: VisionLanguageModel) -> None:
    batch = batch_of(4)
    with torch.no_grad():
        plain, inside = (classifier(target, resize_inside=r)(batch.images).logits for r in (False, True))
    assert torch.equal(plain, inside)


def test_cached_text_features_are_those_of_the_text_tower(target: VisionLanguageModel) -> None:
    made = classifier(target)
    with torch.no_grad():
        assert torch.allclose(made._encode_text(), made.text_features, atol=1e-6)


def test_trained_text_is_encoded_without_padding_where_padding_has_no_effect(
    target: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = ("a photo of a {c}.", "a bad photo of the {c}.")
    expected, made = target.text_features(CLASSES, templates), TrainedClassifier(target, CLASSES, templates)
    weight = choose_trained(made, "all")["transformer.resblocks.0.attn.in_proj_weight"]
    weights = torch.rand(made.text_features.shape, generator=torch.Generator().manual_seed(0))
    lengths: list[int] = []
    target.clip.transformer.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    gradients = []
    for short in (True, False):
        monkeypatch.setattr("vlmdefend.training.clip.classifier.looks_backwards", lambda clip, short=short: short)
        made = TrainedClassifier(target, CLASSES, templates)
        lengths.clear()
        found = made.class_features()
        assert lengths == [9 if short else 16]  # start, six words and a full stop, end
        assert torch.allclose(found, expected, atol=1e-6)
        gradients += torch.autograd.grad((found * weights).sum(), weight)
    assert torch.allclose(*gradients, atol=1e-5)
    assert float(gradients[0].abs().max()) > 1e-3


def test_the_logit_scale_scales_and_changes_no_prediction(target: VisionLanguageModel) -> None:
    batch = batch_of(12)
    with torch.no_grad():
        found = [classifier(target, logit_scale=s)(batch.images).logits for s in (1.0, 100.0)]
        own = classifier(target)(batch.images).logits
    assert torch.allclose(100 * found[0], found[1], rtol=1e-4, atol=1e-4)
    assert found[0].abs().max() <= 1 + 1e-6
    assert torch.equal(found[0].argmax(1), own.argmax(1))


def test_imagenet_normalization_is_applied_inside(target: VisionLanguageModel) -> None:
    made = classifier(target, normalization="imagenet")
    assert made.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert made.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


def test_logits_depend_on_the_batch_only_if_batch_norm_trains(target: VisionLanguageModel) -> None:
    batch = batch_of(8)
    for policy, same in (("frozen", True), ("train", False)):
        student = student_of(target, batch_norm=policy)
        with torch.no_grad():
            together, alone = student(batch.images).logits[:2], student(batch.images[:2]).logits
        assert torch.allclose(together, alone, atol=1e-4) is same


def test_trained_batch_norm_moves_its_statistics_and_leaves_its_mode(target: VisionLanguageModel) -> None:
    student, batch = student_of(target, batch_norm="train"), batch_of(8)
    name = next(k for k in target.clip.state_dict() if k.endswith("running_mean"))
    before = target.clip.state_dict()[name].clone()
    student(batch.images)
    assert not torch.equal(before, target.clip.state_dict()[name])
    assert not any(m.training for m in target.clip.modules())


@pytest.mark.parametrize(
    ("parts", "trains"),
    [
        ("image", lambda names: [n for n in names if n.startswith("visual.")]),
        ("all", lambda names: list(names)),
        ("last:3", lambda names: [n for n in names if n.startswith("visual.")][-3:]),
    ],
)
def test_the_chosen_parameters_train_and_no_others(target: VisionLanguageModel, parts: str, trains: object) -> None:
    made = classifier(target)
    chosen = choose_trained(made, parts)
    names = [name for name, _ in target.clip.named_parameters()]
    assert list(chosen) == trains(names)
    assert [n for n, p in target.clip.named_parameters() if p.requires_grad] == list(chosen)


@pytest.mark.parametrize("parts", ["text", "last:", "last:0", "last:1000", "last:x"])
def test_other_choices_of_parameters_are_refused(target: VisionLanguageModel, parts: str) -> None:
    with pytest.raises(UserError, match=r"write image, all, or last:K with K from 1 to \d+"):
        choose_trained(classifier(target), parts)


def test_trained_text_features_follow_the_text_tower(target: VisionLanguageModel) -> None:
    student = student_of(target, "all")
    batch, made = batch_of(2), student.classifier
    with torch.no_grad():
        target.clip.token_embedding.weight.mul_(torch.rand(32, generator=torch.Generator().manual_seed(0)))
    stale = made.text_features.clone()
    with torch.no_grad():
        trained = student(batch.images).logits
        made.refresh()
        assert not torch.allclose(stale, made.text_features, atol=1e-4)
        assert torch.allclose(student.attacked(batch.images), trained, atol=1e-4)


def test_images_of_another_size_need_resizing_inside(target: VisionLanguageModel) -> None:
    images = torch.rand(1, 3, SIZE // 2, SIZE // 2)
    with pytest.raises(UserError, match="prepare them at that size"):
        classifier(target)(images)
    assert classifier(target, resize_inside=True)(images).logits.shape == (1, len(CLASSES))
