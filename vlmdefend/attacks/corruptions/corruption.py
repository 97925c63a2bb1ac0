"""Common corruptions, a control beside every attack: accuracy without an adversary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.best_iterates import best_of
from vlmdefend.attacks.corruptions._digital import CORRUPTIONS, corrupt
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.view import View, chunks
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat

KINDS = tuple(CORRUPTIONS)


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Corruption(Attack):
    """The 15 common corruptions at 5 severities (Hendrycks & Dietterich 2019, section 4); eps is the severity.

    Parameters as in the published code: ImageNet-C's for images of more than 64 pixels, CIFAR-10-C's for smaller ones
    (see attacks/_corruptions.py). Frost differs: the published one adds photographs, this one draws its ice.
    Robust is what is right clean and corrupted; published corruption errors count an image that only the corruption
    makes right as right.

    Options:
        kind: ``random`` (default): each image suffers one of the 15, drawn from its own stream, the same at every
            severity: an unbiased estimate of the mean over the 15 at a fifteenth of the cost. ``worst``: of all 15 the
            one of highest margin in the attacker's view. Or one of the 15 by its name.

    Raises:
        UserError: images that are not (B, 3, H, W), a severity that is not a whole number from 0 to 5, when it attacks.
    """

    name: ClassVar[str] = "corruption"
    summary: ClassVar[str] = "15 common corruptions, severities 1 to 5: a control, not an attack"
    citation: ClassVar[str] = "Hendrycks & Dietterich 2019"
    norms: ClassVar[tuple[Norm, ...]] = ("corruption",)
    gradient_free: ClassVar[bool] = True
    kind: Literal[
        "random",
        "worst",
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "snow",
        "frost",
        "fog",
        "brightness",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    ] = "random"

    @property
    def blind(self) -> bool:
        """True unless the worst of all kinds is searched for, which needs predictions."""
        return self.kind != "worst"

    @property
    def keeps_best(self) -> bool:
        """False: the corrupted image is scored, not the worse of corrupted and clean."""
        return False

    def budget(self, samples: int = 1) -> tuple[int, int]:
        """Returns one forward per kind where the worst kind is searched for, else none."""
        return (0 if self.blind else len(KINDS) * samples), 0

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns each image corrupted."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise UserError(f"attack corruption needs images (B, 3, H, W), it was given {tuple(images.shape)}.")
        severities = _severities(threat, len(images))
        if self.kind == "worst":

            def run(kind: str, todo: Tensor) -> tuple[Tensor, Tensor]:
                found = _corrupted([kind] * len(todo), images[todo], severities[todo], rng.select(todo), view.width)
                return found, Criterion(labels[todo]).margin(view.select(todo)(found))

            return best_of((partial(run, kind) for kind in KINDS), view, images)
        if self.kind == "random":
            drawn = rng.child("kind").integers((1,), 0, len(KINDS))[:, 0].tolist()
            kinds = [KINDS[number] for number in drawn]
        else:
            kinds = [self.kind] * len(images)
        return _corrupted(kinds, images, severities, rng, view.width)


def _severities(threat: Threat, count: int) -> Tensor:
    """Returns the (B,) int64 severities, on the CPU."""
    eps = torch.as_tensor(threat.eps).cpu().double().expand(count)
    severities = eps.round().long()
    if not (severities == eps).all() or (severities < 0).any() or (severities > 5).any():
        wrong = eps[(severities != eps) | (severities < 0) | (severities > 5)][0].item()
        raise UserError(f"attack corruption: severity {wrong:g} must be a whole number from 0 (none) to 5.")
    return severities


def _corrupted(kinds: Sequence[str], images: Tensor, severities: Tensor, rng: ImageRng, width: int) -> Tensor:
    """Corrupts images with one kind and severity, ``width`` at a time; the draws depend on the image and the kind
    alone.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for place, group in enumerate(zip(kinds, severities.tolist(), strict=True)):
        groups.setdefault(group, []).append(place)
    result = images.clone()
    for (kind, severity), places in groups.items():
        for chunk in chunks(len(places), width) if severity else ():
            at = torch.tensor(places)[chunk]
            result[at] = corrupt(kind, images[at], severity, rng.child(kind).select(at))
    return result
