"""``vlmdefend distill`` from the command line: what it makes, what it says, and what an interruption does to it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli.conftest import Cli, Outcome, one_sentence
from vlmdefend.data import load_dataset
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.models import load_model
from vlmdefend.training.loop import Run
from vlmdefend.types import Batch

PAIR = ("--proxy", "tiny-vit", "--target", "tiny-rn", "--device", "cpu")
SMALL = ("--limit", "80", "--held-out", "16", "--gap-images", "8", "--batch-size", "32")
SHORT = (*PAIR, *SMALL, "--epochs-a", "1", "--epochs-b", "1")
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def distill(cli: Cli, tmp_path: Path) -> Cli:
    """``distill("--eps", "4/255")`` on few images, into ``tmp_path / "out"`` unless an --out is given."""

    def call(*args: object) -> Outcome:
        out = () if "--out" in args else ("--out", tmp_path / "out")
        return cli("distill", *SHORT, *out, *args)

    return call


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    finished = subprocess.run(
        [*command(), *SHORT, "--out", str(out)], env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    (out.parent / "stdout").write_text(finished.stdout)
    (out.parent / "stderr").write_text(finished.stderr)
    return out


def command() -> list[str]:
    return [sys.executable, "-m", "vlmdefend", "distill"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


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
    monkeypatch.setattr(Run, "_step", lambda *args: pytest.fail("trained again"))
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


def same_weights(first: Path, second: Path) -> bool:
    one, two = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


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


# several processes


def test_torchrun_runs_the_same_command_gives_the_same_weights_and_finds_it_done(tmp_path: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vlmdefend",
    ]
    options = ["distill", *SHORT, "--out", str(tmp_path / "two")]
    for words in (("written",), ("found done",)):
        ended = subprocess.run([*launcher, *options], env=environment(), capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert all(ended.stdout.count(word) == 1 for word in words)  # one process speaks
    one = [*command(), *SHORT, "--micro-batch", "16", "--out", str(tmp_path / "one")]
    assert subprocess.run(one, env=environment(), capture_output=True, timeout=300).returncode == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert same_weights(tmp_path / "one" / "pivot", tmp_path / "two" / "pivot")


# interruptions


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    options = (*PAIR, "--limit", "120", "--held-out", "16", "--gap-images", "0", "--batch-size", "8")
    options = (*options, "--epochs-a", "1", "--epochs-b", "2", "--save-every", "2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out, kills in ((killed, 4), (whole, 0)):
        rng, hits = random.Random(3), 0
        for _ in range(kills):
            process = start(out, *options)
            wait_for_steps(out, process, steps(out))
            time.sleep(rng.uniform(0.0, 0.3))
            process.kill()
            process.communicate()
            hits += process.returncode == -signal.SIGKILL
        assert hits or not kills, "no kill hit a run, so this test proved nothing"
        process = start(out, *options)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name in (WEIGHTS, f"pivot/{WEIGHTS}"):
        assert same_weights((whole / name).parent, (killed / name).parent)
    for name in ("training/log.jsonl", "training/state.safetensors", "training/summary.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(), *options, "--out", str(out)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it else
    )


def steps(out: Path) -> int:
    log = out / "training" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_steps(out: Path, process: subprocess.Popen[str], before: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and steps(out) <= before + 2:
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.01)


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "out", *PAIR, *SMALL, "--epochs-a", "50")
    wait_for_steps(tmp_path / "out", process, 0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from there" in err
    assert "Traceback" not in err


# what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--proxy", "tiny-rn"), "--proxy and --target are both tiny-rn: a model has nothing to learn from itself"),
        (("--stage", "a", "--pivot", "x"), "--pivot: stage a makes the pivot"),
        (("--stage", "b"), "--stage b pulls towards a pivot: give --pivot OUT/pivot"),
        (("--stage", "b", "--pivot", "nowhere"), "--pivot nowhere: there is no such file or folder"),
        (("--stage", "c"), "--stage c: input should be 'both', 'a' or 'b'"),
        (("--profile", "papers"), "--profile papers: write paper, code or scaled"),
        (("--eps", "8"), "did you mean 8/255?"),
        (("--eps", "0"), "--eps and --alpha must be larger than 0"),
        (("--alpha", "eps*"), "--alpha eps*: write eps, eps/2, or a number such as 1/255"),
        (("--logit-scale", "-1"), "--logit-scale -1: write model, 1, or another positive number"),
        (("--pull", "1.5"), "--pull 1.5: must lie between 0 and 1"),
        (("--ema", "-0.1"), "--ema -0.1: must lie between 0 and 1"),
        (("--epochs-b", "0"), "--epochs-b 0: must be at least 1"),
        (("--direction", "both"), "--direction both: input should be 'proxy-first' or 'target-first'"),
        (("--split", "test"), "--split test: is what models are tested on"),
        (("--template", "a photo"), "--template 'a photo': has no {c}"),
        (("--track", "tensorbord"), "--track tensorbord: input should be"),
        (("--target", "tiny-rm"), "did you mean 'tiny-rn'"),
        (("--dataset", "fashon"), "did you mean 'fashion'"),
        (("--batch-norm", "train", "--micro-batch", "8"), "--batch-norm train needs the whole batch in one forward"),
        (("--precision", "float16"), "--precision float16: needs a GPU"),
    ],
)
def test_bad_input_is_one_sentence(distill: Cli, tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    outcome = distill(*options)
    assert outcome.code == 2
    assert outcome.out == ""
    assert sentence in one_sentence(outcome)
    assert not (tmp_path / "out").exists()


def test_too_many_tensors_are_one_sentence(distill: Cli) -> None:
    outcome = distill("--trains", "last:999")
    assert outcome.code == 2
    assert "--trains last:999: write image, all, or last:K with K from 1 to" in outcome.errors[0]


def test_without_weights_and_network_it_says_what_to_do(cli: Cli) -> None:
    outcome = cli("distill", "--proxy", "ViT-B/32", "--target", "RN50")
    assert outcome.code == 2
    sentence = one_sentence(outcome)
    assert "the weights of RN50 are not in" in sentence
    for help_ in (
        "open_clip.create_model('RN50-quickgelu', pretrained='openai')",
        "--weights FILE",
        "tiny-vit or tiny-rn",
    ):
        assert help_ in sentence


def test_other_settings_do_not_go_on_with_a_run(distill: Cli, tmp_path: Path) -> None:
    assert distill().code == 0
    outcome = distill("--lr-b", "0.5")
    assert outcome.code == 2
    assert "holds a run with lr_b = 0.01, now it is 0.5; give another --out" in outcome.errors[0]


@pytest.mark.parametrize("file", ["notes.txt", "open_clip_config.json"])
def test_a_folder_of_something_else_is_left_alone(distill: Cli, tmp_path: Path, file: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text("mine")
    outcome = distill()
    assert outcome.code == 2
    assert "give a new folder, so that nothing is lost" in outcome.errors[0]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == [file]


def test_the_dry_run_prints_the_cost_and_trains_nothing(distill: Cli, tmp_path: Path) -> None:
    outcome = distill("--dry-run")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["a", "1", "2", "192", "64"] in rows  # 64 images: 2 steps of the attack and 1 update; 1 forward of the proxy
    assert "Nothing was trained" in outcome.out
    assert "Memory about" in outcome.out
    assert not (tmp_path / "out").exists()


def test_a_warm_up_as_long_as_the_stage_is_warned_of(distill: Cli) -> None:
    outcome = distill("--profile", "code", "--batch-norm", "frozen", "--dry-run")
    assert "stage a has 2 steps, all of them warm-up: it never reaches its rate" in outcome.err


def test_a_proxy_that_generalises_less_well_is_warned_of(done: Path) -> None:
    summary = json.loads((done / "training" / "summary.json").read_text())["gap"]["clean"]
    err = (done.parent / "stderr").read_text()
    assert ("the proxy generalises less well than the target" in err) == (summary["proxy"][0] < summary["target"][0])


def test_a_tracker_that_is_not_installed_is_one_sentence(distill: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    outcome = distill("--track", "trackio")
    assert "--track trackio: the package is not installed; `pip install trackio`" in one_sentence(outcome)
