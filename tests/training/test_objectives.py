"""The contract of every registered objective: a new file is held to it without a new test."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.training.conftest import batch_of, classifier, student_of
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.base import Terms
from vlmdefend.errors import UnknownName
from vlmdefend.models.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng

NAMES = OBJECTIVES.names()


def terms_of(name: str, target: VisionLanguageModel, proxy: VisionLanguageModel, rows: list[int]) -> Terms:
    batch, objective = batch_of(6), OBJECTIVES.create(name)
    part = batch._replace(ids=[batch.ids[i] for i in rows], images=batch.images[rows], labels=batch.labels[rows])
    teacher: Any = {"proxy": classifier(proxy), "original": classifier(target), "none": None}[objective.teacher]
    return objective.losses(student_of(target), teacher, part, ImageRng(0, part.ids, "contract"))


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
    assert objective.cost.forward_backwards >= 1


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_is_left_anywhere_before_the_loss_is_sent_back(
    name: str, target: VisionLanguageModel, proxy: VisionLanguageModel
) -> None:
    before = {k: v.clone() for k, v in target.clip.state_dict().items()}
    terms_of(name, target, proxy, [0, 1])
    assert all(p.grad is None for model in (target, proxy) for p in model.clip.parameters())
    assert all(torch.equal(v, before[k]) for k, v in target.clip.state_dict().items())
