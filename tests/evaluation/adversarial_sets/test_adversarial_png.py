"""The 8-bit files of a set: inside the budget, close to the found examples, scored as read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import vlmdefend
from tests.evaluation.saved_sets import clean_of, craft
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.evaluation.adversarial_sets.png import to_levels, to_pixels
from vlmdefend.evaluation.adversarial_sets.set_format import INDEX
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


def on_levels(count: int) -> Tensor:
    levels = torch.randint(0, 256, (count, 3, 9, 9), generator=torch.Generator().manual_seed(3))
    return levels.float() / 255


def moved(clean: Tensor, threat: Threat) -> Tensor:
    """A point on the edge of the ball."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(4))
    far = noise.sign() if threat.norm == "linf" else noise
    return threat.project(clean + 10 * far, clean)


@pytest.mark.parametrize("levels", [0.5, 1, 1.5, 4, 8])
def test_png_levels_are_within_eps_in_whole_levels(levels: float) -> None:
    clean = on_levels(6)
    threat = Threat("linf", levels / 255)
    found = to_levels(moved(clean, threat), clean, threat).long()
    assert ((found - (clean * 255).round().long()).abs() <= int(levels)).all()
    assert found.min() >= 0
    assert found.max() <= 255
    if levels == int(levels):  # the edge of the ball is on the grid, so nothing may be lost
        assert torch.equal(to_pixels(found.to(torch.uint8)), moved(clean, threat).mul(255).round().div(255))


def test_png_levels_are_rounded_to_the_nearest_and_not_truncated() -> None:
    clean = torch.full((1, 3, 2, 2), 100 / 255)
    for wanted, level in ((101.4, 101), (101.6, 102), (98.6, 99), (98.4, 98)):
        assert (to_levels(torch.full_like(clean, wanted / 255), clean, Threat("linf", 2 / 255)) == level).all()


@pytest.mark.parametrize("eps", [0.05, 0.2, 1.0])
def test_png_levels_keep_an_l2_ball_and_use_most_of_it(eps: float) -> None:
    clean = on_levels(6)
    threat = Threat("l2", eps)
    found = to_pixels(to_levels(moved(clean, threat), clean, threat))
    distance = (found.double() - clean.double()).flatten(1).norm(dim=1)
    assert (distance <= eps + 1e-6).all()
    assert (distance >= 0.8 * eps).all()


def test_around_pixels_between_two_levels_the_nearest_level_is_taken_and_reported_as_outside() -> None:
    clean = torch.full((1, 3, 2, 2), 100.5 / 255)
    threat = Threat("linf", 0.25 / 255)
    found = to_levels(torch.full_like(clean, 100.7 / 255), clean, threat)
    assert (found == 101).all()
    assert not threat.contains(to_pixels(found), clean).any()


def test_what_an_attack_left_alone_stays_alone_in_8_bits() -> None:
    clean = on_levels(2)
    patched = clean.clone()
    patched[:, :, 2:4, 2:4] = 0.123
    threat = Threat("patch", 0.1)
    found = to_pixels(to_levels(patched, clean, threat))
    assert threat.contains(found, clean).all()
    assert torch.equal(found[:, :, 5:], clean[:, :, 5:])


@pytest.mark.parametrize("options", [{"eps": "1/255"}, {"eps": "4/255"}, {"eps": "0.5", "norm": "l2"}])
def test_png_files_are_scored_as_read_back_from_the_disk(options: dict[str, str], tmp_path: Path) -> None:
    crafted = craft(tmp_path / "set", png=True, **options)
    png = [json.loads(line) for line in (tmp_path / "set" / "png" / INDEX).read_text().splitlines()]
    read = [PixelTransform(None)(Image.open(tmp_path / "set" / "png" / row["file"]).convert("RGB")) for row in png]
    images, clean = torch.stack(read), clean_of(crafted)
    model = vlmdefend.load_model("tiny-vit").zero_shot(crafted.images.class_names, ["a photo of a {c}."])
    predictions = model(images, ImageRng(0, crafted.images.ids)).logits.argmax(dim=1).tolist()
    assert [row["adversarial_prediction"] for row in png] == predictions
    assert crafted.saved.threat.contains(images, clean).all()
    assert all(row["inside"] for row in png)
    assert crafted.pngs is not None
    assert crafted.pngs.outside == 0
    assert crafted.pngs.fooled == sum(row["fooled"] for row in png)
    assert crafted.pngs.largest_distance == max(row["distance"] for row in png) <= crafted.saved.threat.eps + 1e-6
    if "norm" not in options:
        levels = (images * 255).round() - (clean * 255).round()
        assert levels.abs().max() <= round(crafted.saved.manifest.cell.eps * 255)
