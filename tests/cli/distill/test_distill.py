"""``vlmdefend distill`` from the command line: what it makes and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from tests.cli.conftest import Cli
from tests.cli.distillation import PAIR, WEIGHTS, same_weights
from vlmdefend.data import load_dataset
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.models import load_model
from vlmdefend.training.loop.trainer import Trainer
from vlmdefend.types import Batch

# what it makes


def test_it_says_every_choice_the_gap_each_epoch_and_the_result(done: Path) -> None:
    err, out = (" ".join((done.parent / name).read_text().split()) for name in ("stderr", "stdout"))
    for choice in (
        "tiny-rn learns from tiny-vit; the image tower trains",
        "fashion (train): 64 to train on, 16 held out",
        "scaled: KL proxy-first, mean over the batch, logit scale model, normalization model, BatchNorm frozen",
        "PGD-2 on the target, L_inf 8/255, alpha 8/255, last iterate, float32",
        "GA, average 0.9; 1 epochs of 2 steps",
        "every epoch but the first begins at 0.5 itself + 0.5 pivot",
        "sgd, batch 32, gradient norm at most 1, float32, seed 0",
        "warm-up of 1000 steps is scaled to",
        "proxy gap, n = 8, PGD-10 on tiny-rn at 8/255",
        "stage a epoch 1/1: loss",
        "stage b epoch 1/1: loss",
        "proxy on adversarial",
    ):
        assert choice in err, choice
    assert "tiny-rn on 16 held-out images of fashion, PGD-10 at 8/255" in out
    assert all(name in out for name in ("vanilla", "pivot", "result"))


def test_the_result_is_a_model_for_open_clip_and_for_this_package(done: Path) -> None:
    plain = open_clip.create_model(f"local-dir:{done}").eval()
    ours = load_model(f"local-dir:{done}", device="cpu")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(plain.encode_image(images), ours.clip.encode_image(images), atol=1e-5)
    vanilla = load_model("tiny-rn", device="cpu").clip.state_dict()
    moved = {name for name, weight in ours.clip.state_dict().items() if not torch.equal(weight, vanilla[name])}
    assert moved
    assert all(name.startswith("visual.") and "running" not in name for name in moved)
    assert ours.clip.state_dict().keys() == vanilla.keys()


def test_its_metadata_say_how_it_was_made(done: Path) -> None:
    for folder, part in ((done, "result"), (done / "pivot", "pivot")):
        facts = json.loads((folder / "vlmdefend.json").read_text())
        assert (facts["method"], facts["base_model"], facts["part"]) == ("hpt-gpd", "tiny-rn", part)
        assert facts["settings"]["proxy"] == "tiny-vit"
        assert facts["settings"]["eps"] == "8/255"
        assert facts["training_images"] == 64
        assert facts["proxy_weights_hash"] == load_model("tiny-vit", device="cpu").weights_hash
        assert facts["weights_hash"] == load_model(f"local-dir:{folder}", device="cpu").weights_hash


def test_vanilla_pivot_and_result_stand_side_by_side_in_evaluate_and_report(
    done: Path, cli: Cli, tmp_path: Path
) -> None:
    models = ("tiny-rn", f"local-dir:{done}/pivot", f"local-dir:{done}")
    options = ("--limit", "8", "--eps", "8/255", "-a", "pgd:steps=2", "--device", "cpu", "--out", tmp_path / "runs")
    assert cli("evaluate", "--model", ",".join(models), *options).code == 0
    shown = cli("report", tmp_path / "runs", "--format", "csv")
    assert shown.code == 0
    assert all(model in shown.out for model in models)


def test_the_same_command_again_trains_nothing_and_says_the_same(
    distill: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = distill()
    assert first.code == 0, first
    written = (tmp_path / "out" / WEIGHTS).read_bytes()
    monkeypatch.setattr(Trainer, "_step", lambda *args: pytest.fail("trained again"))
    second = distill()
    assert second.code == 0, second
    assert "found done" in second.out
    assert second.out.partition("found done")[0] == first.out.partition("written")[0]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == written


def test_the_training_images_and_those_held_out_are_apart(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["clean"][1] for line in lines if "mean" in line] == [16, 16]
    assert [line["proxy_on_adversarial"][1] for line in lines if "mean" in line] == [8, 8]
    train = load_dataset("fashion", "train", limit=80)
    assert len(train) == 80
    assert json.loads((done / "training" / "settings.json").read_text())["held_out_images"] != train.ids_hash


# stages


def test_stage_a_then_stage_b_from_its_pivot_give_the_bytes_of_both_at_once(
    distill: Cli, done: Path, tmp_path: Path
) -> None:
    assert distill("--stage", "a", "--out", tmp_path / "a").code == 0
    assert distill("--stage", "b", "--pivot", tmp_path / "a" / "pivot", "--out", tmp_path / "b").code == 0
    assert same_weights(tmp_path / "a" / "pivot", done / "pivot")
    assert same_weights(tmp_path / "b", done)


def test_hpt_alone_needs_no_pivot(distill: Cli, tmp_path: Path) -> None:
    assert distill("--stage", "b", "--pull", "1").code == 0
    assert not (tmp_path / "out" / "pivot").exists()
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_a_pivot_of_another_model_is_one_sentence(distill: Cli) -> None:
    model = Path(load_model.__code__.co_filename).parents[1] / "assets" / "tiny-vit"
    outcome = distill("--stage", "b", "--pivot", model)
    assert outcome.code == 2
    assert "give the pivot of a run with the same target." in outcome.errors[0]


def test_what_is_trained_with_imagenets_normalization_is_saved_with_it(distill: Cli, tmp_path: Path) -> None:
    assert distill("--profile", "paper").code == 0
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["preprocess_cfg"]["mean"] == [0.485, 0.456, 0.406]
    assert load_model(f"local-dir:{tmp_path / 'out'}", device="cpu").mean == (0.485, 0.456, 0.406)


# other images


@pytest.mark.parametrize("space", ["model", "native"])
def test_a_folder_of_class_folders_is_trained_on_at_the_models_size_or_its_own(
    cli: Cli, tmp_path: Path, space: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog", "ship"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for i in range(6):
            levels = torch.randint(0, 256, (20, 20, 3), generator=generator).to(torch.uint8)
            Image.fromarray(levels.numpy()).save(tmp_path / "photos" / "train" / name / f"{i}.png")
    sizes: set[tuple[int, ...]] = set()
    losses = HptGpd.losses

    def seen(self: HptGpd, student: object, teacher: object, batch: Batch, rng: object) -> object:
        sizes.add(tuple(batch.images.shape[-2:]))
        return losses(self, student, teacher, batch, rng)

    options = ("--dataset", f"folder:{tmp_path / 'photos'}", "--pixel-space", space, "--out", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HptGpd, "losses", seen)
        outcome = cli("distill", *PAIR, *options, "--epochs-a", "1", "--epochs-b", "1", "--batch-size", "8")
    assert outcome.code == 0, outcome
    assert "15 to train on, 3 held out" in outcome.err
    assert sizes == {(20, 20) if space == "native" else (32, 32)}
    assert json.loads((tmp_path / "out" / "vlmdefend.json").read_text())["class_names"] == ["cat", "dog", "ship"]
