"""Scores class prompts on fixed images: how many stay right, and the gradient of the loss with respect to class
features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.view import View, chunks
from vlmdefend.models.zero_shot.text_side import TextSide
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs

PROBE = 8  # images on which it is tried whether the embeddings may be kept


class PromptScore(NamedTuple):
    """The value of prompts for an attacker: few right images, then a high loss."""

    right: int
    loss: float

    def better(self, other: PromptScore) -> bool:
        """Returns whether these prompts fool more images, or as many with a higher loss."""
        return (-self.right, self.loss) > (-other.right, other.loss)


class PromptScores:
    """Scores any prompts on the N images that the view classifies correctly with the clean prompts.

    Most pipelines treat the image first and compare its embedding with the classes last: these are queried once per
    image (and draw), and every further question is a matrix product. Where the embedding depends on the prompts, or
    the logits are more than its cosines, the whole pipeline is queried each time. Which of the two holds is tested.
    A random pipeline answers with the mean of ``view.samples`` draws, the same ones for all prompts.

    Args:
        view: what the attacker may query.
        side: its text side.
        images: (N, ...) clean images, right or wrong; the wrong ones are left out.
        labels: (N,) true classes.
    """

    def __init__(self, view: View, side: TextSide, images: Tensor, labels: Tensor) -> None:
        self._view, self._side = view, side
        right = (view(images).argmax(dim=1) == labels).nonzero()[:, 0]
        self._at = right.cpu()
        self.images, self.labels = images[right], labels[right]
        self._kept: list[list[Tensor]] | None = None  # by chunk and draw: (n, D)
        if len(right) and self._may_keep():
            with torch.no_grad():
                self._kept = [[_features(o) for o in self._outputs_per_draw(chunk)] for _, chunk in self._chunks()]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keeps_embeddings(self) -> bool:
        """True: image embeddings are computed once, since prompts do not change them."""
        return self._kept is not None

    def score(self, classes: Tensor) -> PromptScore:
        """Returns the score of (C, D) class features."""
        if not len(self):
            return PromptScore(0, 0.0)
        logits = self.logits(classes)
        loss = F.cross_entropy(logits.double(), self.labels)
        return PromptScore(int((logits.argmax(dim=1) == self.labels).sum()), float(loss))

    def logits(self, classes: Tensor) -> Tensor:
        """Returns the (N, C) logits of all images under (C, D) class features."""
        with torch.no_grad(), self._side.using(classes):
            return torch.cat([self._chunk_logits(i, chunk) for i, chunk in self._chunks()])

    def gradient(self, classes: Tensor, *, still_right: bool = False) -> Tensor:
        """Returns the (C, D) gradient of the mean cross-entropy with respect to (C, D) class features.

        Args:
            still_right: of the images that these features get right (if there are any), which the others would drown.
        """
        right = self.logits(classes).argmax(dim=1) == self.labels
        weight = (right if still_right and right.any() else torch.ones_like(right)).float()
        total = torch.zeros_like(classes)
        for i, chunk in self._chunks():
            with torch.enable_grad():
                own = classes.detach().clone().requires_grad_(True)  # anew: a pipeline may keep what it made of it
                with self._side.using(own):
                    logits = self._chunk_logits(i, chunk)
                at = chunk.to(self.labels.device)
                loss = (F.cross_entropy(logits, self.labels[at], reduction="none") * weight[at]).sum()
            if loss.requires_grad:
                (found,) = torch.autograd.grad(loss, own, allow_unused=True)
                total += 0.0 if found is None else found
        return total / weight.sum()

    def _chunks(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(chunks(len(self), self._view.width)))

    def _chunk_logits(self, number: int, chunk: Tensor) -> Tensor:
        """(n, C), with whatever graph the classes have, under the prompts that are in use."""
        if self._kept is None:
            return torch.stack([outputs.logits for outputs in self._outputs_per_draw(chunk)]).mean(dim=0)
        return torch.stack([self._side.classifier.logits(kept) for kept in self._kept[number]]).mean(dim=0)

    def _outputs_per_draw(self, chunk: Tensor) -> list[Outputs]:
        """Runs the pipeline once per draw, with the same draws at every call."""
        streams = self._streams(chunk)
        at = chunk.to(self.images.device)
        return [self._view.select(self._at[chunk]).once(self.images[at], streams) for _ in range(self._view.samples)]

    def _streams(self, chunk: Tensor) -> ImageRng:
        return self._view.rng.child("prompts").select(self._at[chunk])

    def _may_keep(self) -> bool:
        """Returns whether prompts leave the embeddings unchanged and the logits are those of the embeddings."""
        few = torch.arange(min(PROBE, len(self)))
        seen: list[Tensor] = []
        clean = self._side.classifier.text_features
        for classes in (clean, clean.roll(1, dims=1)):
            with torch.no_grad(), self._side.using(classes):
                (first, *_) = self._outputs_per_draw(few)
                if first.features is None:
                    return False
                expected = self._side.classifier.logits(first.features)
            if expected.shape != first.logits.shape or not torch.allclose(expected, first.logits, rtol=1e-4, atol=1e-3):
                return False
            seen.append(first.features)
        return torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def _features(outputs: Outputs) -> Tensor:
    assert outputs.features is not None
    return outputs.features
