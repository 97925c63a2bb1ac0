"""The images of two domains: labelled source and unlabelled target, drawn together; and their class lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch

from vlmdefend.data.base import ImageSet
from vlmdefend.defenses.adaptation.base import UNKNOWN
from vlmdefend.errors import UserError
from vlmdefend.training.loop.data import TrainingImages, epoch_order
from vlmdefend.types import Batch

SOURCE, TARGET = "source/", "target/"
AGAIN = "\0"  # what follows in an id is the number of the pass in which the image comes again in one epoch


class ImageRef(NamedTuple):
    """One image of an epoch: its index in the set, and the number of the pass over the set."""

    at: int
    turn: int


class ImageRefs(NamedTuple):
    """One image of each domain; None for a domain that is not used."""

    source: ImageRef | None
    target: ImageRef | None


class DomainImages:
    """Batches of source images, then target images, whose label is unknown: B of each in a batch of size B.

    The two domains are drawn independently: the target's images and order are the same whatever the source is, and
    without one. A set that is smaller than the epoch is gone through again, in another order.

    Args:
        source: labelled; None: not used.
        target: its labels are not read; None: not used.
        epoch: images of each domain in an epoch.
    """

    def __init__(self, source: TrainingImages | None, target: TrainingImages | None, epoch: int) -> None:
        if source is None and target is None:
            raise UserError("an epoch needs images of one domain at least.")
        self.source, self.target, self.epoch = source, target, epoch

    def __len__(self) -> int:
        return self.epoch

    def order(self, seed: int, purpose: str) -> list[ImageRefs]:
        """Returns the order of an epoch, a function of seed and purpose."""
        source = [None] * self.epoch if self.source is None else self._turns(len(self.source), seed, f"{purpose}/s")
        target = [None] * self.epoch if self.target is None else self._turns(len(self.target), seed, f"{purpose}/t")
        return [ImageRefs(*pair) for pair in zip(source, target, strict=True)]

    def batch(self, places: Sequence[ImageRefs]) -> Batch:
        """Returns the images of both domains, on the CPU."""
        parts = []
        if self.source is not None:
            parts.append(_read(self.source, [p.source for p in places if p.source is not None], SOURCE))
        if self.target is not None:
            found = _read(self.target, [p.target for p in places if p.target is not None], TARGET)
            parts.append(found._replace(labels=torch.full_like(found.labels, UNKNOWN)))
        ids = [name for part in parts for name in part.ids]
        return Batch(ids, torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))

    def stream(self, parts: Sequence[Sequence[ImageRefs]]) -> Iterator[Batch]:
        """Yields batches; the next one is read while the last one is used."""
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.batch, part) for part in parts[:1]]
            for following in [*parts[1:], None][: len(parts)]:
                ready = ahead.pop().result()
                if following is not None:
                    ahead.append(reader.submit(self.batch, following))
                yield ready

    def _turns(self, count: int, seed: int, purpose: str) -> list[ImageRef]:
        turns = -(-self.epoch // count)
        places = [ImageRef(i, turn) for turn in range(turns) for i in epoch_order(count, seed, f"{purpose}/{turn}")]
        return places[: self.epoch]


def _read(images: TrainingImages, places: Sequence[ImageRef], prefix: str) -> Batch:
    batch = images.batch([place.at for place in places])
    if len(batch.ids) < len(places):  # some were skipped as bad
        return batch._replace(ids=[prefix + name for name in batch.ids])
    names = [
        prefix + name + (f"{AGAIN}{place.turn}" if place.turn else "")
        for name, place in zip(batch.ids, places, strict=True)
    ]
    return batch._replace(ids=names)


def image_id(written: str) -> str:
    """Returns the id of a target image in its set, from its id in a batch."""
    return written.removeprefix(TARGET).partition(AGAIN)[0]


def unlabelled(images: ImageSet) -> ImageSet:
    """Returns the images with one label for all, so that nothing can depend on their classes."""
    return replace(images, labels=(0,) * len(images))


def same_classes(source: ImageSet, target: ImageSet) -> ImageSet:
    """Returns the target with its classes in the source's order.

    Raises:
        UserError: the two sets do not have the same class names.
    """
    own, other = source.class_names, target.class_names
    if sorted(own) != sorted(other):
        apart = sorted(set(own) ^ set(other))
        raise UserError(
            f"source {source.name} has {len(own)} classes and target {target.name} {len(other)}, and {apart[0]!r} is "
            "in one of them only; closed-set adaptation needs the same class names in both (classes.txt can rename "
            "those of a folder)."
        )
    place = {name: own.index(name) for name in own}
    labels = tuple(place[other[label]] for label in target.labels)
    return replace(target, class_names=own, labels=labels)
