from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.vision_language import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from vlmdefend.rng import ImageRng

CLASSES, TEMPLATES = ["cat", "dog", "land vehicle"], ["a photo of a {c}.", "a {c}"]


@pytest.mark.parametrize("kind", ["vit", "rn", "siglip", "coca"])
def test_logits_are_what_plain_open_clip_says(folders: dict[str, Path], images: Tensor, kind: str) -> None:
    name = f"local-dir:{folders[kind]}"
    plain, _, _ = open_clip.create_model_and_transforms(name)
    plain.eval()
    model = load_model(name, device="cpu")
    text = open_clip.build_zero_shot_classifier(
        plain, open_clip.get_tokenizer(name), CLASSES, [lambda c: f"a photo of a {c}.", lambda c: f"a {c}"]
    )
    mean, std = torch.tensor(model.mean).view(3, 1, 1), torch.tensor(model.std).view(3, 1, 1)
    with torch.no_grad():
        features = plain.encode_image((images - mean) / std, normalize=False)
        expected = plain.logit_scale.exp() * F.normalize(features, dim=-1) @ text
        if plain.logit_bias is not None:
            expected = expected + plain.logit_bias
        outputs = model.zero_shot(CLASSES, TEMPLATES)(images)
    torch.testing.assert_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs.features, features, rtol=1e-5, atol=1e-5)
    assert outputs.detector_score is None


def test_normalisation_is_the_models_or_the_protocols(folders: dict[str, Path], images: Tensor) -> None:
    model = load_model(f"local-dir:{folders['vit']}", device="cpu")
    for name, mean, std in (
        ("model", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        ("clip", CLIP_MEAN, CLIP_STD),
        ("imagenet", IMAGENET_MEAN, IMAGENET_STD),
    ):
        classifier = model.zero_shot(CLASSES, TEMPLATES, normalization=name)  # type: ignore[arg-type]
        pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        assert torch.equal(classifier(images).features, model.clip.encode_image(pixels))


def test_clip_and_imagenet_constants_are_open_clips() -> None:
    from open_clip import constants

    assert (CLIP_MEAN, CLIP_STD) == (constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD)
    assert (IMAGENET_MEAN, IMAGENET_STD) == (constants.IMAGENET_MEAN, constants.IMAGENET_STD)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 28), (32, 32), (48, 64), (32, 20)])
def test_resize_inside_is_bicubic_interpolation_and_differentiable(
    folders: dict[str, Path], height: int, width: int
) -> None:
    classifier = load_model(f"local-dir:{folders['vit']}", device="cpu").zero_shot(
        CLASSES, TEMPLATES, resize_inside=True
    )
    images = torch.rand(2, 3, height, width, requires_grad=True)
    antialias = height > 32 or width > 32
    expected = F.interpolate(images, (32, 32), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(classifier._resized(images), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(classifier(images).logits[:, 0].sum(), images)
    assert gradient.shape == images.shape
    assert (gradient != 0).float().mean() > 0.9


def test_images_of_another_size_are_refused_unless_resized_inside(folders: dict[str, Path]) -> None:
    classifier = load_model(f"local-dir:{folders['vit']}", device="cpu").zero_shot(CLASSES, TEMPLATES)
    with pytest.raises(UserError, match="images are 28x28 but the model takes 32x32"):
        classifier(torch.rand(1, 3, 28, 28))


def test_an_image_does_not_depend_on_its_batch_mates(folders: dict[str, Path], images: Tensor) -> None:
    for kind in ("vit", "rn"):
        classifier = load_model(f"local-dir:{folders[kind]}", device="cpu").zero_shot(CLASSES, TEMPLATES)
        together = classifier(images).logits
        alone = torch.cat([classifier(image[None]).logits for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_an_attack_moves_no_batchnorm_statistic_and_no_training_flag(folders: dict[str, Path], images: Tensor) -> None:
    model = load_model(f"local-dir:{folders['rn']}", device="cpu")
    classifier = model.zero_shot(CLASSES, TEMPLATES)
    before = classifier(images).logits
    classifier.train()
    assert not classifier.training
    assert not any(m.training for m in classifier.modules())
    model.clip.train()  # the student of a training run, attacked in between
    model.clip.visual.layer1.eval()
    flags = [m.training for m in model.clip.modules()]
    pixels = images.clone().requires_grad_(True)
    logits = classifier(pixels).logits
    torch.autograd.grad(logits.sum(), pixels)
    torch.testing.assert_close(logits, before)
    assert [m.training for m in model.clip.modules()] == flags
    assert model.weights_hash == load_model(f"local-dir:{folders['rn']}", device="cpu").weights_hash


def test_it_is_a_deterministic_pipeline_without_gradients_of_its_own(folders: dict[str, Path], images: Tensor) -> None:
    classifier = load_model(f"local-dir:{folders['vit']}", device="cpu").zero_shot(CLASSES, TEMPLATES)
    assert classifier.num_classes == 3
    assert classifier.stochastic is False
    assert not any(p.requires_grad for p in classifier.parameters())
    rng = ImageRng(0, ["a", "b", "c"])
    assert torch.equal(classifier(images, rng).logits, classifier(images).logits)
    assert all(name.startswith("clip.") for name in classifier.state_dict())
