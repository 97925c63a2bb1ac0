"""A universal perturbation: one delta fitted to the set, added to every image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.gradient.pgd import step_size
from vlmdefend.attacks.set_level._set_level import SetLevel, own_stream, radius_of
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Universal(SetLevel):
    """One delta for all images (Moosavi-Dezfooli et al. 2017), learned as Shafahi et al. 2020 do.

    Their stochastic ascent, delta <- proj(delta + alpha sign(sum of the batch's gradients)) (L2: along the direction),
    replaces the original's DeepFool step on one image after the other: it is what is run now, for it is many times
    faster and fools more images under the same radius. The last delta is used, and on every image.

    Options as of :class:`~vlmdefend.attacks.set_level._set_level.SetLevel`, and:
        alpha: the first step's size: ``eps/4`` (default), or a number as ``1/255``.
        loss: ``cw``, ``ce``, or ``feature``, which needs no label.

    Raises:
        UserError: an attack before :meth:`fit`, or on images of another size than those it learned from.
    """

    name: ClassVar[str] = "universal"
    summary: ClassVar[str] = "one perturbation for the whole set"
    citation: ClassVar[str] = "Moosavi-Dezfooli et al. 2017; Shafahi et al. 2020"
    alpha: str = "eps/4"
    loss: Literal["ce", "cw", "feature"] = "cw"

    def __post_init__(self) -> None:
        super().__post_init__()
        step_size(self.alpha, 1.0, self.steps)

    @property
    def loss_name(self) -> Literal["ce", "cw", "feature"]:
        """The option ``loss``."""
        return self.loss

    def fit(self, view: View, images: Tensor, labels: Tensor, threat: Threat) -> Attack:
        """Fits the delta, from a random start: at zero the feature loss has no gradient."""
        eps = radius_of(threat)
        alpha = step_size(self.alpha, eps, self.steps)
        shape, linf = images.shape[1:], threat.norm == "linf"
        start = own_stream(view, "start")
        delta = (start.uniform(shape, -eps, eps) if linf else start.normal(shape))[0].to(images.device)

        def project() -> None:
            if linf:
                delta.clamp_(-eps, eps)
            else:
                delta.mul_((eps / delta.norm().clamp_min(1e-12)).clamp_max(1.0))

        def apply(at: Tensor, clean: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            # The gradient is taken behind the clamp: a pixel at 1 still gives a direction for the delta.
            return (clean + delta).clamp_(0.0, 1.0), lambda gradient: gradient

        def update(gradient: Tensor, left: float) -> None:
            direction = gradient.sign() if linf else gradient / gradient.norm().clamp_min(1e-300)
            delta.add_(direction.to(delta.dtype) * (alpha * left))
            project()

        project()
        self._fit_passes(view, images, labels, apply, update)
        return self._with(delta)

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """Returns the images with the delta, projected into the ball where that is smaller than the fitted one."""
        delta = self._fitted()
        if images.shape[1:] != delta.shape:
            raise UserError(
                f"attack universal learned from images {tuple(delta.shape)} and was given {tuple(images.shape[1:])}; "
                "a perturbation is for images of one size: resize them, or fit again."
            )
        return threat.project(images + delta, images)
