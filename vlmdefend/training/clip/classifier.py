"""The zero-shot classifier that `train` and `distill` train, and the choice of its trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.errors import UserError
from vlmdefend.models.classifier.classifier import batch_statistics
from vlmdefend.models.clip.patches import with_patches
from vlmdefend.models.clip.vision_language import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Normalization,
    VisionLanguageModel,
)
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.models.zero_shot.text_tower import looks_backwards, read_short, token_embedding, without_padding
from vlmdefend.types import Outputs

BatchNormPolicy = Literal["frozen", "train"]


class TrainedClassifier(ZeroShotClassifier):
    """A zero-shot CLIP classifier with a fixed class list whose weights or prompts can be trained.

    Text features come from the cache of ``model``, once per class list, unless the text tower or prompts train.

    Args:
        model: used, not copied; :func:`choose_trained` selects which of its parameters train.
        class_names: in the order of the labels, the same list for every model of a run.
        templates: prompts with ``{c}``.
        normalization: mean and standard deviation: the model's own, or those that a paper used.
        logit_scale: factor of the cosines; None: the model's own, exp(logit_scale).
        resize_inside: images of any size are resized inside the model.
        batch_norm: ``frozen``: evaluation mode; ``train``: batch statistics in the training forward, running ones
            everywhere else. An attack never changes them.
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
        self.hand_features = features  # of the run's templates, also where prompts are learned in their place
        self._class_features: Tensor | None = None  # of learned prompts, with their graph
        self._tokens: Tensor | None = None  # of the templates, where the text tower trains

    def logits(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Returns (..., C) logits of (..., D) image features; ``classes``: (C, D) other class features than its own."""
        if self.logit_scale is None:
            return super().logits(features, classes)
        classes = self.text_features if classes is None else classes
        return self.logit_scale * F.normalize(features, dim=-1) @ classes.mT

    def training_outputs(self, images: Tensor) -> Outputs:
        """Runs the training forward: with gradients to trained text features, and with the BatchNorm policy applied."""
        text = self.class_features() if self.trains_text else self.text_features
        with batch_statistics(self.clip) if self.batch_norm == "train" else nullcontext():
            features = self._training_features(images) if self.batch_norm == "train" else self.features(images)
        return Outputs(self.logits(features, text), features)

    def with_patches(self, images: Tensor) -> tuple[Outputs, Tensor]:
        """Returns :meth:`training_outputs` and the (B, N, D) features of the N = G x G image patches.

        Raises:
            UserError: the image tower does not pool as CLIP's towers do.
        """
        text = self.class_features() if self.trains_text else self.text_features
        with batch_statistics(self.clip) if self.batch_norm == "train" else nullcontext():
            features, patches = with_patches(self.clip.visual, self._prepared(images))
        return Outputs(self.logits(features, text), features), patches

    def class_features(self) -> Tensor:
        """Returns (C, D) unit rows with gradients to the trained parameters of the text side.

        Features of learned prompts are cached until :meth:`forget` or :meth:`refresh`; attacks read them too, without
        gradient. They are encoded in float32: few vectors train, and every logit depends on them.
        """
        if not self.trains_prompts:
            return self._encode_text()
        if self._class_features is None:
            with torch.enable_grad(), torch.autocast(self.mean.device.type, enabled=False):
                self._class_features = self._encode_context(self.model.context)
        return self._class_features

    def forget(self) -> None:
        """Drops the cached features of learned prompts, whose graph was used by a backward or is not needed."""
        self._class_features = None

    def classes_of(self, context: Tensor) -> Tensor:
        """Returns (C, D) class features of a context in place of the learned one, with gradients to it."""
        return self._encode_context(context)

    def refresh(self) -> None:
        """Encodes the class names again if the text side trains, for the forwards without text gradients."""
        self.forget()
        if self.trains_prompts:
            self.text_features = self.class_features().detach()
        elif self.trains_text:
            with torch.no_grad():
                self.text_features = self._encode_text()

    def _encode_context(self, context: Tensor | None) -> Tensor:
        """Returns (C, D) class features of a learned context."""
        if context is None:
            raise UserError("this model has no learned context; train one with --trains context:M.")
        return self.model.reader(self.class_names)(context)

    def _training_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.clip.encode_image(self._prepared(images), normalize=False)
        return features

    def _encode_text(self) -> Tensor:
        """Returns (C, D) unit rows with gradients: the template ensemble of open_clip, or a context learned before."""
        if self.model.context is not None:
            return self._encode_context(self.model.context)
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
    """Returns the mean and standard deviation that pixels are normalised with."""
    return {
        "model": (model.mean, model.std),
        "clip": (CLIP_MEAN, CLIP_STD),
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    }[normalization]


def choose_trained(classifier: TrainedClassifier, parts: str) -> dict[str, nn.Parameter]:
    """Turns on gradients of the parameters that ``parts`` names and returns them by name, in the model's order.

    Args:
        classifier: the target; all its parameters are frozen before.
        parts: ``image``: the image tower; ``all``: image, text and logit scale; ``last:K``: the last K parameter
            tensors of the image tower.

    Raises:
        UserError: another value, or K is not between 1 and the number of tensors.
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


def batch_norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns running means and variances by name, without the batch counters, which are not averaged."""
    return {name: b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
