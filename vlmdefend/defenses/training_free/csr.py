"""CSR: detects images that disagree with their low-pass version, and moves them towards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe, features_of
from vlmdefend.defenses.training_free._counter_attack import CounterAttack, Countered, Sight, shown, sign_ascent
from vlmdefend.defenses.training_free.low_pass import LowPass
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Amplitude, Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Csr(CounterAttack):
    """Detect by spectrum, then rectify (CSR, 2601.19210).

    An image is taken for adversarial where cos(z(x), z(low-pass x)) is below ``threshold``; z are unit image features.
    It is then moved by ``steps`` sign steps inside the eps-ball that raise cos(z(x'), z(low-pass x)) - cos(z(x'),
    z(x)), and the best of the images on the way is predicted. Others are predicted as they are. The radius of the
    filter scales with the image side; eps and alpha are pixel amplitudes and do not.

    Options:
        threshold: on the cosine; 0.85 is the paper's for CLIP at 224 pixels.
        radius: of the low-pass filter, a fraction of the image side.
        eps: the defender's ball, L-infinity.
        alpha: step size.
        steps: gradient steps.
    """

    name: ClassVar[str] = "csr"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "images that disagree with their low-pass version are moved towards it"
    citation: ClassVar[str] = "CSR, 2601.19210"
    neutral: ClassVar[dict[str, Any] | None] = {"threshold": -1.0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: perturbation constant, unrolled, or ignored, best per image; cosine pushed over the threshold",
        detector_weights=(0.0, 10.0),
        surrogates=2,
        bare=True,
    )
    threshold: float = 0.85
    radius: float = 40 / 224
    eps: Amplitude = 4 / 255
    alpha: Amplitude = 2 / 255
    steps: int = 3

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 0 or not self.radius > 0:
            raise UserError(
                f"csr: eps={self.eps}, alpha={self.alpha} and steps={self.steps} must be zero or more, "
                f"radius={self.radius} more than zero."
            )

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes two forwards; for detected images ``steps`` gradients and one more forward."""
        filtered = LowPass(radius=self.radius).filter(images)
        own, smooth = (F.normalize(features_of(model(x, rng)), dim=1) for x in (images, filtered))
        agreement = (own * smooth).sum(dim=1)
        suspect = (agreement < self.threshold).nonzero()[:, 0]
        seen = images
        if len(suspect):
            start = images[suspect] if sight == "unrolled" else images.detach()[suspect]
            anchors = (own[suspect], smooth[suspect])
            if sight != "unrolled":
                anchors = (anchors[0].detach(), anchors[1].detach())
            moved = self._rectify(model, start, *anchors, rng.select(suspect), sight)
            seen = images.index_copy(0, suspect, shown(images[suspect], moved, sight))
        return Countered(seen, self.threshold - agreement)

    def _rectify(
        self, model: Pipeline, start: Tensor, own: Tensor, smooth: Tensor, rng: ImageRng, sight: Sight
    ) -> Tensor:
        """Returns the best image on the path from ``start``."""

        def gain(at: Tensor) -> Tensor:
            z = F.normalize(features_of(model(at, rng)), dim=1)
            return (z * (smooth - own)).sum(dim=1)

        way, gains = [start], []
        for step in sign_ascent(
            gain, start, start, eps=self.eps, alpha=self.alpha, steps=self.steps, unrolled=sight == "unrolled"
        ):
            way.append(step.images)
            gains.append(step.values)
        with torch.no_grad():
            gains.append(gain(way[-1]))
        best = torch.stack(gains).argmax(dim=0)  # the earliest of equals
        return torch.stack(way)[best, torch.arange(len(start), device=best.device)]
