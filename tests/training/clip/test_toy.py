"""Tests of the claims of the HPT-GPD paper on embedded models: tiny-vit is distilled into tiny-rn on `fashion`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.training.clip.distillation_job import DistillationJob, Distilled
from vlmdefend.training.clip.held_out import accuracies, correct
from vlmdefend.training.loop.data import TrainingImages
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.loop.state_file import load_state
from vlmdefend.training.loop.trainer_state import STATE
from vlmdefend.training.settings.distill_settings import make_distill_settings

EPS = 8 / 255
OPTIONS = {
    "proxy": "tiny-vit",
    "target": "tiny-rn",
    "device": "cpu",
    "limit": 1200,
    "held_out": 100,
    "gap_images": 100,
    "epochs_a": 2,
    "epochs_b": 2,
    "lr_a": 0.01,
    "lr_b": 0.03,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(scope="module")
def gpd(out: Path) -> Distilled:
    """Both stages."""
    return DistillationJob(make_distill_settings(OPTIONS | {"out": out / "gpd"})).run(Progress())


@pytest.fixture(scope="module")
def hpt(out: Path) -> Distilled:
    """Stage b without the pull."""
    plan = {"stage": "b", "pull": 1.0, "gap_images": 0, "out": out / "hpt"}
    return DistillationJob(make_distill_settings(OPTIONS | plan)).run(Progress())


def measured(folder: Path | str) -> Accuracies:
    """Returns accuracies of a model on 200 test images."""
    name = folder if isinstance(folder, str) else f"local-dir:{folder}"
    images = load_dataset("fashion", "test", limit=200)
    model = load_model(name, device="cpu")
    batch = TrainingImages(images, PixelTransform(32)).batch(range(len(images)))
    return accuracies(model.zero_shot(images.class_names, ("a photo of a {c}.",)), batch, EPS, 0, Processes("cpu"))


def test_the_proxy_keeps_its_accuracy_on_images_that_break_the_target(gpd: Distilled) -> None:
    assert gpd.gap is not None
    assert gpd.gap.adversarial["target"].share < 0.05
    assert gpd.gap.adversarial["proxy"].share > gpd.gap.clean["proxy"].share - 0.10


def test_the_target_becomes_robust_and_keeps_most_of_its_accuracy(gpd: Distilled, hpt: Distilled) -> None:
    vanilla, alone, both = measured("tiny-rn"), measured(hpt.out), measured(gpd.out)
    assert vanilla.robust.share < 0.05
    assert alone.robust.share > vanilla.robust.share + 0.4
    assert both.robust.share > vanilla.robust.share + 0.2
    assert min(alone.clean.share, both.clean.share) > vanilla.clean.share - 0.2


def test_the_pull_costs_robustness_and_keeps_accuracy_on_a_set_that_was_never_trained_on(
    gpd: Distilled, hpt: Distilled
) -> None:
    assert measured(gpd.out).robust.share < measured(hpt.out).robust.share
    images = load_dataset("mnist", "test", limit=200)
    batch = TrainingImages(images, PixelTransform(32)).batch(range(len(images)))
    kept = {}
    for name, folder in (("gpd", gpd.out), ("hpt", hpt.out)):
        model = load_model(f"local-dir:{folder}", device="cpu")
        kept[name] = correct(model.zero_shot(images.class_names, ("a photo of a {c}.",)), batch.images, batch).share
    assert kept["gpd"] > kept["hpt"] + 0.1


def test_the_pivot_is_less_robust_than_where_stage_a_ended(gpd: Distilled) -> None:
    robust = {line["stage"]: line["robust"][0] for line in load_state(gpd.out / "training" / STATE)[1]["epochs"][:2]}
    assert gpd.summary["pivot"].robust.hits < robust["a"]
    assert gpd.summary["pivot"].clean.share > gpd.summary["vanilla"].clean.share - 0.05


def test_the_pulled_weights_are_nearer_to_the_pivot(gpd: Distilled, hpt: Distilled) -> None:
    pivot = load_state(gpd.out / "training" / STATE)[0]["pivot"]
    far = {}
    for name, found in (("gpd", gpd), ("hpt", hpt)):
        weights = load_state(found.out / "training" / STATE)[0]["weights"]
        far[name] = float(torch.stack([(weights[k] - pivot[k]).square().sum() for k in pivot]).sum())
    assert far["gpd"] < far["hpt"]
