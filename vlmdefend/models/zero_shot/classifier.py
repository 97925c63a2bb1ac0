"""Zero-shot classifiers: pixels in [0, 1] to class logits, with resize and normalisation inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.kernels.dispatch import through_op
from vlmdefend.kernels.normalize import normalized
from vlmdefend.kernels.resize import resized, resized_normalized
from vlmdefend.kernels.resize_weights import AxisResize
from vlmdefend.types import Outputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmdefend.rng import ImageRng


class ZeroShotClassifier(nn.Module):
    """A frozen CLIP-like model with a fixed list of classes; satisfies :class:`vlmdefend.types.Pipeline`.

    Args:
        clip: an open_clip model (CLIP, CustomTextCLIP, CoCa); used, not copied.
        text_features: (C, D) unit rows, one per class.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divided by.
        image_size: S, the side that the model takes.
        resize_inside: images of any size come in and are resized to S x S, differentiably, before normalisation.
        blank: (D,) unit text embedding of no class in particular, computed on first use.
        text_side: the text tower with the prompts, for attacks on them; made on first use.
    """

    stochastic: bool = False
    text_features: Tensor  # (C, D)
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(
        self,
        clip: nn.Module,
        text_features: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        resize_inside: bool = False,
        blank: Callable[[], Tensor] | None = None,
        text_side: Callable[[ZeroShotClassifier], Any] | None = None,
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.image_size = image_size
        self.resize_inside = resize_inside
        self._blank = blank
        self._make_text_side, self._text_side = text_side, None  # a TextSide, whose module imports this one
        self.num_classes = len(text_features)
        device = text_features.device
        self.register_buffer("text_features", text_features, persistent=False)
        self.register_buffer("mean", torch.tensor(mean, device=device).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device).view(3, 1, 1), persistent=False)
        self.training = False
        self._resizers: dict[tuple[int, torch.device], AxisResize] = {}

    def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        """Returns logits (B, C) and unnormalised features (B, D) of (B, 3, H, W) float32 in [0, 1].

        Raises:
            UserError: H or W is not the model's size and nothing resizes inside.
        """
        features = self.features(images)
        return Outputs(self.logits(features), features)

    def features(self, images: Tensor) -> Tensor:
        """Returns the (B, D) image features of (B, 3, H, W) in [0, 1], not normalised."""
        height, width = images.shape[-2:]
        if not self.resize_inside and (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"images are {height}x{width} but the model takes {self.image_size}x{self.image_size}; "
                "prepare them at that size or choose a protocol that resizes inside the model."
            )
        with _evaluating(self.clip):
            features: Tensor = self.clip.encode_image(self._prepared(images), normalize=False)
        return features

    def logits(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Turns (..., D) image features of any length into (..., C) logits, scaled as the model was trained.

        Args:
            classes: unit class features in place of the classifier's own: (C, D), or (B, C, D) for (B, V, D) features.
        """
        classes = self.text_features if classes is None else classes
        logits: Tensor = self.clip.logit_scale.exp() * F.normalize(features, dim=-1) @ classes.mT
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias

    @property
    def blank_features(self) -> Tensor | None:
        """The (D,) unit mean text embedding of templates without a class; None without a text tower."""
        return None if self._blank is None else self._blank()

    @property
    def text_side(self) -> Any:
        """The :class:`~.text_side.TextSide` of the prompts, for attacks on them; None where no text tower was given.

        Raises:
            UserError: a text tower that is not open_clip's own, or a prompt longer than its context.
        """
        if self._text_side is None and self._make_text_side is not None:
            self._text_side = self._make_text_side(self)
        return self._text_side

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """Does nothing: a classifier under attack stays in evaluation mode."""
        return self

    def _prepared(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) as the model takes it; resize and normalisation may be one kernel."""
        if images.shape[-2:] == (self.image_size, self.image_size):
            return normalized(images, self.mean, self.std)
        if through_op(images):
            rows, columns = (self._resizer(size, images.device) for size in images.shape[-2:])
            return resized_normalized(images, rows, columns, self.mean, self.std)
        return normalized(self._resized(images), self.mean, self.std)

    def _resized(self, images: Tensor) -> Tensor:
        """Bicubic to (S, S) as two matrix products: the values of ``F.interpolate``, deterministic on a GPU too."""
        rows, columns = (self._resizer(size, images.device).matrix for size in images.shape[-2:])
        return resized(images, rows, columns)

    def _resizer(self, size: int, device: torch.device) -> AxisResize:
        """(S, size) weights. Enlarging interpolates plainly, as the papers do; shrinking filters first (antialias)."""
        key = (size, device)
        if key not in self._resizers:
            rows = torch.eye(size).view(1, 1, size, size)
            weights = F.interpolate(rows, (self.image_size, size), mode="bicubic", antialias=self.image_size < size)
            self._resizers[key] = AxisResize.of(weights[0, 0].to(device))
        return self._resizers[key]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Context in evaluation mode; every flag is restored, and no BatchNorm statistic moves."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
