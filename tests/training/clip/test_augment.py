"""Tests of ``--augment crop-flip``: every epoch crops anew, and a resumed run crops as an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.clip.test_train_methods import Interrupt, training
from tests.training.conftest import batch_of
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.augment import crop_and_flip
from vlmdefend.training.settings.train_settings import make_train_settings

SMALL: dict[str, Any] = {"batch_size": 24, "limit": 120, "held_out": 8, "save_every": 2, "steps": 1}


def test_crops_of_a_ramp_have_the_published_widths_and_half_are_mirrored() -> None:
    count, side = 400, 32
    ramp = ((torch.arange(side) + 0.5) / side).expand(count, 3, side, side)  # dark at the left, bright at the right
    found = crop_and_flip(ramp, ImageRng(0, [f"image-{i}" for i in range(count)], "crop"))
    assert found.shape == ramp.shape
    assert torch.allclose(found[:, :, :1].expand_as(found), found, atol=1e-6)  # all rows of the crop are equal
    slopes = (found[:, 0, 0, 17] - found[:, 0, 0, 14]) / 3 * side  # share of the width; negative: mirrored
    widest = min(1.0, (4 / 3) ** 0.5)  # an area of 1 allows aspect 1 alone; nothing is wider than the image
    narrowest = (0.08 * 3 / 4) ** 0.5
    assert float(slopes.abs().min()) >= narrowest - 1 / side  # boxes are whole pixels
    assert float(slopes.abs().max()) <= widest + 1e-5
    assert float((slopes < 0).float().mean()) == pytest.approx(0.5, abs=0.1)  # 4 standard deviations
    assert float(found.min()) >= 0.5 / side
    assert float(found.max()) <= 1 - 0.5 / side


def test_a_crop_does_not_depend_on_the_other_images_of_the_batch() -> None:
    batch = batch_of(6)
    rng = ImageRng(0, batch.ids, "train/0/augment")
    together, turned = crop_and_flip(batch.images, rng), list(range(6))[::-1]
    alone = crop_and_flip(batch.images[turned][:3], ImageRng(0, [batch.ids[i] for i in turned[:3]], rng.purpose))
    assert torch.equal(alone, together[turned][:3])
    assert not torch.equal(together, crop_and_flip(batch.images, ImageRng(0, batch.ids, "train/1/augment")))


@pytest.mark.parametrize("method", ["apt", "tecoa"])
def test_an_interrupted_run_on_crops_resumes_to_the_same_bytes(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = SMALL | {"model": f"local-dir:{folders['vit']}", "dataset": "fashion", "epochs": 2, "lr": 0.1}
    options |= {"trains": "context:2"} if method == "apt" else {}
    hashes = {}
    for name, augment in (("whole", "crop-flip"), ("broken", "crop-flip"), ("none", "none")):
        if name == "broken":
            with pytest.raises(KeyboardInterrupt):
                training(tmp_path / name, method, augment=augment, **options).run(Interrupt())
            with pytest.raises(UserError, match="holds a run with augment = 'crop-flip', now it is 'none'"):
                training(tmp_path / name, method, **options).run(Progress())
        training(tmp_path / name, method, augment=augment, **options).run(Progress())
        hashes[name] = load_model(f"local-dir:{tmp_path / name}", device="cpu").weights_hash
    assert hashes["whole"] == hashes["broken"] != hashes["none"]


def test_every_epoch_crops_anew_and_held_out_images_are_not_cropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    run = training(tmp_path / "out", "tecoa", epochs=2, augment="crop-flip", **SMALL)
    losses = type(run.settings.objective).losses

    def watched(self: Any, student: Any, teacher: Any, batch: Any, rng: Any) -> Any:
        for name, image in zip(batch.ids, batch.images, strict=True):
            seen.setdefault(name, []).append(image.clone())
        return losses(self, student, teacher, batch, rng)

    monkeypatch.setattr(type(run.settings.objective), "losses", watched)
    cropped = run.run(Progress())
    assert len(seen) == 112
    assert all(len(images) == 2 and not torch.equal(*images) for images in seen.values())
    plain = training(tmp_path / "plain", "tecoa", epochs=1, **SMALL).run(Progress())
    assert cropped.summary["vanilla"] == plain.summary["vanilla"]


def test_crops_are_the_default_only_in_paper_profiles_of_methods_published_with_them() -> None:
    names = [cls.name for cls in OBJECTIVES if cls.schedule is not None]
    for profile, expected in (("paper", {"apt", "adv-lora"}), ("scaled", set())):
        made = {name: make_train_settings({"method": name, "model": "tiny-vit", "profile": profile}) for name in names}
        assert {name for name, settings in made.items() if settings.augment == "crop-flip"} == expected
    given = {"method": "apt", "model": "tiny-vit", "profile": "paper", "augment": "none"}
    assert make_train_settings(given).augment == "none"


def test_a_method_that_stores_features_once_refuses_crops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--augment crop-flip: advpt trains on features that it stores before"):
        training(tmp_path / "out", "advpt", augment="crop-flip", **SMALL)
