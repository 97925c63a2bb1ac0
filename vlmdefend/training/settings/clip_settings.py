"""Options that ``distill`` and ``train`` share: a CLIP, its prompts and its images. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import field_validator

from vlmdefend.errors import UserError
from vlmdefend.options import Option
from vlmdefend.training.settings.option_types import AtLeastOne, Count
from vlmdefend.training.settings.run_settings import METHOD, TRAIN, WHAT, RunSettings

PROMPT_KINDS = ("context", "class-context", "deep")  # what --trains takes of prompt-learning methods, as KIND:M
TEST_SPLITS = frozenset(("test", "val", "valid", "validation"))


class ClipSettings(RunSettings):
    """Options of one run on a CLIP."""

    anyway = RunSettings.anyway | {"micro_batch", "weights"}  # the weights are known by the hash of what they hold

    dataset: Annotated[
        str,
        Option(
            "What to train on.  \\[default: the method's; of the embedded models: fashion]", WHAT, complete="datasets"
        ),
    ]
    split: Annotated[str, Option("Its split; never a test split.  \\[default: train]", WHAT)] = "train"
    held_out: Annotated[
        Count, Option("Training images held out to measure on and choose by; at most a fifth.  \\[default: 500]", WHAT)
    ] = 500
    classes: Annotated[Path | None, Option("File of class names, one per line.", WHAT)] = None
    templates: Annotated[
        tuple[str, ...], Option("Prompt with {c} for the class; repeat to ensemble.", WHAT, flags=("--template",))
    ]
    weights: Annotated[Path | None, Option("Local weights file for the model.", WHAT)] = None

    logit_scale: Annotated[str, Option("model, or a number to train with.  \\[default: the method's]", METHOD)] = (
        "model"
    )
    normalization: Annotated[
        Literal["model", "clip", "imagenet"],
        Option("model, clip or imagenet: mean and deviation.  \\[default: model]", METHOD),
    ] = "model"
    pixel_space: Annotated[
        Literal["model", "native"],
        Option(
            "model: perturb at the model's size. native: at the images' own, resized inside.  \\[default: model]",
            METHOD,
        ),
    ] = "model"
    trains: Annotated[
        str,
        Option(
            "image: the image tower. all: text and scale too. last:K: its last K tensors. lora:R: rank R in its "
            "attention; lora-all:R: in the text tower's too; lora:R:P: with dropout P. prompt:N: a border of N pixels "
            "(ViT). These are folded into plain weights at the end. context:M, class-context:M, deep:M: learned "
            "prompts of apt, advpt, fap.  \\[default: the method's, see `vlmdefend list methods`]",
            METHOD,
        ),
    ] = "image"
    batch_norm: Annotated[
        Literal["frozen", "train"],
        Option(
            "frozen: statistics stay. train: batch statistics in the update, never in the attack; one process.  "
            "\\[default: frozen]",
            METHOD,
        ),
    ] = "frozen"
    select: Annotated[
        Literal["last", "best"], Option("last epoch, or the best on the held-out images.  \\[default: last]", METHOD)
    ] = "last"

    optimizer: Annotated[Literal["sgd", "adamw"], Option("sgd or adamw.  \\[default: the method's]", TRAIN)]
    warm_up: Annotated[Count | None, Option("Steps of linear warm-up, then a cosine to 0.", TRAIN)]
    micro_batch: Annotated[
        AtLeastOne | None,
        Option("Images at once in a process; halved when memory runs out.  \\[default: its share]", TRAIN),
    ] = None

    @field_validator("templates", mode="before")
    @classmethod
    def _braces(cls, value: Any) -> Any:
        """Reads ``{}`` as ``{c}``."""
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
        """Checks the attack, a split for training, and templates with a place for the class.

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
