"""Scores a saved set on any model: an attack that returns its images, and the cells of ``--adversarial``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View
from vlmdefend.data.base import ImageSet
from vlmdefend.defenses.composed import create_defense
from vlmdefend.errors import UserError
from vlmdefend.evaluation.adversarial_sets.adversarial_set import AdversarialSet
from vlmdefend.evaluation.adversarial_sets.set_format import IndexRow, clean_hash
from vlmdefend.evaluation.grid.grid import Grid, read_class_names
from vlmdefend.evaluation.grid.planned import Plan, PlannedCell, check_templates
from vlmdefend.evaluation.grid.protocol import Protocol, get_protocol
from vlmdefend.evaluation.store.environment import choose_device
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import NORMS, Norm, Threat

FIXED = ("attack", "attacker", "eps", "norm", "steps", "limit", "full", "skip_bad")  # options that a saved set fixes


@dataclass(frozen=True, kw_only=True)
class SavedImages(Attack):
    """An attack that returns the images of a saved set; not in the registry, since it needs a set.

    Raises:
        UserError: the clean images are not those that were attacked, or saved images are outside the budget.
    """

    name: ClassVar[str] = "saved"
    summary: ClassVar[str] = "images of `vlmdefend attack`, scored as they were saved"
    citation: ClassVar[str] = "–"
    norms: ClassVar[tuple[Norm, ...]] = NORMS
    gradient_free: ClassVar[bool] = (
        False  # True would mean that the images were found by queries of the scored pipeline
    )
    source: AdversarialSet

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the saved images whose ids belong to the random streams of ``rng``."""
        rows = [self._by_name[name] for name in rng.names]
        found = self.source.images(rows)
        if found.shape != images.shape:
            raise UserError(
                f"{self.source.folder}: its images are {_size(found)} pixels, the model takes {_size(images)}; craft a "
                "set for it with `vlmdefend attack`."
            )
        found = found.to(images.device)
        for row, pixels in zip(rows, images, strict=True):
            if clean_hash(pixels) != row.clean_hash:
                raise UserError(
                    f"{self.source.folder}: the clean image {row.id!r} has other pixels here than when it was attacked "
                    "(another --protocol, another resize of the model, or a changed data set); craft the set again."
                )
        if not threat.contains(found, images).all():
            raise UserError(f"{self.source.folder}: holds images outside its own budget; craft it again.")
        return found

    @property
    def blind(self) -> bool:
        """True: it makes no query."""
        return True

    @property
    def keeps_best(self) -> bool:
        """False: the saved image is scored."""
        return False

    def spec(self) -> dict[str, Any]:
        """Returns the source of the images, by name and by hash."""
        manifest = self.source.manifest
        fields = ("model", "weights_hash", "defense", "defense_config", "attack", "attack_config", "attacker", "seed")
        about = {f"source_{name}": getattr(manifest.cell, name) for name in fields}
        attacked = manifest.clean_correct  # the other images are in the set unchanged, and count as robust where right
        return {"source": manifest.source, "set": self.source.hash, "source_attacked": attacked, **about}

    @cached_property
    def _by_name(self) -> dict[str, IndexRow]:
        return {opaque(row.id): row for row in self.source.rows}


def plan_saved(grid: Grid) -> Plan:
    """Returns the cells of ``--adversarial``: every set on every model behind every defense.

    Data set, prompts, protocol, norm and eps are those of the sets. ``--dataset`` and ``--split`` name the same images
    where they have another name here; ``--template`` and ``--classes`` change the prompts.

    Raises:
        UserError: an option that a set fixes, a set that cannot be read, or images other than those of the set.
    """
    from vlmdefend.models.names import check_name

    given = grid.model_fields_set
    if fixed := [name for name in FIXED if name in given and getattr(grid, name) not in (None, False)]:
        option = fixed[0].replace("_", "-")
        raise UserError(f"--{option}: a saved set is scored as it is, so leave it out with --adversarial.")
    if "dataset" in given and len(grid.dataset) > 1:
        raise UserError("--dataset: give one name with --adversarial: the data set that the sets were crafted on.")
    choose_device(grid.device)
    for name in grid.model:
        check_name(name, weights=grid.weights)
    defenses = [create_defense(text) for text in grid.defense]
    sets = [AdversarialSet.open(folder) for folder in grid.adversarial or ()]
    protocol = _protocol(grid, sets)
    dataset, split = (grid.dataset[0] if "dataset" in given else None), (grid.split if "split" in given else None)
    classes = None if grid.classes is None else tuple(read_class_names(grid.classes))
    cells = []
    known: dict[tuple[Any, ...], ImageSet] = {}  # sets of the same images share one ImageSet, which is then hashed once
    for source in sets:
        images = source.clean(dataset, split, grid.root)
        if classes is not None:
            if len(classes) != len(images.class_names):
                raise UserError(
                    f"--classes {grid.classes}: has {len(classes)} names, {source.folder} has "
                    f"{len(images.class_names)} classes; give one name per class."
                )
            images = replace(images, class_names=classes)
        images = known.setdefault((images.name, images.split, images.ids_hash, images.class_names), images)
        cell = source.manifest.cell
        cells += [
            PlannedCell(model, images, defense, SavedImages(source=source), "transfer", cell.norm, cell.eps, seed)
            for model in grid.model
            for defense in defenses
            for seed in grid.seed
        ]
    cells.sort(key=lambda planned: grid.model.index(planned.model))  # one model at a time
    return Plan(grid, protocol, cells)


def _protocol(grid: Grid, sets: list[AdversarialSet]) -> Protocol:
    """Returns the protocol of the sets, unless another one is given."""
    given = grid.model_fields_set
    protocol = get_protocol(grid.protocol) if "protocol" in given else sets[0].manifest.protocol
    if "protocol" not in given and any(one.manifest.protocol != protocol for one in sets):
        raise UserError("--adversarial: the sets have several protocols; score them one by one.")
    if grid.templates is None:
        return protocol
    chosen = grid.templates if grid.templates == "dataset" else tuple(grid.templates)
    return protocol.with_templates(check_templates(chosen))


def _size(images: Tensor) -> str:
    return f"{images.shape[-1]}x{images.shape[-2]}"
