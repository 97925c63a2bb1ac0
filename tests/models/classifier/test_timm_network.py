"""Networks of timm from weights on this machine: a folder as timm writes it, a weights file beside a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from vlmdefend.errors import UnknownName, UserError
from vlmdefend.models import load_model
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.classifier import ClassifierModel, ImageClassifier
from vlmdefend.models.classifier.folder import save_classifier
from vlmdefend.models.classifier.timm_network import load_timm

NAME = "test_resnet"
CLASSES = ("bar", "cross", "square")


@pytest.fixture(scope="module")
def network() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = timm.create_model(NAME, num_classes=3).eval()
        for part in made.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_()
    return made


@pytest.fixture
def folder(tmp_path: Path, network: Any) -> Path:
    save_for_hf(network, tmp_path / "hub", model_config={"label_names": list(CLASSES)}, safe_serialization=True)
    return tmp_path / "hub"


@pytest.fixture
def file(tmp_path: Path, network: Any) -> Path:
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def pixels(size: int = 160) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_a_folder_and_a_file_give_the_network_that_was_saved(folder: Path, file: Path, network: Any) -> None:
    with torch.no_grad():
        expected = network(pixels())
        for name in (f"local-dir:{folder}", f"{NAME}@{file}"):
            found = load_timm(name, pretrained=True, head=True)
            assert torch.equal(found.network(pixels()), expected)
            headless = load_timm(name, pretrained=True)
            assert torch.equal(
                headless.network(pixels()), network.forward_head(network.forward_features(pixels()), pre_logits=True)
            )
            assert (headless.width, headless.image_size) == (96, 160)
    assert load_timm(f"local-dir:{folder}", pretrained=True).class_names == CLASSES


def test_without_weights_only_the_shape_is_taken(folder: Path, network: Any) -> None:
    (folder / "model.safetensors").unlink()
    found = load_timm(f"local-dir:{folder}", pretrained=False).network
    assert {n: p.shape for n, p in found.state_dict().items()} == {
        n: p.shape for n, p in network.state_dict().items() if not n.startswith("fc.")
    }
    with pytest.raises(UserError, match=r"no such file.*|model.safetensors"):
        load_timm(f"local-dir:{folder}", pretrained=True)


def test_a_folder_says_how_pixels_are_normalised_and_of_which_size(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    written["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "input_size": [3, 96, 96], "interpolation": "bicubic"}
    (folder / "config.json").write_text(json.dumps(written))
    found = load_backbone(f"timm:local-dir:{folder}")
    assert (found.mean, found.image_size, found.interpolation) == ((0.1, 0.2, 0.3), 96, "bicubic")


def test_a_vision_transformer_of_another_image_size_is_built_as_it_was_saved(tmp_path: Path) -> None:
    made = timm.create_model("test_vit", num_classes=3, img_size=96)
    save_for_hf(made, tmp_path / "vit", safe_serialization=True)
    backbone = load_backbone(f"timm:local-dir:{tmp_path / 'vit'}")
    assert backbone.image_size == 96
    kept = ClassifierModel("made", ImageClassifier(backbone, 3, bottleneck=8), CLASSES)
    save_classifier(kept, tmp_path / "kept", {})
    again = load_model(f"local-dir:{tmp_path / 'kept'}", device="cpu")  # needs no folder of timm's any more
    assert torch.equal(again.clip(pixels(96)).logits, kept.classifier(pixels(96)).logits)


def test_a_configuration_cannot_make_the_factory_read_other_files(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    written["model_args"] |= {"checkpoint_path": "evil.pth", "pretrained": True}
    written["pretrained_cfg"] |= {"url": "evil", "file": "evil.pth", "custom_load": True}
    (folder / "config.json").write_text(json.dumps(written))
    found = load_timm(f"local-dir:{folder}", pretrained=True)
    assert not set(found.config["arguments"]) & {"checkpoint_path", "pretrained"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "test_resnt"}, "unknown timm model"),
        ({"num_classes": "many"}, "no configuration of timm's"),
        ({"model_args": {"depths": 3}}, "cannot be built"),
        ({"num_classes": 5}, r"fc.weight is \(3, 96\) where the model has \(5, 96\)"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder: Path, change: dict[str, Any], message: str) -> None:
    written = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=message) as caught:
        load_timm(f"local-dir:{folder}", pretrained=True)
    assert "\n" not in str(caught.value)


def test_names_and_files_that_are_not_there_are_said(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'resnet50'"):
        load_timm("resnet5o", pretrained=True)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_timm(f"local-dir:{tmp_path / 'nowhere'}", pretrained=True)
    with pytest.raises(UserError, match="no such file"):
        load_timm(f"{NAME}@{tmp_path / 'nowhere.pth'}", pretrained=True)
    with pytest.raises(UserError, match="does not fit the model"):
        load_timm(f"test_vit@{file}", pretrained=True)
