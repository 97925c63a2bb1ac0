"""Runs that learn prompts: resumed to the last bit, what their folder answers for, and what they are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import TEMPLATES
from tests.training.test_train_methods import Broken, training
from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.rng import ImageRng
from vlmdefend.training.data import TrainingImages
from vlmdefend.training.listener import Listener
from vlmdefend.training.stored import FILE

SMALL: dict[str, Any] = {
    "dataset": "fashion",
    "lr": 0.1,
    "epochs": 2,
    "batch_size": 16,
    "save_every": 1,
    "limit": 48,
    "held_out": 8,
    "steps": 1,
    "eps": "8/255",
}


def small(folders: dict[str, Path], **more: Any) -> dict[str, Any]:
    """A run of a second on the random toy."""
    return SMALL | {"model": f"local-dir:{folders['vit']}"} | more


@pytest.mark.parametrize(("method", "parts"), [("apt", "context:2"), ("advpt", "class-context:2"), ("fap", "deep:2")])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    method: str, parts: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = small(folders, trains=parts)
    training(tmp_path / "whole", method, **options).run(Listener())
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "broken", method, **options).run(Broken())
    assert not (tmp_path / "broken" / "learned_prompts.safetensors").exists()
    training(tmp_path / "broken", method, **options).run(Listener())
    whole, broken = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("whole", "broken"))
    assert whole.weights_hash == broken.weights_hash
    assert whole.model_cfg == broken.model_cfg
    vanilla = load_model(f"local-dir:{folders['vit']}", device="cpu").clip.state_dict()
    state = whole.clip.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in vanilla.items())
    assert set(state) - set(vanilla) <= {"prompts.context", "prompts.visual", "prompts.text"}
    again = training(tmp_path / "whole", method, **options).run(Listener())
    assert again.reused


def test_a_context_for_all_classes_answers_for_another_data_set_and_one_for_each_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = load_dataset("mnist", "test", limit=4)
    for parts in ("context:2", "class-context:2"):
        training(tmp_path / parts, "apt", **small(folders, trains=parts, epochs=1)).run(Listener())
        model = load_model(f"local-dir:{tmp_path / parts}", device="cpu")
        if parts == "context:2":
            assert model.zero_shot(other.class_names, TEMPLATES).num_classes == 10
        else:
            with pytest.raises(UserError, match="say nothing of others"):
                model.zero_shot(other.class_names, TEMPLATES)


def test_advpt_runs_the_image_tower_before_the_first_step_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(tmp_path / "out", "advpt", **small(folders, held_out=0, trains="context:2"))
    seen: list[int] = []
    encode = run.model.clip.encode_image
    monkeypatch.setattr(
        run.model.clip, "encode_image", lambda images, **more: seen.append(len(images)) or encode(images, **more)
    )
    run.run(Listener())
    assert sum(seen) == 48 * 3  # the clean features, one step, the adversarial features
    assert (tmp_path / "out" / "training" / FILE).exists()


def test_weights_are_trained_under_prompts_that_were_learned_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """The prompts stay; a mixture is one of weights."""
    training(tmp_path / "apt", "apt", **small(folders, trains="context:2", epochs=1)).run(Listener())
    options = small(folders, model=f"local-dir:{tmp_path / 'apt'}", epochs=1, mix=(0.5,))
    found = training(tmp_path / "tecoa", "tecoa", **options).run(Listener())
    assert list(found.summary) == ["vanilla", "result", "mix-0.5"]
    first, second = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("apt", "tecoa"))
    assert torch.equal(first.context, second.context)  # type: ignore[arg-type]
    assert first.weights_hash != second.weights_hash
    with pytest.raises(UserError, match="has learned prompts already"):
        training(tmp_path / "again", "apt", **{**options, "mix": (), "trains": "context:2"})


# what they are worth on the embedded model


class Means(Listener):
    def __init__(self) -> None:
        self.of: list[dict[str, float]] = []

    def epoch(self, end: Any) -> None:
        self.of.append(end.metrics)


def test_a_short_run_of_fap_lifts_robust_accuracy_of_a_vanilla_model(tmp_path: Path) -> None:
    options = {"eps": "4/255", "limit": 700, "epochs": 3, "batch_size": 8, "held_out": 100}
    found = training(tmp_path / "out", "fap", **options).run(Listener())
    before, after = found.summary["vanilla"], found.summary["result"]
    assert after.robust.hits >= before.robust.hits + 4  # 8 of 100 where it was written
    assert after.clean.hits >= before.clean.hits - 10


def test_apt_lowers_the_loss_at_the_adversarial_images(tmp_path: Path) -> None:
    """On the vanilla tower, where there is little robustness to be had; the authors begin with a robust one."""
    means = Means()
    training(tmp_path / "out", "apt", trains="context:4", limit=300, epochs=3, batch_size=32, lr=0.1).run(means)
    losses = [of["cross_entropy"] for of in means.of]
    assert losses[-1] < 0.9 * losses[0]
    assert means.of[-1]["accuracy_adversarial"] > means.of[0]["accuracy_adversarial"]


def test_advpt_learns_the_stored_images_and_is_no_help_against_an_attack_on_the_deployed_model(tmp_path: Path) -> None:
    run = training(tmp_path / "out", "advpt", eps="16/255", limit=500, epochs=6, batch_size=32, lr=0.1)
    found = run.run(Listener())
    images = load_dataset("fashion", "test", limit=100)
    batch = TrainingImages(images, PixelTransform(32)).batch(range(100))
    rng = ImageRng(1, batch.ids, "transfer")
    features = run.settings.objective.stored(run.student, batch, rng)  # type: ignore[attr-defined]
    by_hand, learned = (
        float(F.cross_entropy(run.student.classifier.logits(features, classes), batch.labels))
        for classes in (run.student.hand_features, run.student.class_features)
    )
    assert learned < 0.8 * by_hand  # on images that neither attack nor prompt has seen
    assert found.summary["result"].robust.hits <= found.summary["vanilla"].robust.hits + 3  # of 60
