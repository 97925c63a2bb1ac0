"""The choices of a run: profiles, what is filled in, and names for folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmdefend.errors import UserError
from vlmdefend.training.settings.adaptation_settings import make_urda_settings
from vlmdefend.training.settings.distill_settings import DistillSettings, make_distill_settings
from vlmdefend.training.settings.run_settings import RunSettings
from vlmdefend.training.settings.train_settings import make_train_settings

PAIR = {"proxy": "ViT-B/32", "target": "RN50"}
TINY = {"proxy": "tiny-vit", "target": "tiny-rn"}
Make = Callable[[dict[str, Any]], RunSettings]
COMMANDS: list[tuple[Make, dict[str, Any]]] = [
    (make_distill_settings, TINY),
    (make_train_settings, {"method": "tecoa", "model": "tiny-vit"}),
    (make_urda_settings, {"source": "mnist", "target": "uci-digits"}),
]


def test_the_line_of_the_brief_is_filled_in_for_real_models() -> None:
    settings = make_distill_settings(PAIR)
    assert settings.profile == "scaled"
    assert settings.dataset == "tiny-imagenet"
    assert settings.out == Path("distilled/RN50-from-ViT-B-32")
    assert (settings.eps, settings.steps, settings.alpha) == ("1/255", 2, "eps")
    assert settings.scale is None
    assert settings.step_size == settings.radius == 1 / 255


def test_the_paper_profile_has_what_the_paper_prints() -> None:
    settings = make_distill_settings(PAIR | {"profile": "paper"})
    assert (settings.radius, settings.steps, settings.batch_size) == (1 / 255, 2, 64)
    assert (settings.lr_a, settings.lr_b, settings.ema, settings.pull) == (5e-5, 5e-2, 0.9, 0.5)
    assert settings.epochs_a + settings.epochs_b == 10
    assert not settings.pull_first
    assert settings.direction == "target-first"
    assert settings.normalization == "imagenet"
    assert settings.templates == ("This is a photo of a {c}",)
    assert (settings.scale, settings.reduction) == (1.0, "sum")


def test_the_code_profile_has_the_defaults_of_the_last_commit() -> None:
    settings = make_distill_settings(PAIR | {"profile": "code"})
    assert (settings.radius, settings.steps, settings.step_size) == (2 / 255, 5, 1 / 255)
    assert (settings.direction, settings.reduction, settings.scale) == ("proxy-first", "sum", None)
    assert (settings.pull_first, settings.batch_norm, settings.warm_up, settings.clip) == (True, "train", 1000, None)
    assert (settings.lr_a, settings.lr_b) == (5e-4, 5e-1)


def test_what_is_given_wins_over_the_profile() -> None:
    settings = make_distill_settings(
        PAIR | {"profile": "paper", "eps": "4/255", "lr_b": 0.1, "clip": 2.0, "out": Path("x")}
    )
    assert (settings.eps, settings.lr_b, settings.clip, settings.out) == ("4/255", 0.1, 2.0, Path("x"))
    assert settings.lr_a == 5e-5


def test_the_embedded_pair_has_sizes_of_its_own_in_our_profile_only() -> None:
    assert make_distill_settings(TINY).eps == "8/255"
    assert make_distill_settings(TINY).dataset == "fashion"
    assert make_distill_settings(TINY | {"profile": "paper"}).eps == "1/255"


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [("eps", 8 / 255), ("eps/2", 4 / 255), ("0.5eps", 4 / 255), ("2/255", 2 / 255), ("0.01", 0.01)],
)
def test_the_step_size_is_read_as_people_write_it(alpha: str, expected: float) -> None:
    assert make_distill_settings(TINY | {"alpha": alpha}).step_size == pytest.approx(expected)


def test_where_it_runs_may_change_what_comes_out_may_not() -> None:
    one, other = (
        make_distill_settings(TINY),
        make_distill_settings(TINY | {"threads": 3, "micro_batch": 8, "save_every": 5}),
    )
    assert one.decisive() == other.decisive()
    assert one.decisive() != make_distill_settings(TINY | {"seed": 1}).decisive()
    assert {"eps", "lr_b", "seed", "batch_size", "precision", "select"} <= set(one.decisive())


def test_a_braces_pair_means_the_class() -> None:
    assert make_distill_settings(TINY | {"templates": ("a {}.",)}).templates == ("a {c}.",)


@pytest.mark.parametrize(("target", "out"), [("local-dir:/a/b c", "local-dir-a-b-c"), ("hf-hub:x/y", "hf-hub-x-y")])
def test_any_model_name_makes_a_folder_name(target: str, out: str) -> None:
    assert make_distill_settings({"proxy": "tiny-vit", "target": target}).out.name == f"{out}-from-tiny-vit"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match="--nothing"):
        make_distill_settings(TINY | {"nothing": 1})
    assert "nothing" not in DistillSettings.model_fields


@pytest.mark.parametrize(("make", "needs"), COMMANDS, ids=["distill", "train", "urda-train"])
@pytest.mark.parametrize(
    ("name", "wrong", "right", "sentence"),
    [
        ("batch_size", 0, 2, "--batch-size 0: must be at least 1."),
        ("limit", 0, 1, "--limit 0: must be at least 1."),
        ("held_out", -1, 0, "--held-out -1: must be zero or more."),
        ("weight_decay", -0.1, 0.0, "--weight-decay -0.1: must be zero or more."),
        ("clip", 0.0, 1e-9, "--clip 0.0: must be above zero; give such a number, or leave it out."),
        ("momentum", 1.1, 1.0, "--momentum 1.1: must lie between 0 and 1."),
        ("seed", 2**64, 2**32 - 1, f"--seed {2**64}: must be a whole number from 0 to 4294967295."),
        ("seed", -1, 0, "--seed -1: must be a whole number from 0 to 4294967295."),
        ("alpha", "eps/0", "eps/1", "--alpha eps/0: write eps, eps/2, or a number such as 1/255."),
        ("alpha", "2eps/0.0", "2eps/8.0", "--alpha 2eps/0.0: write eps, eps/2, or a number such as 1/255."),
        ("alpha", "eps*", ".5*eps/2", "--alpha eps*: write eps, eps/2, or a number such as 1/255."),
    ],
)
def test_what_the_commands_share_is_refused_in_the_same_words(
    make: Make, needs: dict[str, Any], name: str, wrong: Any, right: Any, sentence: str
) -> None:
    with pytest.raises(UserError) as raised:
        make(needs | {name: wrong})
    assert str(raised.value) == sentence
    assert getattr(make(needs | {name: right}), name) == right


@pytest.mark.parametrize(("make", "needs"), COMMANDS[:2], ids=["distill", "train"])
def test_the_best_epoch_is_chosen_by_held_out_images(make: Make, needs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^--select best: chooses by held-out images; give --held-out 500"):
        make(needs | {"select": "best", "held_out": 0})
    assert make(needs | {"select": "best", "held_out": 1}).held_out == 1
    assert make(needs | {"select": "last", "held_out": 0}).held_out == 0


def test_each_number_of_a_list_is_checked_under_the_options_name() -> None:
    with pytest.raises(UserError, match=r"^--mix 1.5: must lie between 0 and 1.$"):
        make_train_settings({"method": "tecoa", "model": "tiny-vit", "mix": (0.5, 1.5)})
