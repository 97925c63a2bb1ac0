"""The summary of a run: accuracies of teacher and student, and the terms of the bound, as JSON."""

from __future__ import annotations

from typing import Any

import torch

from vlmdefend.errors import UserError
from vlmdefend.models.backbone_names import load_backbone
from vlmdefend.models.classifier.classifier import ClassifierModel
from vlmdefend.training.adaptation.measure import TargetNumbers, bound_terms, target_numbers
from vlmdefend.training.adaptation.sets import AdaptationSets
from vlmdefend.training.adaptation.teacher import FrozenTeacher, TeacherPipeline, as_teacher, predictions
from vlmdefend.training.loop.processes import is_out_of_memory
from vlmdefend.training.settings.adaptation_settings import UrdaSettings


def summary_of(
    settings: UrdaSettings,
    sets: AdaptationSets,
    teacher: FrozenTeacher | None,
    student: ClassifierModel | None,
    device: torch.device,
) -> dict[str, Any]:
    """Returns three accuracies of either model and the terms of the bound, as JSON.

    Raises:
        UserError: memory does not suffice.
    """
    try:
        return _measured(settings, sets, teacher, student, device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    raise UserError(
        f"out of memory while the {len(sets.tested)} test images were judged, all of them on {device}; the training is "
        "saved: run the same command again in a fresh process, or with --eval-limit and another --out, or --device cpu."
    )


def _measured(
    settings: UrdaSettings,
    sets: AdaptationSets,
    teacher: FrozenTeacher | None,
    student: ClassifierModel | None,
    device: torch.device,
) -> dict[str, Any]:
    class_names = sets.source.class_names
    like = load_backbone(settings.backbone, pretrained=False) if student is None else student.classifier
    batch = sets.batch(sets.tested, like, device)
    guesses = teacher
    if guesses is None:
        assert student is not None
        guesses = as_teacher(student, class_names)
    pseudo = predictions(guesses, batch)
    numbers: dict[str, TargetNumbers] = {}
    if teacher is not None:
        pipeline = TeacherPipeline(teacher, len(class_names))
        numbers["before"] = target_numbers(pipeline, batch, pseudo, settings.radius, settings.seed)
    if student is not None:
        deployed = student.zero_shot(class_names, ())
        numbers["after"] = target_numbers(deployed, batch, pseudo, settings.radius, settings.seed)
    theory: dict[str, Any] = {}
    if teacher is not None:
        source = sets.batch(sets.source_tested, like, device)
        last = numbers.get("after", numbers["before"])
        theory = bound_terms(teacher, source, batch, last.disagreement, settings.seed)
    found = {name: n.spec() for name, n in numbers.items()}
    return {"pseudo_labels_of": guesses.name, **found, "theory": theory}
