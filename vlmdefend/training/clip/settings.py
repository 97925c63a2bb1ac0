"""The options that ``distill`` and ``train`` have in common: a CLIP, its prompts and its images. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from vlmdefend.errors import UserError
from vlmdefend.training.settings.option_types import AtLeastOne, Count
from vlmdefend.training.settings.run_settings import RunSettings

TEST_SPLITS = frozenset(("test", "val", "valid", "validation"))


class ClipSettings(RunSettings):
    """One run on a CLIP."""

    anyway = RunSettings.anyway | {"micro_batch", "weights"}  # the weights are known by the hash of what they hold

    dataset: str
    split: str = "train"
    held_out: Count = 500
    classes: Path | None = None
    templates: tuple[str, ...]
    weights: Path | None = None

    logit_scale: str = "model"
    normalization: Literal["model", "clip", "imagenet"] = "model"
    pixel_space: Literal["model", "native"] = "model"
    trains: str = "image"
    batch_norm: Literal["frozen", "train"] = "frozen"
    select: Literal["last", "best"] = "last"

    optimizer: Literal["sgd", "adamw"]
    warm_up: Count | None
    micro_batch: AtLeastOne | None = None

    @field_validator("templates", mode="before")
    @classmethod
    def _braces(cls, value: Any) -> Any:
        """``{}`` means ``{c}``, as elsewhere."""
        texts = (value,) if isinstance(value, str) else value
        return tuple(str(text).replace("{}", "{c}") for text in texts)

    @property
    def scale(self) -> float | None:
        """The logit scale as a number; None: the model's own.

        Raises:
            UserError: neither a positive number nor ``model``.
        """
        if self.logit_scale == "model":
            return None
        try:
            value = float(self.logit_scale)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"--logit-scale {self.logit_scale}: write model, 1, or another positive number.")
        return value

    def check(self) -> None:
        """As of every run; and an attack, a split for training, and templates with a place for the class.

        Raises:
            UserError: names what to give.
        """
        super().check()
        _ = self.scale
        if self.select == "best" and self.held_out < 1:
            raise UserError("--select best: chooses by held-out images; give --held-out 500, or leave out --select.")
        if self.radius <= 0 or self.step_size <= 0:
            raise UserError("--eps and --alpha must be larger than 0; without an attack nothing becomes robust.")
        if self.split in TEST_SPLITS:
            raise UserError(
                f"--split {self.split}: is what models are tested on; train on another, so that the verdict holds."
            )
        for template in self.templates:
            if "{c}" not in template:
                raise UserError(f"--template {template!r}: has no {{c}}; write it where the class name goes.")
