"""A classifier with a head: what it computes, how it is kept in a folder, and where it stands in for a CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.backbones import TinyCnn
from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier
from vlmdefend.models.classifier.folder import CLASSIFIER_CONFIG, CLASSIFIER_WEIGHTS, save_classifier
from vlmdefend.models.names import check_name

NAMES = ("cat", "dog", "ship")


def classifier(backbone: str = "tiny-cnn", **options) -> ImageClassifier:
    return ImageClassifier(load_backbone(backbone), len(NAMES), **({"bottleneck": 8} | options))


def pixels(count: int = 4, size: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def stirred(network: ImageClassifier) -> ImageClassifier:
    """With statistics that a forward in training has moved."""
    with torch.no_grad():
        for _ in range(3):
            network.training_outputs(pixels(8, network.image_size))
    return network


def test_logits_and_features_come_by_name_and_the_head_reads_the_features() -> None:
    network = classifier()
    found = network(pixels())
    assert found.logits.shape == (4, 3)
    assert found.features.shape == (4, 8)
    assert torch.equal(network.head(found.features), found.logits)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = classifier(), classifier(), ImageClassifier(load_backbone("tiny-cnn", seed=1), 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(pixels()).logits, again(pixels()).logits)
    assert not torch.equal(first.head.weight, other.head.weight[:, : first.width])


def test_only_the_training_forward_moves_statistics_and_no_mode_stays_on() -> None:
    network = classifier()
    before = {n: b.clone() for n, b in network.running_statistics().items()}
    network(pixels())
    assert all(torch.equal(before[n], b) for n, b in network.running_statistics().items())
    network.training_outputs(pixels())
    assert all(not torch.equal(before[n], b) for n, b in network.running_statistics().items())
    network.train()
    assert not any(module.training for module in network.modules())


def test_with_frozen_batch_norm_the_training_forward_is_the_other_one() -> None:
    network = classifier(batch_norm="frozen")
    assert torch.equal(network.training_outputs(pixels()).logits, network(pixels()).logits)


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("tiny-cnn", {}),
        ("tiny-cnn", {"head": "two-layer"}),
        ("tiny-cnn", {"bottleneck": 0, "head": "two-layer"}),
        ("tiny-cnn", {"bottleneck_kind": "linear"}),
        ("tiny-vit", {}),
        ("tiny-rn", {}),
    ],
)
def test_a_folder_gives_back_the_same_classifier(backbone: str, options: dict, tmp_path: Path) -> None:
    network = stirred(classifier(backbone, **options))
    save_classifier(ClassifierModel("made", network, NAMES), tmp_path / "out", {"made_by": "test"})
    name = f"local-dir:{tmp_path / 'out'}"
    check_name(name)
    model = load_model(name, device="cpu")
    images = pixels(3, network.image_size)
    assert torch.equal(model.zero_shot(NAMES, ())(images).logits, network(images).logits)
    assert model.weights_hash == ClassifierModel("made", network, NAMES).weights_hash
    assert not any(p.requires_grad for p in model.clip.parameters())
    assert json.loads((tmp_path / "out" / "vlmdefend.json").read_text())["made_by"] == "test"


def test_a_timm_network_is_built_and_kept_without_its_weights(tmp_path: Path) -> None:
    backbone = load_backbone("timm:test_resnet.r160_in1k", pretrained=False)
    network = ImageClassifier(backbone, 3, bottleneck=8)
    save_classifier(ClassifierModel("made", network, NAMES), tmp_path / "out", {})
    model = load_model(f"local-dir:{tmp_path / 'out'}", device="cpu")
    images = pixels(2, network.image_size)
    assert torch.equal(model.zero_shot(NAMES, ())(images).logits, network(images).logits)


def test_a_data_set_in_another_order_gets_its_own_logits() -> None:
    network = classifier()
    model = ClassifierModel("made", network, NAMES)
    found = model.zero_shot(("ship", "cat", "dog"), ())(pixels())
    assert torch.equal(found.logits, network(pixels()).logits[:, [2, 0, 1]])


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat", "dog", "tree"), ("cat", "dog", "ship", "tree")])
def test_a_data_set_of_other_classes_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"was trained for 3 classes \(cat, dog, ship"):
        ClassifierModel("made", classifier(), NAMES).zero_shot(names, ())


def test_another_size_is_refused_or_resized_inside() -> None:
    model = ClassifierModel("made", classifier(), NAMES)
    with pytest.raises(UserError, match="the classifier takes 28x28"):
        model.zero_shot(NAMES, ())(pixels(size=32))
    larger = torch.full((1, 3, 56, 56), 0.25)
    found = model.zero_shot(NAMES, (), resize_inside=True)(larger)
    assert torch.allclose(found.logits, model.classifier(larger[..., :28, :28]).logits, atol=1e-5)


def test_a_protocols_normalisation_replaces_the_classifiers_own() -> None:
    network = classifier()
    model = ClassifierModel("made", network, NAMES)
    from vlmdefend.models.clip.vision_language import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = network.head(network.bottleneck(network.backbone((pixels() - mean) / std)))
    found = model.zero_shot(NAMES, (), normalization="imagenet")(pixels())
    assert torch.allclose(found.logits, expected, atol=1e-5)


def test_where_text_is_needed_it_says_that_there_is_none() -> None:
    with pytest.raises(UserError, match="classifier head instead of text"):
        ClassifierModel("made", classifier(), NAMES).text_features(NAMES, ("a {c}",))


def test_a_folder_cut_short_or_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    save_classifier(ClassifierModel("made", classifier(), NAMES), tmp_path, {})
    file = tmp_path / CLASSIFIER_CONFIG
    config = json.loads(file.read_text())
    for changed, message in (
        ({**config, "format": 99}, "newer vlmdefend"),
        ({k: v for k, v in config.items() if k != "head"}, "lacks head"),
        ({**config, "backbone": {"kind": "oracle"}}, "not known to this version"),
        ({**config, "class_names": ["one"]}, "does not fit the model: head.weight"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_model(f"local-dir:{tmp_path}", device="cpu")
    file.write_text(json.dumps(config))
    (tmp_path / CLASSIFIER_WEIGHTS).unlink()
    with pytest.raises(UserError, match="no such file"):
        check_name(f"local-dir:{tmp_path}")


def test_the_tiny_network_is_as_wide_as_it_says_and_differentiable_to_the_pixels() -> None:
    network = classifier()
    assert TinyCnn()(pixels()).shape == (4, TinyCnn.width)
    images = pixels().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(images).logits.sum(), images)
    assert float(gradient.abs().sum()) > 0
