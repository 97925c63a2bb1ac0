"""Loads an image network by its name: ``tiny-cnn``, timm's networks, or the image tower of a CLIP."""

from __future__ import annotations

from vlmdefend.errors import UserError
from vlmdefend.models.classifier.backbones import (
    TIMM,
    TINY_CNN,
    Backbone,
    open_clip_tower,
    seeded,
    timm_backbone,
    tiny_cnn,
)
from vlmdefend.models.names import load_model


def load_backbone(name: str, *, pretrained: bool = True, seed: int = 0) -> Backbone:
    """Returns the image network called ``name``, on the CPU, in evaluation mode.

    Args:
        name: ``tiny-cnn``; ``timm:NAME``, ``timm:NAME@FILE`` or ``timm:local-dir:FOLDER`` of timm; or any name of a
            CLIP, whose image tower is taken.
        pretrained: with its published weights; ``tiny-cnn`` has none.
        seed: of the weights where they are random. The global random state is left as it was.

    Raises:
        UnknownName: with the nearest names.
        UserError: weights that cannot be had.
    """
    if name == TINY_CNN:
        return seeded(seed, tiny_cnn)
    if name.startswith(TIMM):
        return seeded(seed, lambda: timm_backbone(name, pretrained))
    model = load_model(name, device="cpu")
    if getattr(model, "class_names", None) is not None:
        raise UserError(f"{name} is a classifier with a head; give it as --teacher, or give a backbone without one.")
    if model.prompts is not None and model.prompts.visual_shape[0]:
        raise UserError(
            f"{name} has learned tokens inside of its image tower, which a backbone does not keep; give the model that "
            "they were learned on."
        )
    config = {"kind": "open_clip", "model_cfg": model.model_cfg, "preprocess_cfg": model.preprocess_cfg}
    tower = model.clip.visual if pretrained else seeded(seed, lambda: open_clip_tower(config))
    width = int(model.model_cfg["embed_dim"])
    return Backbone(tower, width, model.image_size, model.mean, model.std, model.interpolation, config, pretrained)
