"""Accuracy on held-out images, and accuracy of models on the adversarial images of another model (proxy gap)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View, chunks
from vlmdefend.rng import ImageRng
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import Accuracies, HitCount, ProxyGap
from vlmdefend.types import Batch, Pipeline, Threat

WIDTH = 64  # images per forward


def accuracies(
    model: Pipeline, batch: Batch, eps: float, seed: int, processes: Processes, attack: Attack | None = None
) -> Accuracies:
    """Returns clean and robust accuracy of a pipeline, computed by all processes together.

    Every image is attacked and classified independently of the others, so the counts do not depend on the number of
    processes.

    Args:
        model: predicts over the classes of the labels.
        batch: images in [0, 1], the same in every process.
        eps: L_inf radius.
        seed: of the attack's start.
        processes: each measures a part of the images.
        attack: PGD-10 unless another is given.
    """
    mine = processes.share(list(range(len(batch.ids))))
    images, labels = batch.images[mine].to(processes.device), batch.labels[mine].to(processes.device)
    rng = ImageRng(seed, [batch.ids[i] for i in mine], "held out")
    view = View(model, rng, width=WIDTH)
    clean = view(images).argmax(dim=1) == labels if mine else torch.zeros(0, dtype=torch.bool)
    found = (attack or Pgd())(view, images, labels, Threat("linf", eps)) if mine else None
    robust = 0 if found is None else int((~found.fooled).sum())
    total = processes.sum_numbers({"clean": float(clean.sum()), "robust": float(robust)})
    n = len(batch.ids)
    return Accuracies(HitCount(int(total["clean"]), n), HitCount(int(total["robust"]), n))


def proxy_gap(
    target: str, models: Mapping[str, Pipeline], batch: Batch, eps: float, seed: int, attack: Attack | None = None
) -> ProxyGap:
    """Attacks one model and counts the clean and adversarial images that each model classifies correctly.

    As in Fu et al. 2026 (5.5 and Fig. 7), every image is attacked, also those that are misclassified, for all steps,
    and the last iterate is used: an attack that stops at its first success leaves images that are easier for the other
    models.

    Args:
        target: which of ``models`` is attacked.
        models: by name; all take images of the target's size.
        batch: images on the models' device.
        eps: L_inf radius.
        seed: of the attack's start.
        attack: PGD-10 with the last iterate, unless another is given.
    """
    view = View(models[target], ImageRng(seed, batch.ids, "proxy gap"), width=WIDTH, stop=False)
    found = (attack or Pgd(last=True))(view, batch.images, batch.labels, Threat("linf", eps)).images
    clean, adversarial = (
        {name: correct(model, images, batch) for name, model in models.items()} for images in (batch.images, found)
    )
    return ProxyGap(target, clean, adversarial)


def correct(model: Pipeline, images: Tensor, batch: Batch) -> HitCount:
    """Counts how many of (N, 3, H, W) ``images`` a pipeline classifies as the labels of ``batch``."""
    rng, hits = ImageRng(0, batch.ids, "deployed"), 0
    for chunk in chunks(len(batch.ids), WIDTH):
        with torch.no_grad():
            predicted = model(images[chunk], rng.select(chunk)).predictions
        hits += int((predicted == batch.labels[chunk]).sum())
    return HitCount(hits, len(batch.ids))
