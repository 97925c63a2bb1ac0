"""Images of fashion and an embedded zero-shot model of their classes; the random draws of an image; a model's state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

TEMPLATE = "a photo of a {c}."
TWO_TEMPLATES = (TEMPLATE, "one {c} from afar")


def fashion_classifier(
    name: str, templates: Sequence[str] = (TEMPLATE,), classes: int | None = None
) -> ZeroShotClassifier:
    """Returns ``tiny-vit`` or ``tiny-rn`` as a zero-shot model of the first ``classes`` of fashion, or of all ten."""
    names = vlmdefend.load_dataset("fashion", limit=1).class_names
    return vlmdefend.load_model(name, device="cpu").zero_shot(names[:classes], list(templates))


def fashion_batch(count: int) -> Batch:
    """Test images of 32 pixels."""
    images = vlmdefend.load_dataset("fashion", limit=count)
    return load_batch(images, range(count), PixelTransform(32), skip_bad=False)[0]


def streams(batch: Batch, index: slice = slice(None)) -> ImageRng:
    """Fresh ones of some of the images."""
    return ImageRng(0, batch.ids[index], "test")


def fingerprint(classifier: ZeroShotClassifier) -> str:
    """A hash of all weights, buffers and class features."""
    digest = hashlib.sha256(classifier.text_features.numpy().tobytes())
    for name, tensor in sorted(classifier.clip.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Blind:
    """A pipeline with logits and nothing else: the pixel means of red, green and blue."""

    num_classes, stochastic = 3, False

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        return Outputs(images.mean(dim=(2, 3)))
