"""The image sets of a run: training, selection and test sets, and which of them have labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmdefend.data import load_dataset
from vlmdefend.data.base import ImageSet
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models.classifier.backbones import Backbone
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.training.adaptation.data import same_classes, unlabelled
from vlmdefend.training.loop.data import TrainingImages
from vlmdefend.training.settings.adaptation_settings import UrdaSettings
from vlmdefend.types import Batch

LEAST = 4  # held-out images of a domain


@dataclass(frozen=True)
class AdaptationSets:
    """All image sets of a run, classes in the source's order."""

    source: ImageSet  # labelled
    target: ImageSet  # one label for all
    held_out: ImageSet  # of the target, to choose by; one label for all, or with --oracle the true ones
    tested: ImageSet  # of the target, labelled: measured on and nothing else
    source_tested: ImageSet  # of the source, likewise
    skip_bad: bool

    def reader(self, images: ImageSet, like: ImageClassifier | Backbone) -> TrainingImages:
        """Returns a reader of images at the size that ``like`` takes."""
        transform = PixelTransform(like.image_size, like.interpolation)
        return TrainingImages(images, transform, skip_bad=self.skip_bad)

    def batch(self, images: ImageSet, like: ImageClassifier | Backbone, device: torch.device) -> Batch:
        """Returns a whole set as one batch, on the device."""
        found = self.reader(images, like).batch(range(len(images)))
        return Batch(found.ids, found.images.to(device), found.labels.to(device))


def open_sets(settings: UrdaSettings) -> AdaptationSets:
    """Opens the sets of both domains.

    Raises:
        UserError: a set that cannot be had, other classes in the two, nothing left to train on.
    """

    def opened(name: str, split: str, limit: int | None) -> ImageSet:
        return load_dataset(name, split, limit=limit, root=settings.root)

    source = opened(settings.source, "train", settings.limit)
    labelled = same_classes(source, opened(settings.target, "train", None))
    blind = unlabelled(labelled).subset(settings.limit, settings.seed)
    if settings.held_out >= len(blind):
        raise UserError(f"--held-out {settings.held_out}: the target has {len(blind)} training images.")
    held = blind.subset(settings.held_out, settings.seed + 1) if settings.held_out else blind.select([])
    apart = frozenset(held.ids)
    target = blind.select([i for i, name in enumerate(blind.ids) if name not in apart])
    if settings.select == "oracle":  # the one place where target labels come in, because --oracle was given
        place = {name: i for i, name in enumerate(labelled.ids)}
        held = labelled.select([place[name] for name in held.ids])
    tested = same_classes(source, opened(settings.target, settings.eval_split, settings.eval_limit))
    source_tested = opened(settings.source, settings.eval_split, settings.eval_limit)
    for images in (tested, source_tested):
        if len(images) < LEAST:
            raise UserError(
                f"{images.name}, split {images.split}: {len(images)} images to measure on, {LEAST} are the least that "
                "the distance of the domains needs; give a larger --eval-limit or another --eval-split."
            )
    return AdaptationSets(source, target, held, tested, source_tested, settings.skip_bad)
