"""Count what the bare model is asked, whoever asks: the currency in which defenses and attacks are compared."""

from __future__ import annotations

from torch import Tensor

from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline


class Counted:
    """A pipeline that counts forwards and backwards, in images."""

    def __init__(self, model: Pipeline) -> None:
        self.model = model
        self.num_classes, self.stochastic = model.num_classes, model.stochastic
        self.forwards = 0
        self.backwards = 0

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        """Predict and count."""
        outputs = self.model(images, rng)
        self.forwards += len(images)
        # every gradient path passes the features; the logits come after them
        end = outputs.logits if outputs.features is None else outputs.features
        if end.requires_grad:
            end.register_hook(lambda gradient: self._count_backward(len(gradient)))  # type: ignore[no-untyped-call]
        return outputs

    def _count_backward(self, images: int) -> None:
        self.backwards += images
