"""ET3: moves the image to lower energy, where the model's logits are larger."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Paradigm, Recipe
from vlmdefend.defenses.training_free._counter_attack import CounterAttack, Countered, Sight, pixel_gradient, shown
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline, PixelUnits, per_image


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Et3(CounterAttack):
    """x <- x - a grad E / ||grad E||_2 with E = -T logsumexp(logits / T), inside an L2 ball (Mirza et al. 2026).

    The official command line's step 0.5, radius 2 and 5 steps, for 224-pixel images (the function's own defaults, 1, 10
    and 10, are larger). An L2 length grows with the number of pixels, so step and radius are scaled by the image side
    over 224; ``scaled=False`` takes them as they are.

    Options:
        alpha: step length in L2.
        radius: of the ball around the input, in L2.
        steps: gradient steps.
        temperature: T.
        scaled: lengths are for 224 pixels.
    """

    name: ClassVar[str] = "et3"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "steps on the image towards lower energy"
    citation: ClassVar[str] = "Mirza et al. 2026"
    neutral: ClassVar[dict[str, Any] | None] = {"steps": 0}
    recipe: ClassVar[Recipe] = Recipe(
        "BPDA: step constant, unrolled, or ignored, best per image", surrogates=2, bare=True
    )
    alpha: PixelUnits = 0.5
    radius: PixelUnits = 2.0
    steps: int = 5
    temperature: float = 1.0
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.radius < 0 or self.steps < 0 or not self.temperature > 0:
            raise UserError(
                f"et3: alpha={self.alpha}, radius={self.radius} and steps={self.steps} must be zero or more, "
                f"temperature={self.temperature} more than zero."
            )

    def counter(self, model: Pipeline, images: Tensor, rng: ImageRng, sight: Sight) -> Countered:
        """Takes ``steps`` gradients."""

        def confidence(at: Tensor) -> Tensor:
            logits = model(at, rng).logits
            return self.temperature * (logits / self.temperature).logsumexp(dim=1)

        scale = math.sqrt(images.shape[-2] * images.shape[-1]) / 224 if self.scaled else 1.0
        start = images if sight == "unrolled" else images.detach()
        moved = start
        for _ in range(self.steps):
            gradient, _values = pixel_gradient(confidence, moved, unrolled=sight == "unrolled")
            delta = moved - start + self.alpha * scale * gradient / per_image(_length(gradient), gradient)
            shrink = (self.radius * scale / _length(delta)).clamp_max(1.0)
            moved = (start + delta * per_image(shrink, delta)).clamp(0.0, 1.0)
        return Countered(shown(images, moved, sight))


def _length(images: Tensor) -> Tensor:
    """Returns (B,) L2 lengths; never zero, with a slope of zero at zero."""
    return images.flatten(1).square().sum(dim=1).clamp_min(1e-24).sqrt()
