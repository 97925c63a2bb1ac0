"""A classifier with a trained head: backbone, bottleneck, head; logits and features by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.models.classifier.backbones import Backbone
from vlmdefend.models.clip.vision_language import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    VisionLanguageModel,
)
from vlmdefend.types import Outputs

if TYPE_CHECKING:
    from vlmdefend.rng import ImageRng

BatchNormPolicy = Literal["frozen", "train"]
HeadKind = Literal["linear", "two-layer"]
BottleneckKind = Literal["tllib", "linear"]


class ImageClassifier(nn.Module):
    """Pixels in [0, 1] to logits and bottleneck features; always in evaluation mode, but for :meth:`training_outputs`.

    Args:
        backbone: the image network; used, not copied.
        num_classes: C.
        bottleneck: D, the width of the features. 0: the backbone's own features.
        bottleneck_kind: ``tllib``: linear, BatchNorm, ReLU; ``linear``: for features that may be negative, as a CLIP's.
        head: ``linear``, or ``two-layer`` as MDD's; without dropout, so that a forward is a function of its images.
        batch_norm: ``train``: the training forward uses its batch's statistics and moves the running ones.
        seed: of the random weights; the global random state is left as it was.
    """

    stochastic: bool = False
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        bottleneck: int = 256,
        bottleneck_kind: BottleneckKind = "tllib",
        head: HeadKind = "linear",
        batch_norm: BatchNormPolicy = "train",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone_config, self.image_size = backbone.config, backbone.image_size
        self.interpolation, self.head_kind = backbone.interpolation, head
        self.num_classes, self.bottleneck_width, self.batch_norm = num_classes, bottleneck, batch_norm
        self.bottleneck_kind, self.pretrained = bottleneck_kind, backbone.pretrained
        self.width = bottleneck or backbone.width
        self.backbone = backbone.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bottleneck = _bottleneck(backbone.width, bottleneck, bottleneck_kind, batch_norm)
            self.head = _head(self.width, num_classes, head)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        super().train(False)

    def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        """Returns logits (B, C) and bottleneck features (B, D) of (B, 3, S, S) float32 in [0, 1].

        Raises:
            UserError: images of another size.
        """
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise UserError(
                f"images are {images.shape[-2]}x{images.shape[-1]} but the classifier takes {self.image_size}x"
                f"{self.image_size}; prepare them at that size or choose a protocol that resizes inside the model."
            )
        features = self.bottleneck(self.backbone((images - self.mean) / self.std))
        return Outputs(self.head(features), features)

    def training_outputs(self, images: Tensor) -> Outputs:
        """Runs the training forward: BatchNorm in training mode if it trains, everything else in evaluation mode."""
        if self.batch_norm == "frozen":
            outputs: Outputs = self(images)
            return outputs
        with batch_statistics(self):
            outputs = self(images)
        return outputs

    def train(self, mode: bool = True) -> ImageClassifier:
        """Does nothing: only :meth:`training_outputs` is ever in training mode."""
        return self

    def parts(self) -> tuple[list[str], list[str]]:
        """Returns the names of the backbone's parameters, and of those on top of it."""
        names = [name for name, _ in self.named_parameters()]
        below = [name for name in names if name.startswith("backbone.")]
        return below, [name for name in names if not name.startswith("backbone.")]

    def running_statistics(self) -> dict[str, Tensor]:
        """Returns BatchNorm's running means, variances and counters, by name."""
        endings = ("running_mean", "running_var", "num_batches_tracked")
        return {name: buffer for name, buffer in self.named_buffers() if name.endswith(endings)}


