"""The choices of a run: profiles, what is filled in, and names for folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmdefend.errors import UserError
from vlmdefend.training.settings import Settings, make_settings

PAIR = {"proxy": "ViT-B/32", "target": "RN50"}
TINY = {"proxy": "tiny-vit", "target": "tiny-rn"}


def test_the_line_of_the_brief_is_filled_in_for_real_models() -> None:
    settings = make_settings(PAIR)
    assert settings.profile == "scaled"
    assert settings.dataset == "tiny-imagenet"
    assert settings.out == Path("distilled/RN50-from-ViT-B-32")
    assert (settings.eps, settings.steps, settings.alpha) == ("1/255", 2, "eps")
    assert settings.scale is None
    assert settings.step_size == settings.radius == 1 / 255


def test_the_paper_profile_has_what_the_paper_prints() -> None:
    settings = make_settings(PAIR | {"profile": "paper"})
    assert (settings.radius, settings.steps, settings.batch_size) == (1 / 255, 2, 64)
    assert (settings.lr_a, settings.lr_b, settings.ema, settings.pull) == (5e-5, 5e-2, 0.9, 0.5)
    assert settings.epochs_a + settings.epochs_b == 10
    assert not settings.pull_first
    assert settings.direction == "target-first"
    assert settings.normalization == "imagenet"
    assert settings.templates == ("This is a photo of a {c}",)
    assert (settings.scale, settings.reduction) == (1.0, "sum")


def test_the_code_profile_has_the_defaults_of_the_last_commit() -> None:
    settings = make_settings(PAIR | {"profile": "code"})
    assert (settings.radius, settings.steps, settings.step_size) == (2 / 255, 5, 1 / 255)
    assert (settings.direction, settings.reduction, settings.scale) == ("proxy-first", "sum", None)
    assert (settings.pull_first, settings.batch_norm, settings.warm_up, settings.clip) == (True, "train", 1000, None)
    assert (settings.lr_a, settings.lr_b) == (5e-4, 5e-1)


def test_what_is_given_wins_over_the_profile() -> None:
    settings = make_settings(PAIR | {"profile": "paper", "eps": "4/255", "lr_b": 0.1, "clip": 2.0, "out": Path("x")})
    assert (settings.eps, settings.lr_b, settings.clip, settings.out) == ("4/255", 0.1, 2.0, Path("x"))
    assert settings.lr_a == 5e-5


def test_the_embedded_pair_has_sizes_of_its_own_in_our_profile_only() -> None:
    assert make_settings(TINY).eps == "8/255"
    assert make_settings(TINY).dataset == "fashion"
    assert make_settings(TINY | {"profile": "paper"}).eps == "1/255"


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [("eps", 8 / 255), ("eps/2", 4 / 255), ("0.5eps", 4 / 255), ("2/255", 2 / 255), ("0.01", 0.01)],
)
def test_the_step_size_is_read_as_people_write_it(alpha: str, expected: float) -> None:
    assert make_settings(TINY | {"alpha": alpha}).step_size == pytest.approx(expected)


def test_where_it_runs_may_change_what_comes_out_may_not() -> None:
    one, other = make_settings(TINY), make_settings(TINY | {"threads": 3, "micro_batch": 8, "save_every": 5})
    assert one.decisive() == other.decisive()
    assert one.decisive() != make_settings(TINY | {"seed": 1}).decisive()
    assert {"eps", "lr_b", "seed", "batch_size", "precision", "select"} <= set(one.decisive())


def test_a_braces_pair_means_the_class() -> None:
    assert make_settings(TINY | {"templates": ("a {}.",)}).templates == ("a {c}.",)


@pytest.mark.parametrize(("target", "out"), [("local-dir:/a/b c", "local-dir-a-b-c"), ("hf-hub:x/y", "hf-hub-x-y")])
def test_any_model_name_makes_a_folder_name(target: str, out: str) -> None:
    assert make_settings({"proxy": "tiny-vit", "target": target}).out.name == f"{out}-from-tiny-vit"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match="--nothing"):
        make_settings(TINY | {"nothing": 1})
    assert "nothing" not in Settings.model_fields
