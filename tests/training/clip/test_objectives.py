"""Contract tests that run for every registered objective."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.training.conftest import batch_of, classifier, parts_of, student_of
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.base import Terms
from vlmdefend.errors import UnknownName
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng

NAMES = OBJECTIVES.names()


def terms_of(name: str, target: VisionLanguageModel, proxy: VisionLanguageModel, rows: list[int]) -> Terms:
    """Returns the loss terms of some images, with a new student; it is the ViT if deep prompts are learned."""
    batch, objective = batch_of(6), OBJECTIVES.create(name)
    part = batch._replace(ids=[batch.ids[i] for i in rows], images=batch.images[rows], labels=batch.labels[rows])
    teacher: Any = {"proxy": classifier(proxy), "original": classifier(target), "none": None}[objective.teacher]
    model = deepcopy(proxy if "deep" in objective.learns else target)
    return objective.losses(student_of(model, parts_of(name)), teacher, part, ImageRng(0, part.ids, "contract"))


def test_hpt_gpd_is_found_by_name() -> None:
    assert "hpt-gpd" in NAMES
    with pytest.raises(UnknownName, match="did you mean 'hpt-gpd'"):
        OBJECTIVES.create("hpt-gdp")


@pytest.mark.parametrize("name", NAMES)
def test_its_configuration_is_its_fields_and_makes_it_again(name: str) -> None:
    objective = OBJECTIVES.create(name)
    assert dataclasses.is_dataclass(objective)
    assert type(objective)(**objective.spec()) == objective
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.name = "other"  # type: ignore[misc]
    assert all(getattr(objective, text) for text in ("name", "summary", "citation"))
    assert objective.cost.forward_backwards + objective.cost.once >= 1


@pytest.mark.parametrize("name", [name for name in NAMES if not OBJECTIVES.create(name).whole_batch])
def test_losses_are_per_image_and_do_not_depend_on_the_others_in_the_batch(
    name: str, target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    whole, part = terms_of(name, target, proxy, list(range(6))), terms_of(name, target, proxy, [2, 4])
    for term, values in (whole.losses | whole.metrics).items():
        assert values.shape == (6,), term
        assert values.isfinite().all()
        assert torch.allclose(values[[2, 4]], (part.losses | part.metrics)[term], atol=1e-4), term
    assert all(values.requires_grad for values in whole.losses.values())
    assert not any(values.requires_grad for values in whole.metrics.values())


@pytest.mark.parametrize("name", [name for name in NAMES if OBJECTIVES.create(name).whole_batch])
def test_losses_that_need_the_whole_batch_depend_on_the_others_but_not_on_their_order(
    name: str, target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    order = [3, 0, 5, 1, 4, 2]
    whole, turned = (terms_of(name, target, proxy, rows) for rows in (list(range(6)), order))
    part = terms_of(name, target, proxy, [0, 1, 2])
    for term, values in whole.losses.items():
        assert values.shape == (6,)
        assert torch.allclose(values[order], turned.losses[term], atol=1e-4), term
        assert values.requires_grad
    assert not all(torch.allclose(whole.losses[t][:3], values, atol=1e-4) for t, values in part.losses.items())


@pytest.mark.parametrize("name", NAMES)
def test_computing_the_losses_leaves_no_gradients_and_changes_no_weight(
    name: str, target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    batch, objective = batch_of(2), OBJECTIVES.create(name)
    teacher: Any = {"proxy": classifier(proxy), "original": classifier(target), "none": None}[objective.teacher]
    model = proxy if "deep" in objective.learns else target
    student = student_of(model, parts_of(name))
    before = {k: v.clone() for k, v in model.clip.state_dict().items()}
    objective.losses(student, teacher, batch, ImageRng(0, batch.ids, "contract"))
    assert all(p.grad is None for one in (target, proxy) for p in one.clip.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.clip.state_dict().items())