class ClassifierModel(VisionLanguageModel):
    """A loaded classifier with a head, used where a vision-language model is expected.

    Args:
        name: what records and tables call it.
        classifier: frozen from now on.
        class_names: in the order of its logits.
        device: where it lives from now on; None leaves it where it is.
    """

    def __init__(
        self,
        name: str,
        classifier: ImageClassifier,
        class_names: Sequence[str],
        device: str | torch.device | None = None,
    ) -> None:
        self.name, self.class_names = name, tuple(class_names)
        self.clip: Any = classifier.to(device=device, dtype=torch.float32).requires_grad_(False)
        self.image_size, self.interpolation = classifier.image_size, classifier.interpolation
        self.mean = tuple(classifier.mean.flatten().tolist())
        self.std = tuple(classifier.std.flatten().tolist())
        self.model_cfg = {
            "backbone": classifier.backbone_config,
            "bottleneck": classifier.bottleneck_width,
            "bottleneck_kind": classifier.bottleneck_kind,
            "head": classifier.head_kind,
            "class_names": list(class_names),
        }
        self.preprocess_cfg = {
            "size": self.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }
        self._hash: tuple[object, str] | None = None

    @property
    def classifier(self) -> ImageClassifier:
        """The network."""
        network: ImageClassifier = self.clip
        return network

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.classifier.parameters()).device

    def text_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Raises: a classifier with a head has no text tower.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.name} has a classifier head instead of text; it cannot take the place of a CLIP here.")

    def zero_shot(  # type: ignore[override]
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        normalization: Normalization = "model",
        resize_inside: bool = False,
    ) -> HeadPipeline:
        """Returns the classifier for a data set of the same classes, in its order; templates are not used.

        Raises:
            UserError: the data set has other classes.
        """
        given, own = tuple(class_names), self.class_names
        if sorted(given) != sorted(own):
            unknown = [n for n in given if n not in own] or [n for n in own if n not in given]
            raise UserError(
                f"{self.name} was trained for {len(own)} classes ({', '.join(own[:3])} ...), the data set has "
                f"{len(given)}, and {unknown[0]!r} is in one of them only; a classifier with a head takes data sets "
                "of its own classes (--classes gives them the same names)."
            )
        statistics = {"clip": (CLIP_MEAN, CLIP_STD), "imagenet": (IMAGENET_MEAN, IMAGENET_STD)}.get(normalization)
        order = None if given == own else [own.index(name) for name in given]
        return HeadPipeline(self.classifier, order, statistics, resize_inside=resize_inside)


class HeadPipeline:
    """A classifier with its logits in a data set's order; satisfies :class:`vlmdefend.types.Pipeline`.

    Args:
        classifier: used, not copied.
        order: the classifier's logit for each of the data set's classes; None: as they are.
        statistics: mean and standard deviation in place of the classifier's own.
        resize_inside: images of any size are resized to the classifier's, differentiably.
    """

    stochastic: bool = False

    def __init__(
        self,
        classifier: ImageClassifier,
        order: list[int] | None,
        statistics: tuple[Sequence[float], Sequence[float]] | None,
        *,
        resize_inside: bool,
    ) -> None:
        self.classifier, self.resize_inside = classifier, resize_inside
        self.num_classes = classifier.num_classes
        mean, std = classifier.mean, classifier.std
        self.order = None if order is None else torch.tensor(order, device=mean.device)
        self.mean, self.std = mean, std
        if statistics is not None:
            self.mean, self.std = (torch.tensor(v, device=mean.device).view(3, 1, 1) for v in statistics)

    def __call__(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        """(B, 3, H, W) in [0, 1] -> logits and features."""
        size = self.classifier.image_size
        if self.resize_inside and tuple(images.shape[-2:]) != (size, size):
            smaller = size < min(images.shape[-2:])
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=smaller)
        if self.mean is not self.classifier.mean:
            # the classifier normalises with its own statistics: give it pixels that come out as these ones would
            images = (images - self.mean) / self.std * self.classifier.std + self.classifier.mean
        outputs: Outputs = self.classifier(images)
        return outputs if self.order is None else Outputs(outputs.logits[:, self.order], outputs.features)


def _bottleneck(inputs: int, width: int, kind: BottleneckKind, batch_norm: BatchNormPolicy) -> nn.Module:
    if not width:
        return nn.Identity()
    linear = nn.Linear(inputs, width)
    if kind == "linear":
        return linear
    if batch_norm == "train":  # tllib's weights, whose scale BatchNorm sets
        nn.init.normal_(linear.weight, 0.0, 0.005)
        nn.init.constant_(linear.bias, 0.1)
    return nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU())


def _head(inputs: int, classes: int, kind: HeadKind) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, classes)
    return nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, classes))


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Context in which BatchNorm is in training mode and everything else unchanged."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm in norms:
            norm.training = False
