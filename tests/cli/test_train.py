"""``vlmdefend train`` from the command line: what it says, what it makes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest

from tests.cli.conftest import Cli, one_sentence
from vlmdefend.models import load_model
from vlmdefend.training.loop.trainer import Trainer
from vlmdefend.training.settings.train_settings import make_train_settings

SMALL = ("--model", "tiny-vit", "--device", "cpu", "--limit", "60", "--held-out", "8", "--batch-size", "32")
SHORT = (*SMALL, "--epochs", "1")


def words(text: str) -> str:
    return " ".join(text.split())


def test_it_says_its_choices_trains_measures_and_the_result_takes_any_defense(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = cli("train", "--method", "tecoa", *SHORT, "--mix", "0.5", "--out", out)
    assert found.code == 0, found
    for choice in (
        "Tecoa(eps=0.03137254901960784, steps=2, alpha=0.03137254901960784)",
        "tiny-vit; trains: the image tower, 828,672 parameters",
        "fashion (train): 52 to train on, 8 held out",
        "2 steps, L_inf 8/255, alpha 8/255, last iterate, float32",
        "1 epochs of 2 steps",
        "train epoch 1/1: loss",
    ):
        assert choice in words(found.err), choice
    assert "tiny-vit on 8 held-out images of fashion, PGD-10 at 8/255" in found.out
    assert all(name in found.out for name in ("vanilla", "result", "mix-0.5"))
    facts = json.loads((out / "vlmdefend.json").read_text())
    assert (facts["method"], facts["base_model"], facts["training_images"]) == ("tecoa", "tiny-vit", 52)
    assert facts["vanilla_weights_hash"] == load_model("tiny-vit", device="cpu").weights_hash
    open_clip.create_model(f"local-dir:{out}")  # plain open_clip reads it
    models = f"local-dir:{out},local-dir:{out}/mix-0.5"
    judged = cli(
        *("evaluate", "--model", models, "--defense", "none,ttc,jpeg", "--limit", "4", "--eps", "8/255"),
        *("-a", "pgd:steps=2", "--device", "cpu", "--out", tmp_path / "runs"),
    )
    assert judged.code == 0, judged


def test_the_same_command_again_trains_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", "--method", "tecoa", *SHORT, "--out", tmp_path / "out")
    first = cli(*command)
    assert first.code == 0, first
    monkeypatch.setattr(Trainer, "_step", lambda *args: pytest.fail("trained again"))
    second = cli(*command)
    assert second.code == 0, second
    assert "found done" in second.out
    other = cli(*command, "--lr", "0.5")
    assert other.code == 2
    assert "holds a run with lr = 0.01, now it is 0.5" in other.err


def test_a_dry_run_counts_and_trains_nothing(cli: Cli, tmp_path: Path) -> None:
    found = cli("train", "--method", "pmg-aft", *SHORT, "--out", tmp_path / "out", "--dry-run")
    assert found.code == 0, found
    # 52 images: 2 steps of the attack, the clean and the adversarial image of the update; one forward of the vanilla
    assert "2 steps; of one image each, 208 forward+backwards and 52 forwards of the vanilla model" in found.out
    assert "Nothing was trained" in found.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "attack", "trains"),
    [
        ("at:images=clean", "attack none", "trains: the image tower, 828,672 parameters"),
        (
            "adv-lora",
            "attack one perturbation for all images, 2 steps of 0.05 along its gradient, L_inf 8/255, float32",
            "trains: LoRA of rank 2 and dropout 0.25 in both towers' attention, folded into the result,",
        ),
    ],
)
def test_it_says_how_images_are_attacked_and_what_trains(
    method: str, attack: str, trains: str, cli: Cli, tmp_path: Path
) -> None:
    found = cli("train", "--method", method, *SHORT, "--out", tmp_path / "out", "--dry-run")
    assert found.code == 0, found
    assert attack in words(found.err)
    assert trains in words(found.err)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--method", "tecoa", *SHORT)),
        ("distill", ("--proxy", "tiny-vit", "--target", "tiny-rn", "--limit", "60", "--device", "cpu")),
    ],
    ids=["train", "distill"],
)
def test_fewer_held_out_images_than_requested_are_reported(
    command: str, options: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    def told(count: int) -> str:
        found = cli(command, *options, "--held-out", count, "--out", tmp_path / "out", "--dry-run")
        assert found.code == 0, found
        return words(found.err)

    assert "12 held out (a fifth of the set, which is fewer than 1000000)" in told(1_000_000)
    assert "8 held out" in told(8)
    assert "a fifth of the set" not in told(8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "tecao"), "did you mean 'tecoa'"),
        (("--method", "nope"), "unknown method 'nope'; `vlmdefend list methods` shows all"),
        (("--method", "trades:beta=-1"), "trades: beta=-1.0 must be zero or more"),
        (("--method", "tga-zsr:adversarial_weight=-1"), "tga-zsr: adversarial_weight=-1.0 and clean_weight=0.05 must"),
        (("--method", "tga-zsr:clean_weight=-1"), "clean_weight=-1.0 must be zero or more"),
        (("--method", "agft:softness=-1"), "agft: softness=-1.0 must be zero or more"),
        (("--method", "adv-lora:ascent=-1"), "adv-lora: ascent=-1.0 must be zero or more"),
        (("--method", "apt:prompt_alpha=-1"), "apt: prompt_alpha=-1.0 must be zero or more"),
        (("--method", "tecoa", "--trains", "lora:9999"), "rank 9999 is more than 128, the width"),
        (("--method", "hpt-gpd"), "learns from another model; give it as --proxy, for example tiny-vit"),
        (("--method", "tecoa:eps=4/255"), "give eps as --eps instead"),
        (("--method", "pmg-aft:kl_reduction=max"), "kl_reduction='max'"),
        (("--method", "tecoa:beta=1"), "unknown option of method tecoa 'beta'"),
        (("--method", "tecoa", "--eps", "0"), "--eps and --alpha must be larger than 0"),
        (("--method", "tecoa", "--split", "test"), "--split test: is what models are tested on"),
        (("--method", "tecoa", "--mix", "1.5"), "--mix 1.5: must lie between 0 and 1"),
        (("--method", "tecoa", "--template", "a photo"), "has no {c}"),
        (("--method", "tecoa", "--trains", "some"), "--trains some: write image, all, or last:K"),
        (("--method", "tecoa", "--profile", "code"), "write paper or scaled"),
        (("--method", "tecoa", "--optimizer", "adam"), "--optimizer adam: input should be 'sgd' or 'adamw'"),
        (("--method", "tecoa", "--logit-scale", "-1"), "--logit-scale -1: write model, 1, or another positive number"),
    ],
)
def test_a_wrong_option_is_refused_in_a_sentence(
    options: tuple[str, ...], message: str, cli: Cli, tmp_path: Path
) -> None:
    found = cli("train", *options, *SHORT, "--out", tmp_path / "out")
    assert found.code == 2
    assert message in one_sentence(found)
    assert not (tmp_path / "out").exists()


def test_the_paper_profile_is_what_was_published_and_scaled_bounds_warm_up_and_gradient() -> None:
    paper = make_train_settings({"method": "fare", "model": "ViT-L/14", "profile": "paper"})
    assert (paper.optimizer, paper.lr, paper.weight_decay, paper.batch_size) == ("adamw", 1e-5, 1e-4, 128)
    assert (paper.eps, paper.steps, paper.alpha, paper.warm_up, paper.clip) == ("4/255", 10, "1/255", 1400, None)
    assert (paper.dataset, paper.templates) == ("imagenet", ("This is a photo of a {c}",))
    half = make_train_settings({"method": "fare", "model": "ViT-L/14", "profile": "paper", "eps": "2/255"})
    assert half.step_size == pytest.approx(1 / 255)
    scaled = make_train_settings({"method": "fare", "model": "ViT-L/14", "eps": "2/255"})
    assert scaled.step_size == pytest.approx(0.5 / 255)
    assert (scaled.lr, scaled.warm_up, scaled.clip) == (1e-5, None, 1.0)


def test_the_summed_divergence_of_pmg_aft_knows_the_batch_size_of_the_run() -> None:
    paper = make_train_settings({"method": "pmg-aft", "model": "ViT-B/32", "profile": "paper", "batch_size": 32})
    assert paper.objective.spec() | {"eps": 0, "alpha": 0} == {
        "eps": 0,
        "alpha": 0,
        "steps": 2,
        "kl_reduction": "sum",
        "batch_size": 32,
    }
    assert "batchmean" in repr(make_train_settings({"method": "pmg-aft", "model": "ViT-B/32"}).objective)
