"""Scores an epoch by predictions on held-out target images; their labels are read only with ``--oracle``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View, chunks
from vlmdefend.defenses.adaptation.dart_urda import certainty
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.training.adaptation.teacher import FrozenTeacher, predictions
from vlmdefend.training.loop.results import Accuracies, HitCount
from vlmdefend.training.settings.adaptation_settings import Select
from vlmdefend.types import Batch, Threat

WIDTH = 64
SURE = 0.5  # certainty (1 - normalised entropy) from which an image counts


def selection_score(
    select: Select,
    classifier: ImageClassifier,
    teacher: FrozenTeacher | None,
    batch: Batch,
    eps: float,
    seed: int,
) -> Callable[[], Accuracies]:
    """Returns the score of an epoch: counts at clean and PGD-10 images; the best by (adversarial, clean) is kept.

    ``agreement`` counts the teacher's class, ``oracle`` the true one (``batch`` then holds it), ``entropy`` images
    whose prediction is sure, whatever it is; the attack is then on the model's own class.

    Args:
        batch: held-out target images, on the device.
        eps: radius; 0: there is no attack.
    """
    fixed = batch.labels if select == "oracle" else None
    if select == "agreement":
        assert teacher is not None
        fixed = predictions(teacher, batch)

    def score() -> Accuracies:
        logits = _logits(classifier, batch.images)
        labels = logits.argmax(dim=1) if fixed is None else fixed
        images = batch.images
        if eps > 0:
            view = View(classifier, ImageRng(seed, batch.ids, "held out"), width=WIDTH)
            images = Pgd(last=fixed is None)(view, images, labels, Threat("linf", eps)).images
        moved = _logits(classifier, images)
        n = len(batch.ids)
        return Accuracies(HitCount(_hits(logits, fixed), n), HitCount(_hits(moved, fixed), n))

    return score


def _hits(logits: Tensor, labels: Tensor | None) -> int:
    hits = certainty(logits) >= SURE if labels is None else logits.argmax(dim=1) == labels
    return int(hits.sum())


def _logits(classifier: ImageClassifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([classifier(images[part]).logits for part in chunks(len(images), WIDTH)])
