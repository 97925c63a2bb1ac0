"""Accuracies on held-out target images, and the terms of the error bound that can be estimated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View, chunks
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.training.loop.results import HitCount
from vlmdefend.types import Batch, Pipeline, Threat

WIDTH = 64
STEPS = 20


class TargetNumbers(NamedTuple):
    """Clean and robust accuracies of a model on held-out target images."""

    clean: HitCount
    true_labels: HitCount  # right after PGD against the true labels
    pseudo_labels: HitCount  # right after PGD against the teacher's classes
    worst: HitCount  # right at the clean image and after both
    disagreement: HitCount  # other class than the teacher's after PGD against that class: A_T, from below

    def spec(self) -> dict[str, list[int]]:
        """Returns the numbers as JSON."""
        return {name: list(value) for name, value in self._asdict().items()}

    @classmethod
    def read(cls, written: dict[str, Sequence[int]]) -> TargetNumbers:
        """Reads what :meth:`spec` returned."""
        return cls(**{name: HitCount(*value) for name, value in written.items()})


class DomainDistance(NamedTuple):
    """The error of a linear classifier between the domains, on held-out images."""

    errors: int
    n: int

    @property
    def distance(self) -> float:
        """The proxy A-distance 2 (1 - 2 error), at least 0 (Ben-David et al. 2007, section 4)."""
        return max(0.0, 2.0 * (1.0 - 2.0 * self.errors / self.n))


def target_numbers(
    model: Pipeline, batch: Batch, pseudo: Tensor, eps: float, seed: int, attack: Attack | None = None
) -> TargetNumbers:
    """Attacks with both kinds of labels and measures; the scored model is the attacked one.

    Args:
        model: pixels to outputs, in evaluation mode.
        batch: held-out target images with their true labels, on the model's device.
        pseudo: (N,) the teacher's classes at the clean images.
        eps: L_inf radius.
        seed: of the attack's starts.
        attack: PGD-20 with the best iterate, unless another is given.

    Raises:
        UserError: the identity robust >= teacher's clean - disagreement fails: model or batch were exchanged.
    """
    chosen = attack or Pgd(steps=STEPS)
    right = _predicted(model, batch.images, batch.ids) == batch.labels
    survived, disagreed = {}, 0
    for kind, labels in (("true", batch.labels), ("pseudo", pseudo)):
        view = View(model, ImageRng(seed, batch.ids, f"urda {kind}"), width=WIDTH)
        images = chosen(view, batch.images, labels, Threat("linf", eps)).images
        found = _predicted(model, images, batch.ids)
        survived[kind] = found == batch.labels
        disagreed = int((found != pseudo).sum())
        check_agreement(int(survived[kind].sum()), int((pseudo == batch.labels).sum()), disagreed)
    n, worst = len(batch.ids), right & survived["true"] & survived["pseudo"]
    clean, true, fooled, least = (
        HitCount(int(hits.sum()), n) for hits in (right, survived["true"], survived["pseudo"], worst)
    )
    return TargetNumbers(clean, true, fooled, least, HitCount(disagreed, n))


def check_agreement(robust: int, teacher_clean: int, disagreed: int) -> None:
    """Accuracy at x_adv is at least the teacher's accuracy minus the disagreement with the teacher.

    An identity of counts on one batch. It can only fail if attack, score and teacher saw different images or models.

    Raises:
        UserError: it fails.
    """
    if robust < teacher_clean - disagreed:
        raise UserError(
            f"{robust} images are right under attack, fewer than the {teacher_clean} that the teacher has right "
            f"less the {disagreed} on which the model differs: attack and score saw other images or models; report it."
        )


def domain_distance(source: Tensor, target: Tensor, seed: int = 0, ridge: float = 1e-3) -> DomainDistance:
    """Fits a logistic regression between the domains on half of the features, counts errors on the other half.

    Args:
        source: (N, D) features of held-out source images.
        target: (M, D) features of held-out target images.
        seed: of the halves.
        ridge: weight of the squared norm of its weights.

    Raises:
        UserError: fewer than four images of a domain.
    """
    count = min(len(source), len(target))
    if count < 4:
        raise UserError(f"the distance of domains needs four held-out images of each; there are {count}.")
    parts = [
        features[_permutation(len(features), seed, k)[:count]].double() for k, features in enumerate((source, target))
    ]
    half = count // 2
    train, test = torch.cat([p[:half] for p in parts]), torch.cat([p[half:] for p in parts])
    mean, std = train.mean(dim=0), train.std(dim=0).clamp_min(1e-9)
    weights = _logistic((train - mean) / std, _truth(half, train), ridge)
    logits = ((test - mean) / std) @ weights[:-1] + weights[-1]
    truth = _truth(count - half, test)
    return DomainDistance(int(((logits > 0) != (truth > 0.5)).sum()), len(truth))


def bound_terms(teacher: Any, source: Batch, target: Batch, disagreement: HitCount, seed: int) -> dict[str, Any]:
    """R_T^adv(h) <= R_S(g) + d/2 + lambda* + A_T(h, g), term by term, as counts; lambda* needs labels of both domains.

    Args:
        teacher: g, images to outputs.
        source: held-out source images.
        target: held-out target images; their labels give R_T(g), which the first three terms bound.
        disagreement: A_T, from below.
        seed: of the halves that the domain classifier is fitted and evaluated on.
    """
    distance = domain_distance(features_at(teacher, source), features_at(teacher, target), seed)
    return {
        "source_accuracy": list(accuracy(teacher, source)),
        "target_accuracy": list(accuracy(teacher, target)),
        "domain_errors": list(distance),
        "disagreement": list(disagreement),
    }


def features_at(outputs: Any, batch: Batch) -> Tensor:
    """Returns (N, D) features of a batch, or logits where the model gives no features."""
    parts = []
    with torch.no_grad():
        for part in chunks(len(batch.ids), WIDTH):
            found = outputs(batch.images[part])
            parts.append((found.logits if found.features is None else found.features).flatten(1))
    return torch.cat(parts)


def accuracy(outputs: Any, batch: Batch) -> HitCount:
    """Returns the accuracy on clean images."""
    hits = 0
    with torch.no_grad():
        for part in chunks(len(batch.ids), WIDTH):
            hits += int((outputs(batch.images[part]).logits.argmax(dim=1) == batch.labels[part]).sum())
    return HitCount(hits, len(batch.ids))


def _predicted(model: Pipeline, images: Tensor, ids: list[str]) -> Tensor:
    rng, parts = ImageRng(0, ids, "deployed"), []
    with torch.no_grad():
        for part in chunks(len(ids), WIDTH):
            parts.append(model(images[part], rng.select(part)).predictions)
    return torch.cat(parts)


def _logistic(points: Tensor, truth: Tensor, ridge: float) -> Tensor:
    """Returns the (D + 1,) weights and bias at the minimum, by L-BFGS."""
    weights = torch.zeros(points.shape[1] + 1, dtype=points.dtype, device=points.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = points @ weights[:-1] + weights[-1]
        loss = F.binary_cross_entropy_with_logits(logits, truth) + ridge * weights[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def _truth(count: int, like: Tensor) -> Tensor:
    return torch.cat([like.new_ones(count), like.new_zeros(count)])


def _permutation(count: int, seed: int, domain: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}\0domain distance\0{domain}".encode()).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))
