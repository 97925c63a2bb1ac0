"""The options that ``vlmdefend distill`` and ``train`` have in common, and how each is checked. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vlmdefend.errors import UserError
from vlmdefend.types import parse_eps

TEST_SPLITS = frozenset(("test", "val", "valid", "validation"))


class RunSettings(BaseModel):
    """One run, every choice made. The names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    anyway: ClassVar[frozenset[str]]
    """What may differ when a run goes on: it changes how it runs, or what is made of it, not what comes out."""

    out: Path

    dataset: str
    split: str = "train"
    limit: int | None = None
    held_out: int = 500
    classes: Path | None = None
    templates: tuple[str, ...]
    root: Path | None = None
    skip_bad: bool = False
    weights: Path | None = None

    eps: str
    steps: int
    alpha: str
    logit_scale: str = "model"
    normalization: Literal["model", "clip", "imagenet"] = "model"
    pixel_space: Literal["model", "native"] = "model"
    trains: str = "image"
    batch_norm: Literal["frozen", "train"] = "frozen"
    select: Literal["last", "best"] = "last"

    optimizer: Literal["sgd", "adamw"]
    momentum: float = 0.9
    weight_decay: float
    warm_up: int | None
    clip: float | None
    batch_size: int
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    save_every: int | None = None
    track: Literal["tensorboard", "trackio", "wandb"] | None = None
    device: str | None = None
    threads: int | None = None

    @field_validator("templates", mode="before")
    @classmethod
    def _braces(cls, value: Any) -> Any:
        """``{}`` means ``{c}``, as elsewhere."""
        texts = (value,) if isinstance(value, str) else value
        return tuple(str(text).replace("{}", "{c}") for text in texts)

    @field_validator(
        *("limit", "batch_size", "micro_batch", "save_every", "threads", "epochs", "epochs_a", "epochs_b"),
        check_fields=False,
    )
    @classmethod
    def _at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{option(info.field_name)} {value}: must be at least 1.")
        return value

    @field_validator(
        *("steps", "warm_up", "held_out", "weight_decay", "clip", "lr", "lr_a", "lr_b", "gap_images"),
        check_fields=False,
    )
    @classmethod
    def _not_negative(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value < 0:
            raise UserError(f"--{option(info.field_name)} {value}: must be zero or more.")
        return value

    @field_validator("momentum", "ema", "pull", "mix", check_fields=False)
    @classmethod
    def _shares(cls, value: float | tuple[float, ...], info: Any) -> float | tuple[float, ...]:
        for one in value if isinstance(value, tuple) else (value,):
            if not 0 <= one <= 1:
                raise UserError(f"--{option(info.field_name)} {one}: must lie between 0 and 1.")
        return value

    @property
    def radius(self) -> float:
        """eps as a number."""
        return parse_eps(self.eps)

    @property
    def step_size(self) -> float:
        """alpha as a number: ``eps``, ``0.5eps``, ``eps/2`` or ``1/255``.

        Raises:
            UserError: written otherwise.
        """
        written = self.alpha.replace(" ", "").lower()
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\*?eps(?:/(\d+\.?\d*))?", written)
        if match is not None:
            return self.radius * float(match[1] or 1) / float(match[2] or 1)
        try:
            return parse_eps(written)
        except UserError:
            raise UserError(f"--alpha {self.alpha}: write eps, eps/2, or a number such as 1/255.") from None

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

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.anyway}

    def check(self) -> None:
        """What no single option says.

        Raises:
            UserError: no attack, a test split, a template without a place for the class.
        """
        _ = self.scale
        if self.radius <= 0 or self.step_size <= 0:
            raise UserError("--eps and --alpha must be larger than 0; without an attack nothing becomes robust.")
        if self.split in TEST_SPLITS:
            raise UserError(
                f"--split {self.split}: is what models are tested on; train on another, so that the verdict holds."
            )
        for template in self.templates:
            if "{c}" not in template:
                raise UserError(f"--template {template!r}: has no {{c}}; write it where the class name goes.")


def refusal(error: ValidationError, command: str) -> UserError:
    """What pydantic says of the first option that it does not take, as a sentence with a next step."""
    first = error.errors()[0]
    message, name = first["msg"][0].lower() + first["msg"][1:], option(str(first["loc"][0]))
    return UserError(f"--{name} {first['input']}: {message}; `vlmdefend {command} --help` says what it takes.")


def option(name: str) -> str:
    """A setting's name as the command line has it."""
    return name.replace("_", "-").replace("templates", "template")


def as_name(model: str) -> str:
    """A model's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.") or "model"


def lines_of(file: Path) -> list[str]:
    """Class names from a file, one a line.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--classes {file}: cannot be read; give a UTF-8 text file, one class name per line.") from None
