"""The zero-shot classifier that is trained, and the frozen one beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.models.clip.patches import with_patches
from vlmdefend.models.clip.text_tower import looks_backwards, read_short, token_embedding, without_padding
from vlmdefend.models.clip.vision_language import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    VisionLanguageModel,
)
from vlmdefend.models.clip.zero_shot import ZeroShotClassifier
from vlmdefend.types import Outputs

BatchNormPolicy = Literal["frozen", "train"]


class TrainedClassifier(ZeroShotClassifier):
    """A CLIP-like model with a fixed class list whose weights may be trained.

    Text features come from the cache of ``model``, once per class list, unless the text tower trains.

    Args:
        model: used, not copied; :func:`choose_trained` says which of its parameters train.
        class_names: in the order of the labels, the same list for every model of a run.
        templates: prompts with ``{c}``.
        normalization: mean and standard deviation: the model's own, or those that a paper used.
        logit_scale: what multiplies the cosines; None: the model's own, exp(logit_scale).
        resize_inside: images of any size are resized inside the model.
        batch_norm: ``frozen``: evaluation mode; ``train``: batch statistics in the training forward, running ones
            everywhere else. An attack never moves them.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        normalization: Normalization = "model",
        logit_scale: float | None = None,
        resize_inside: bool = False,
        batch_norm: BatchNormPolicy = "frozen",
    ) -> None:
        mean, std = statistics(model, normalization)
        features = model.text_features(class_names, templates)
        super().__init__(
            model.clip, features, mean=mean, std=std, image_size=model.image_size, resize_inside=resize_inside
        )
        self.model, self.class_names, self.templates = model, tuple(class_names), tuple(templates)
        self.logit_scale, self.batch_norm = logit_scale, batch_norm
        self.trains_text = self.trains_prompts = False
        self.hand_features = features  # of the run's templates, whatever is learned in their place
        self._encoded: Tensor | None = None
        self._tokens: Tensor | None = None  # of the prompts, where the text tower trains

    def logits(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """(..., D) image features -> (..., C), of its own class features or of others."""
        if self.logit_scale is None:
            return super().logits(features, classes)
        classes = self.text_features if classes is None else classes
        return self.logit_scale * F.normalize(features, dim=-1) @ classes.mT

    def training_outputs(self, images: Tensor) -> Outputs:
        """The forward that is trained: as any other, but for trained text features and BatchNorm in training."""
        text = self.class_features() if self.trains_text else self.text_features
        with batch_statistics(self.clip) if self.batch_norm == "train" else _nothing():
            features = self._training_features(images) if self.batch_norm == "train" else self.features(images)
        return Outputs(self.logits(features, text), features)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """As :meth:`training_outputs`, and (B, N, D) what the image tower says of each of N = G x G places.

        Raises:
            UserError: an image tower that pools in a way of its own.
        """
        text = self.class_features() if self.trains_text else self.text_features
        with batch_statistics(self.clip) if self.batch_norm == "train" else _nothing():
            features, patches = with_patches(self.clip.visual, self._prepared(images))
        return Outputs(self.logits(features, text), features), patches

    def class_features(self) -> Tensor:
        """(C, D) unit rows with gradients to what trains of the text side.

        Learned prompts are encoded once for all that is asked before :meth:`forget` or :meth:`refresh`: attacks read
        these rows too, without gradient. In float32: what trains are a few vectors that everything hangs on.
        """
        if not self.trains_prompts:
            return self._encode_text()
        if self._encoded is None:
            with torch.enable_grad(), torch.autocast(self.mean.device.type, enabled=False):
                self._encoded = self._read_context(self.model.context)
        return self._encoded

    def forget(self) -> None:
        """The graph of the encoded prompts was sent back through, or will not be: the next to ask encodes anew."""
        self._encoded = None

    def classes_of(self, context: Tensor) -> Tensor:
        """(C, D) class features of another context than the learned one, of its shape, with its gradient."""
        return self._read_context(context)

    def refresh(self) -> None:
        """Encode the class names again, where the text side trains, for the forwards that do not train it."""
        self.forget()
        if self.trains_prompts:
            self.text_features = self.class_features().detach()
        elif self.trains_text:
            with torch.no_grad():
                self.text_features = self._encode_text()

    def _read_context(self, context: Tensor | None) -> Tensor:
        if context is None:
            raise UserError("this model has no learned context; train one with --trains context:M.")
        return self.model.reader(self.class_names)(context)

    def _training_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_image(self._prepared(images), normalize=False)
        return features

    def _encode_text(self) -> Tensor:
        """(C, D) unit rows with gradients: as open_clip ensembles templates, or of a context learned before."""
        if self.model.context is not None:
            return self._read_context(self.model.context)
        if self._tokens is None:
            texts = [template.replace("{c}", name) for name in self.class_names for template in self.templates]
            tokens = self.model.tokenizer(texts).to(self.mean.device)
            self._tokens = without_padding(tokens) if looks_backwards(self.clip) else tokens
        if looks_backwards(self.clip):
            found = read_short(self.clip, self._tokens, token_embedding(self.clip)(self._tokens))
        else:
            found = self.clip.encode_text(self._tokens, normalize=True)
        return F.normalize(found.view(self.num_classes, len(self.templates), -1).mean(dim=1), dim=-1)


def statistics(model: VisionLanguageModel, normalization: Normalization) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that pixels are normalised with."""
    return {
        "model": (model.mean, model.std),
        "clip": (CLIP_MEAN, CLIP_STD),
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    }[normalization]


def choose_trained(classifier: TrainedClassifier, parts: str) -> dict[str, nn.Parameter]:
    """Let some parameters want gradients and return them by name, in the model's order.

    Args:
        classifier: the target; all its parameters are frozen before.
        parts: ``image``: the image tower; ``all``: image, text and logit scale; ``last:K``: the last K parameter
            tensors of the image tower.

    Raises:
        UserError: another word, or K is not between 1 and the number of tensors.
    """
    named = dict(classifier.clip.named_parameters())
    visual = [name for name in named if name.startswith("visual.")]
    kind, _, count = parts.partition(":")
    if parts == "image":
        chosen = visual
    elif parts == "all":
        chosen = list(named)
    elif kind == "last" and count.isdecimal() and 1 <= int(count) <= len(visual):
        chosen = visual[-int(count) :]
    else:
        raise UserError(
            f"--trains {parts}: write image, all, or last:K with K from 1 to {len(visual)}, the number of parameter "
            "tensors of this image tower."
        )
    classifier.trains_text = parts == "all"
    return {name: named[name].requires_grad_(True) for name in chosen}


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode inside, everything else as it is."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training]
    for m in norms:
        m.training = True
    try:
        yield
    finally:
        for m in norms:
            m.training = False


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def batch_norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances by name (not the counters, which averages leave alone)."""
    return {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
