"""Mean and variance of each token in the blocks of an image tower, over clean and adversarial images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Threat


class Moments(NamedTuple):
    """Mean and variance of D blocks with L tokens of width V."""

    mean: Tensor  # (D, L, V)
    variance: Tensor  # (D, L, V)

    def distance(self, blocks: Sequence[Tensor]) -> Tensor:
        """Returns (B,) distances of the moments of k views, D (B, k, L, V) tokens, from these moments.

        Summed over the blocks: half the mean absolute difference of the means, half that of the variances (divided by
        k), as TAPT's code has them.
        """
        total = torch.zeros((), device=self.mean.device)
        for tokens, mean, variance in zip(blocks, self.mean, self.variance, strict=True):
            own = tokens.mean(dim=1)
            spread = (tokens - own[:, None]).square().mean(dim=1)
            apart = (own - mean).abs().flatten(1).mean(dim=1) + (spread - variance).abs().flatten(1).mean(dim=1)
            total = total + 0.5 * apart
        return total

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> Moments:
        """Returns the moments of D (N, L, V) tokens of N > 1 images; the variance is divided by N - 1."""
        return cls(torch.stack([b.mean(dim=0) for b in blocks]), torch.stack([b.var(dim=0) for b in blocks]))


class TokenStatistics(NamedTuple):
    """The clean and adversarial moments that TAPT aligns with."""

    clean: Moments
    adversarial: Moments

    def save(self, file: str | Path) -> None:
        """Writes a .safetensors file, as ``tapt:statistics=FILE`` reads it."""
        save_file(
            {
                f"{kind}_{name}": tensor.contiguous().cpu()
                for kind, moments in self._asdict().items()
                for name, tensor in moments._asdict().items()
            },
            str(file),
        )

    @classmethod
    def load(cls, file: str | Path) -> TokenStatistics:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: no such file, damaged, or of something else.
        """
        try:
            read = load_file(str(Path(file).expanduser()))
            return cls(*(Moments(read[f"{kind}_mean"], read[f"{kind}_variance"]) for kind in cls._fields))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(
                f"tapt: statistics={file} cannot be read ({str(error).splitlines()[0]}); give a file that "
                "Tapt.measure(...).save(FILE) wrote, or the name of a data set."
            ) from None

    def on(self, device: torch.device) -> TokenStatistics:
        """Returns the statistics on another device."""
        return TokenStatistics(*(Moments(*(tensor.to(device) for tensor in moments)) for moments in self))


def known_images(name: str, classifier: ZeroShotClassifier, count: int, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (N, 3, S, S) images of a training split, and the same after PGD against the classifier's predictions.

    No label is read: the attack leads away from the classifier's own prediction.

    Raises:
        UserError: no such data set, or no training split.
    """
    images = load_dataset(name, "train", limit=count)
    batch, _ = load_batch(images, range(len(images)), PixelTransform(classifier.image_size), skip_bad=True)
    clean = batch.images.to(classifier.text_features.device)
    with torch.no_grad():
        predicted = classifier(clean).predictions
    view = View(classifier, ImageRng(0, batch.ids, "known"), stop=False)
    return clean, Pgd()(view, clean, predicted, Threat("linf", eps)).images
