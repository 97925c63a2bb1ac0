"""The weights that the authors of training-time defenses publish, made here with the same keys and layout."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmdefend.models import load_model


def moved(state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((k, v + 0.01 if v.is_floating_point() else v) for k, v in state.items())


def momentum(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "state": {0: {"momentum_buffer": torch.zeros(2)}},
        "param_groups": [{"lr": 1e-5, "momentum": 0.9, "params": list(range(len(state)))}],
    }


def tecoa(visual: dict[str, Tensor], prompt: dict[str, Tensor]) -> dict[str, Any]:
    """What TeCoA's, PMG-AFT's and TGA-ZSR's ``save_checkpoint`` gets."""
    return {
        "epoch": 10,
        "state_dict": OrderedDict(prompt),
        "add_prompter": OrderedDict(),
        "vision_encoder_state_dict": visual,
        "best_acc1": torch.tensor(38.2),
        "optimizer": momentum(visual),
    }


LAYOUTS = {
    "tecoa, fine-tuned": lambda visual, whole: tecoa(visual, {}),
    "tecoa, data parallel": lambda visual, whole: tecoa({f"module.{k}": v for k, v in visual.items()}, {}),
    "fare: the image tower's state dict": lambda visual, whole: visual,
    "a whole clip, data parallel": lambda visual, whole: {
        "epoch": 2,
        "state_dict": {f"module.{k}": v for k, v in whole.items()},
    },
}


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_image_tower_of_a_published_file_is_taken_and_the_text_tower_stays(
    layout: str, model: str, tmp_path: Path
) -> None:
    vanilla = load_model(model, device="cpu")
    visual = moved(vanilla.clip.visual.state_dict())
    whole = {k: visual[k.removeprefix("visual.")] if k.startswith("visual.") else v for k, v in state_of(vanilla)}
    torch.save(LAYOUTS[layout](visual, whole), tmp_path / "model_best.pth.tar")
    found = load_model(model, weights=tmp_path / "model_best.pth.tar", device="cpu")
    assert len(visual) > 10
    for name, value in state_of(found):
        assert torch.equal(value, whole[name]), name


def state_of(model: Any) -> list[tuple[str, Tensor]]:
    return list(model.clip.state_dict().items())
