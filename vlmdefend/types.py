"""The types of the whole package: batches, threats, model outputs, pipelines. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Protocol

from vlmdefend.errors import UserError
from vlmdefend.registry import ReadBy

if TYPE_CHECKING:
    from torch import Tensor

    from vlmdefend.rng import ImageRng

Attacker = Literal["transfer", "whitebox", "adaptive"]
Norm = Literal["linf", "l2", "patch", "corruption", "tokens"]
NORMS: tuple[Norm, ...] = ("linf", "l2", "patch", "corruption", "tokens")
ABSTAINED = -1  # the class of a prediction that was not made


class Batch(NamedTuple):
    """B labelled images with their ids."""

    ids: list[str]
    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    labels: Tensor  # (B,) int64


class Outputs(NamedTuple):
    """The outputs of a pipeline for B images, by name."""

    logits: Tensor  # (B, C), scaled by the model's logit scale
    features: Tensor | None = None  # (B, D) image features, not normalised
    detector_score: Tensor | None = None  # (B,) higher = more likely adversarial; only where a defense detects
    abstained: Tensor | None = None  # (B,) bool: no answer is given, which counts as wrong
    certified_radius: Tensor | None = None  # (B,) L2 distance within which the prediction provably stays

    @property
    def predictions(self) -> Tensor:
        """The (B,) int64 predicted classes (ties to the lowest index), :data:`ABSTAINED` where no answer is given."""
        classes = self.logits.argmax(dim=1)
        return classes if self.abstained is None else classes.masked_fill(self.abstained, ABSTAINED)


class Pipeline(Protocol):
    """Pixels in, named outputs out: a bare model, or a model inside a defense."""

    num_classes: int
    stochastic: bool  # True if the outputs depend on ``rng``

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """(B, 3, H, W) in [0, 1] and B random streams -> outputs."""
        ...


class EmbeddingPipeline(Pipeline, Protocol):
    """A pipeline whose logits are cosines between image features and class embeddings, as those of CLIP are."""

    text_features: Tensor  # (C, D) unit rows
    blank_features: Tensor | None  # (D,) unit: the mean text embedding of templates that name no class
    std: Tensor  # (3, 1, 1) what pixels in [0, 1] are divided by

    def logits(self, features: Tensor) -> Tensor:
        """Returns the (B, C) logits of (B, D) image features of any length."""
        ...


@dataclass(frozen=True)
class Threat:
    """The threat model of one image: stay in [0, 1] and within ``eps`` in a norm.

    ``eps`` is a number, or a (B,) tensor with one per image. What it measures depends on ``norm``:

    ``linf``, ``l2``: the radius of a ball around the pixels.
    ``patch``: a share of the image's area; one square of at most that area may hold anything.
    ``corruption``: a severity from 1 to 5; the pixels may become anything, for nothing is optimised.
    ``tokens``: words of the class prompts that may change; the pixels may not.
    """

    norm: Norm
    eps: float | Tensor

    def select(self, index: Tensor) -> Threat:
        """Returns the threat for some images of the batch."""
        return self if isinstance(self.eps, (int, float)) else replace(self, eps=self.eps[index])

    def radius(self, like: Tensor) -> float | Tensor:
        """``eps`` in a shape that broadcasts over (B, ...) images."""
        if isinstance(self.eps, (int, float)):
            return self.eps
        return self.eps.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))

    def project(self, images: Tensor, around: Tensor) -> Tensor:
        """Projects onto the ball, then onto [0, 1]; returns a new tensor of the shape of ``images``.

        Where there is no ball, images outside the budget become ``around``.
        """
        if self.norm not in ("linf", "l2"):
            clamped = images.clamp(0.0, 1.0)
            return clamped.where(per_image(self.contains(clamped, around), images), around)
        eps = self.radius(images)
        delta = images - around
        if self.norm == "linf":
            delta = delta.clamp(-eps, eps) if isinstance(eps, float | int) else delta.clamp(min=-eps, max=eps)
        else:
            length = per_image(delta.flatten(1).norm(dim=1), delta)
            delta = delta * (eps / length.clamp_min(1e-12)).clamp_max(1.0)
        return (around + delta).clamp_(0.0, 1.0)

    def random_start(self, images: Tensor, rng: ImageRng) -> Tensor:
        """Draws a point uniformly from the ball, clamped to [0, 1].

        L2: normal direction, radius ``eps * u^(1/d)``; a radius ``eps * u`` would crowd the centre.
        """
        from vlmdefend.kernels.start import noisy  # brings torch

        shape = images.shape[1:]
        if self.norm == "linf":
            noise = rng.uniform(shape, -1.0, 1.0).to(images.device)
        else:
            direction = rng.normal(shape).to(images.device)
            direction /= per_image(direction.flatten(1).norm(dim=1).clamp_min(1e-12), direction)
            radius = rng.uniform((1,)).to(images.device).flatten() ** (1.0 / direction[0].numel())
            noise = direction * per_image(radius, direction)
        return noisy(images, noise, self.eps)

    def distance(self, images: Tensor, around: Tensor) -> Tensor:
        """Returns (B,) float64 distances in this norm; for ``patch`` the share of the smallest square that holds all
        changes.

        Where nothing about the pixels is measured (``corruption``, ``tokens``) it is that of ``linf``.
        """
        if self.norm == "patch":
            return _changed_side(images, around).double().square() / (images.shape[-2] * images.shape[-1])
        delta = (images.double() - around.double()).flatten(1)
        return delta.norm(dim=1) if self.norm == "l2" else delta.abs().amax(dim=1)

    def contains(self, images: Tensor, around: Tensor, tolerance: float = 1e-6) -> Tensor:
        """Returns (B,) bool: finite, in [0, 1] and within ``eps`` (float64, ``tolerance`` for float32 rounding)."""
        eps = self.eps if isinstance(self.eps, (int, float)) else self.eps.double().to(images.device)
        flat = images.flatten(1)
        inside = flat.isfinite().all(1) & (flat >= 0).all(1) & (flat <= 1).all(1)
        if self.norm == "corruption":
            return inside
        return inside & (self.distance(images, around) <= (0.0 if self.norm == "tokens" else eps + tolerance))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Returns (B,) values in a shape that broadcasts over the (B, ...) tensor ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _changed_side(images: Tensor, around: Tensor) -> Tensor:
    """(B,) int64 side of the smallest square window of (B, C, H, W) outside of which nothing changed."""
    changed = (images != around).any(dim=1)  # (B, H, W); not-a-number differs from everything
    extents = []
    for dim in (1, 2):
        lines = changed.any(dim=3 - dim).long()  # (B, H) rows, then (B, W) columns that changed
        size = lines.shape[1]
        first = lines.argmax(dim=1)
        last = size - 1 - lines.flip(1).argmax(dim=1)
        extents.append((last - first + 1) * lines.amax(dim=1))
    return extents[0].maximum(extents[1])


def patch_side(eps: float, height: int, width: int) -> int:
    """The side of the largest square that covers at most the share ``eps`` of the image, and lies inside it."""
    return min(math.isqrt(int(eps * height * width + 1e-9)), height, width)


def parse_eps(text: str, norm: Norm = "linf", *, option: str = "") -> float:
    """Parses a perturbation size: ``4/255``, ``0.03``; a severity or a number of tokens: ``3``.

    Args:
        option: what is refused in place of ``eps``, ``ttc:alpha``.

    Raises:
        UserError: not a number, not finite, negative, or a bare integer such as ``8`` that surely means ``8/255``;
            a patch larger than the image, a severity other than 0 to 5, a broken number of tokens.
    """
    written = str(text).strip()
    given = f"{option}={written!r}" if option else f"eps {written!r}"
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?(\s*/\s*\d+(\.\d*)?)?", written, re.IGNORECASE):
        raise UserError(f"{given} is not a finite number; write it as a fraction (4/255) or a decimal (0.03).")
    above, _, below = written.partition("/")
    if below and float(below) == 0:
        raise UserError(f"{given} divides by zero; write it as a fraction (4/255) or a decimal (0.03).")
    value = float(above) / float(below or 1)
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{given} must be a finite number that is zero or more, such as 4/255.")
    if norm == "patch" and value > 1:
        raise UserError(f"{given}: a patch covers a share of the image's area, at most 1; write 0.05 for 5 %.")
    if norm == "corruption" and value not in range(6):
        raise UserError(f"{given}: of a corruption it is the severity, a whole number from 1 to 5.")
    if norm == "tokens" and value != int(value):
        raise UserError(f"{given}: of a text attack it is a number of tokens; write a whole number such as 2.")
    if norm == "linf" and value >= 1:
        advice = f"; did you mean {above.strip()}/255?" if not below and value <= 255 else "."
        raise UserError(f"{given} is as large as the whole pixel range [0, 1]{advice}")
    return value


def _amplitude(text: str, option: str) -> float:
    return parse_eps(text, option=option)


def _pixel_units(text: str, option: str) -> float:
    return parse_eps(text, "l2", option=option)


def _shade(text: str, option: str) -> float:
    value = parse_eps(text, "l2", option=option)
    if value > 1:
        advice = f"; did you mean {text.strip()}/255?" if "/" not in text and value <= 255 else "."
        raise UserError(f"{option}={text.strip()!r} is brighter than white, which is 1{advice}")
    return value


Amplitude = Annotated[float, ReadBy(_amplitude)]
"""The type of a method's option that moves pixels of [0, 1]: written as an eps is, and a bare 4 is refused like one."""
PixelUnits = Annotated[float, ReadBy(_pixel_units)]
"""The same for one that may be 1 or more, such as a length in L2: 4/255, 0.03, and 2 is 2."""
Shade = Annotated[float, ReadBy(_shade)]
"""The same for a brightness: from 0, black, to 1, white."""


def format_eps(eps: float) -> str:
    """``0.01568...`` as ``4/255`` where it is such a fraction and no short decimal, else a decimal."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = Fraction(eps * 255).limit_denominator(2)
    if abs(float(levels) / 255 - eps) < 1e-9:
        return "0" if levels == 0 else f"{float(levels):g}/255"
    return f"{eps:.4g}"
