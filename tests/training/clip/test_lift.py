"""Tests that a short run of each method raises robust accuracy of the deployed model on test images.

Rows of ``vlmdefend evaluate`` are compared in pairs, image by image: images that become robust against those that stop
being robust. A new method that trains weights is tested as soon as it is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

from tests.training.clip.test_train_methods import training
from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.evaluation.launchers.inline import evaluate
from vlmdefend.evaluation.statistics.paired import sign_test
from vlmdefend.progress import Progress
from vlmdefend.reporting.compare.compare import PairedCounts
from vlmdefend.rng import ImageRng
from vlmdefend.training.clip.training_job import DefenseTrainingJob
from vlmdefend.training.loop.data import TrainingImages

WEIGHTS = [cls.name for cls in OBJECTIVES if cls.schedule is not None and not cls.learns]
# As published, with one perturbation for all images, adv-lora gives no robustness (see its docstring).
SPELLED = {"adv-lora": "adv-lora:perturbation=per-image"}
BUDGET = {"epochs": 2, "limit": 600, "held_out": 0}  # the embedded models' own 8/255 and batches of 64


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Method -> the folder of its short run on ``tiny-vit`` and ``fashion``, made once."""
    root = tmp_path_factory.mktemp("trained")

    def folder(method: str) -> Path:
        out = root / method.replace(":", "-")
        if not out.exists():
            training(out, method, **BUDGET).run(Progress())
        return out

    return folder


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bool]]:
    """``robust("tiny-vit", "8/255", limit=100)``: image id -> whether it is classified correctly under PGD-10."""
    runs = tmp_path_factory.mktemp("runs")

    def rows(model: str | Path, eps: str, *, dataset: str = "fashion", limit: int = 100) -> dict[str, bool]:
        name = model if isinstance(model, str) else f"local-dir:{model}"
        done = evaluate(runs, model=name, dataset=dataset, limit=limit, attack="pgd", eps=eps, device="cpu")
        assert not done.failures
        ((_, found),) = done.results
        return {row.id: row.robust for row in found}

    return rows


def robustness_gain(before: dict[str, bool], after: dict[str, bool]) -> float:
    """Returns the gain in percentage points; the sign test must be significant at 1 %."""
    found = PairedCounts.of(before.keys() & after.keys(), before, after)
    assert found.n == len(before) == len(after)
    assert sign_test(found.won, found.lost) < 0.01, found
    return 100 * (found.won - found.lost) / found.n


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_short_run_lifts_robust_accuracy(name: str, trained: Any, robust: Any) -> None:
    before, after = robust("tiny-vit", "8/255"), robust(trained(SPELLED.get(name, name)), "8/255")
    assert robustness_gain(before, after) >= 5


def test_every_method_that_learns_prompts_has_a_test_below() -> None:
    assert {cls.name for cls in OBJECTIVES if cls.learns} == {"apt", "fap", "advpt"}


def test_apt_lifts_robust_accuracy_of_a_robust_image_tower_on_another_data_set(
    trained: Any, robust: Any, tmp_path: Path
) -> None:
    """As published: the image tower is from TeCoA on one set, the context is learned on few images of another."""
    tower = trained("tecoa")
    options = {"model": f"local-dir:{tower}", "dataset": "mnist", "limit": 400, "held_out": 0, "lr": 0.1}
    training(tmp_path / "out", "apt", epochs=4, batch_size=16, **options).run(Progress())
    before, after = (robust(folder, "4/255", dataset="mnist", limit=400) for folder in (tower, tmp_path / "out"))
    assert robustness_gain(before, after) >= 5


def test_a_short_run_of_fap_lifts_robust_accuracy_of_a_vanilla_model(robust: Any, tmp_path: Path) -> None:
    """Sixteen images of each class, ten epochs in batches of four, as published; a small gain, so many test images."""
    options = {"eps": "4/255", "limit": 160, "epochs": 10, "batch_size": 4, "held_out": 0}
    training(tmp_path / "out", "fap", **options).run(Progress())
    before, after = (robust(model, "4/255", limit=500) for model in ("tiny-vit", tmp_path / "out"))
    assert robustness_gain(before, after) >= 2


class EpochMeans(Progress):
    def __init__(self) -> None:
        self.of: list[dict[str, float]] = []

    def end(self, result: Any, *, reused: bool = False) -> None:
        self.of.append(result.metrics)


def test_apt_lowers_the_loss_at_the_adversarial_images(tmp_path: Path) -> None:
    """On the vanilla image tower, where little robustness can be gained."""
    means = EpochMeans()
    training(tmp_path / "out", "apt", trains="context:4", limit=300, epochs=3, batch_size=32, lr=0.1).run(means)
    losses = [of["cross_entropy"] for of in means.of]
    assert losses[-1] < 0.9 * losses[0]
    assert means.of[-1]["accuracy_adversarial"] > means.of[0]["accuracy_adversarial"]


def test_advpt_fits_the_stored_features_and_gives_no_robustness_of_the_deployed_model(tmp_path: Path) -> None:
    """Its paper claims none: what it learns holds for the stored features alone."""
    run: DefenseTrainingJob = training(
        tmp_path / "out", "advpt", eps="16/255", limit=500, epochs=6, batch_size=32, lr=0.1
    )
    found = run.run(Progress())
    images = load_dataset("fashion", "test", limit=100)
    batch = TrainingImages(images, PixelTransform(32)).batch(range(100))
    rng = ImageRng(1, batch.ids, "transfer")
    features = run.settings.objective.stored(run.student, batch, rng)  # type: ignore[attr-defined]
    by_hand, learned = (
        float(F.cross_entropy(run.student.classifier.logits(features, classes), batch.labels))
        for classes in (run.student.hand_features, run.student.class_features)
    )
    assert learned < 0.8 * by_hand  # on images of the test split
    assert found.summary["result"].robust.hits <= found.summary["vanilla"].robust.hits + 3  # of 60
