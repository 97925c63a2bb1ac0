"""`train --method hpt-gpd` is `distill` under the name of its method: the same options, the same run to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training.clip.distillation_job import DistillationJob
from vlmdefend.training.settings.distill_settings import make_distill_settings
from vlmdefend.training.settings.hpt_gpd_options import distill_options

SMALL: dict[str, Any] = {"limit": 64, "held_out": 12, "batch_size": 32, "device": "cpu", "seed": 3}


def test_it_is_the_same_run_to_the_bit(tmp_path: Path) -> None:
    own = {"epochs_a": 1, "epochs_b": 1, "gap_images": 4, "pull": 0.25}
    distilled = {"proxy": "tiny-vit", "target": "tiny-rn", **own, **SMALL, "out": tmp_path / "distill"}
    text = ":".join(["hpt-gpd", *(f"{name}={value}" for name, value in own.items())])
    trained = {"method": text, "model": "tiny-rn", **SMALL, "out": tmp_path / "train"}
    settings = [make_distill_settings(distilled), make_distill_settings(distill_options(trained, "tiny-vit", None))]
    assert settings[0] == settings[1].model_copy(update={"out": tmp_path / "distill"})
    for one in settings:
        DistillationJob(one).run(Progress())
    for folder in ("", "pivot"):
        models = [load_model(f"local-dir:{tmp_path / run / folder}", device="cpu") for run in ("distill", "train")]
        assert models[0].weights_hash == models[1].weights_hash


@pytest.mark.parametrize(
    ("given", "proxy", "sentence"),
    [
        ({"method": "hpt-gpd"}, None, "learns from another model; give it as --proxy"),
        ({"method": "hpt-gpd:eps=1/255"}, "tiny-vit", "give eps as --eps instead"),
        ({"method": "hpt-gpd:pul=1"}, "tiny-vit", "unknown option of method hpt-gpd 'pul'; did you mean 'pull'"),
        ({"method": "hpt-gpd", "mix": [0.5]}, "tiny-vit", "hpt-gpd has no such option"),
        ({"method": "hpt-gpd", "epochs": 3}, "tiny-vit", "--epochs 3: hpt-gpd has no such option"),
    ],
)
def test_what_it_does_not_take_is_refused(given: dict[str, Any], proxy: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        distill_options({"model": "tiny-rn", **given}, proxy, None)


def test_a_bad_value_is_refused_as_distill_does() -> None:
    given = {"method": "hpt-gpd:pull=2", "model": "tiny-rn"}
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        make_distill_settings(distill_options(given, "tiny-vit", None))
