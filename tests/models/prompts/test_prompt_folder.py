"""A model folder keeps learned prompts, and nobody drops them in silence."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from tests.models.conftest import is_one_sentence
from tests.models.prompts.test_learned_prompts import CLASSES, TEMPLATES, loaded, prompted
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.weights.checkpoint import CONFIG, PROMPTS


def test_a_folder_keeps_prompts_and_plain_weights(folders: dict[str, Path], tmp_path: Path, images: Tensor) -> None:
    model = prompted(folders)
    found = load_model(f"local-dir:{save_folder(model, tmp_path / 'out', {})}", device="cpu")
    assert found.weights_hash == model.weights_hash != loaded(folders).weights_hash
    assert found.model_cfg == model.model_cfg
    assert torch.equal(found.text_features(CLASSES, TEMPLATES), model.text_features(CLASSES, TEMPLATES))
    assert torch.equal(found.clip.encode_image(images), model.clip.encode_image(images))
    again = load_model(f"local-dir:{save_folder(found, tmp_path / 'again', {})}", device="cpu")
    assert again.weights_hash == model.weights_hash


def test_plain_open_clip_cannot_open_the_folder_without_its_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_folder(prompted(folders), tmp_path / "out", {})
    for make in (open_clip.create_model, open_clip.create_model_from_pretrained, open_clip.create_model_and_transforms):
        with pytest.raises(TypeError, match="learned_prompts"):
            make(f"local-dir:{folder}")
    config = json.loads((folder / CONFIG).read_text())
    del config["model_cfg"]["learned_prompts"]  # as the documentation says, for the backbone alone
    (folder / CONFIG).write_text(json.dumps(config))
    vanilla = loaded(folders)
    for name, weight in open_clip.create_model(f"local-dir:{folder}").state_dict().items():
        assert torch.equal(weight, vanilla.clip.state_dict()[name]), name


def test_a_plain_model_written_over_a_prompted_one_leaves_no_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    out = save_folder(prompted(folders), tmp_path / "out", {})
    save_folder(loaded(folders), out, {})
    assert not (out / PROMPTS).exists()
    assert load_model(f"local-dir:{out}", device="cpu").weights_hash == loaded(folders).weights_hash


def test_a_folder_whose_prompts_are_missing_or_not_prompts_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    out = save_folder(prompted(folders), tmp_path / "out", {})
    (out / PROMPTS).write_bytes((out / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="not learned prompts") as caught:
        load_model(f"local-dir:{out}", device="cpu")
    (out / PROMPTS).unlink()
    with pytest.raises(UserError, match="no such file") as missing:
        load_model(f"local-dir:{out}", device="cpu")
    assert is_one_sentence(missing.value)
    assert "Traceback" not in str(caught.value)


def test_other_weights_under_learned_prompts_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    out = save_folder(prompted(folders), tmp_path / "out", {})
    with pytest.raises(UserError, match="learned with its own weights; leave --weights out"):
        load_model(f"local-dir:{out}", weights=folders["vit"] / "open_clip_model.safetensors", device="cpu")
