"""What the user of ``vlmdefend urda-train`` asked for, checked and filled in. Torch-free.

Two profiles. ``released``: step 2 as the authors' code has it, but that it attacks pixels (``--space released`` for the
code's way). ``scaled``: ours, the default: the student begins as the teacher (the abstract says post-training), weight
times divergence image by image so that the batch size does not matter, no augmentation on the embedded sets so that the
teacher looks at each image once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vlmdefend.errors import UserError
from vlmdefend.registry import parse_spec
from vlmdefend.types import parse_eps

Term = Literal["defense", "prediction", "features", "entropy-weight"]
Select = Literal["last", "agreement", "entropy", "oracle"]
ANYWAY = frozenset(("out", "device", "threads", "track", "save_every", "root"))
EVALUATED = 2000  # images of a set that may be large: all of them are in memory at once
EMBEDDED_PREFIXES = ("mnist", "uci-digits", "fashion", "emoji:")

PROFILES: dict[str, dict[str, Any]] = {
    "released": {
        "init": "imagenet",
        "reduction": "released",
        "trade_off": 0.1,
        "lr_student": 0.005,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "batch_size_student": 18,
        "epochs_student": 20,
        "iterations_student": 500,
        "augment": "crop-flip",
        "bottleneck": 1024,
    },
    "scaled": {
        "init": "teacher",
        "reduction": "mean",
        "trade_off": 1.8,
        "lr_student": 0.005,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "batch_size_student": 36,
        "epochs_student": 20,
        "iterations_student": None,
        "augment": "crop-flip",
        "bottleneck": 1024,
    },
}
COMMON: dict[str, Any] = {"eps": "0.1", "alpha": "eps/2", "steps": 10, "lr_teacher": 0.004, "epochs_teacher": 20}
EMBEDDED: dict[str, Any] = {
    "bottleneck": 128,
    "augment": "off",
    "lr_teacher": 0.02,
    "epochs_teacher": 10,
    "iterations_teacher": 100,
    "lr_student": 0.05,
    "epochs_student": 20,
    "iterations_student": 40,
    "batch_size_student": 36,
}
"""What ``scaled`` changes where both sets are embedded: a small network from random weights."""


class UrdaSettings(BaseModel):
    """One run, every choice made. The names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: str
    target: str
    out: Path
    profile: Literal["released", "scaled"] = "scaled"

    method: str = "mdd"
    robustify: str = "dart-urda"
    teacher: str | None = None
    backbone: str
    pretrained: bool = True
    bottleneck: int
    head: Literal["linear", "two-layer"] = "linear"
    batch_norm: Literal["train", "frozen"] = "train"

    init: Literal["imagenet", "teacher"]
    reduction: Literal["released", "sum", "mean"]
    space: Literal["pixel", "released"] = "pixel"
    trade_off: float
    ablate: tuple[Term, ...] = ()
    augment: Literal["off", "shift", "crop", "crop-flip"]
    eps: str
    alpha: str
    steps: int

    epochs_teacher: int
    epochs_student: int
    iterations_teacher: int | None = None
    iterations_student: int | None = None
    lr_teacher: float
    lr_student: float
    backbone_factor: float | None = None
    momentum: float
    weight_decay: float
    clip: float | None = None
    batch_size: int = 36
    batch_size_student: int
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    select: Select = "last"
    held_out: int = 0
    eval_split: str = "test"
    eval_limit: int | None = None
    limit: int | None = None
    root: Path | None = None
    skip_bad: bool = False
    save_every: int | None = None
    track: Literal["tensorboard", "trackio", "wandb"] | None = None
    device: str | None = None
    threads: int | None = None

    @field_validator("epochs_teacher", "epochs_student", "batch_size", "batch_size_student", "steps")
    @classmethod
    def _at_least_one(cls, value: int, info: Any) -> int:
        if value < 1:
            raise UserError(f"--{_option(info.field_name)} {value}: must be at least 1.")
        return value

    @field_validator("iterations_teacher", "iterations_student", "eval_limit", "limit", "save_every", "threads")
    @classmethod
    def _none_or_at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{_option(info.field_name)} {value}: must be at least 1.")
        return value

    @field_validator(
        "lr_teacher", "lr_student", "trade_off", "momentum", "weight_decay", "bottleneck", "held_out", "backbone_factor"
    )
    @classmethod
    def _not_negative(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value < 0:
            raise UserError(f"--{_option(info.field_name)} {value}: must be zero or more.")
        return value

    @field_validator("clip")
    @classmethod
    def _positive(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value <= 0:
            raise UserError(f"--{_option(info.field_name)} {value}: must be above zero.")
        return value

    @property
    def radius(self) -> float:
        """eps as a number."""
        return parse_eps(self.eps)

    @property
    def step_size(self) -> float:
        """alpha as a number: ``eps/2``, ``0.5eps`` or ``0.05``."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\*?eps(?:/(\d+\.?\d*))?", self.alpha.replace(" ", "").lower())
        if match is None:
            try:
                return parse_eps(self.alpha)
            except UserError:
                raise UserError(f"--alpha {self.alpha}: write eps/2, eps, or a number such as 0.05.") from None
        return self.radius * float(match[1] or 1) / float(match[2] or 1)

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in ANYWAY}


def make_settings(given: dict[str, Any]) -> UrdaSettings:
    """Fill in what was not given (None), from the profile and the sets.

    Raises:
        UserError: names the option, what it was and what it takes.
    """
    given = {name: value for name, value in given.items() if value is not None}
    profile = str(given.get("profile", "scaled"))
    if profile not in PROFILES:
        raise UserError(f"--profile {profile}: write released or scaled.")
    source, target = str(given["source"]).strip(), str(given["target"]).strip()
    embedded = all(name.startswith(EMBEDDED_PREFIXES) for name in (source, target))
    defaults = {**COMMON, **PROFILES[profile], **(EMBEDDED if embedded and profile == "scaled" else {})}
    defaults["backbone"] = "tiny-cnn" if embedded else "timm:resnet50"
    if not embedded:
        defaults["eval_limit"] = EVALUATED
    if given.get("select", "last") != "last":
        defaults["held_out"] = 200
    method = parse_spec(str(given.get("method", "mdd")))[0]
    kind = parse_spec(str(given.get("robustify", "dart-urda")))[0]
    defaults["out"] = Path("adapted") / f"{_as_name(source)}-to-{_as_name(target)}-{_as_name(method)}-{_as_name(kind)}"
    if method == "mdd":
        defaults["head"] = "two-layer"
    try:
        settings = UrdaSettings(**(defaults | given | {"source": source, "target": target}))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"--{_option(str(first['loc'][0]))} {first['input']}: {message}; `vlmdefend urda-train --help` says what "
            "it takes."
        ) from None
    _check(settings)
    return settings


def _check(settings: UrdaSettings) -> None:
    _ = settings.radius, settings.step_size
    if settings.source == settings.target:
        raise UserError(f"--source and --target are both {settings.source}: there is no shift to adapt to.")
    if settings.select != "last" and settings.held_out < 1:
        raise UserError(f"--select {settings.select}: chooses by held-out target images; give --held-out 200.")

    for name in ("batch_size", "batch_size_student"):
        if settings.batch_norm == "train" and getattr(settings, name) < 2:
            raise UserError(
                f"--{_option(name)} {getattr(settings, name)}: BatchNorm has no statistics of one image; give 2 or "
                "more, or --batch-norm frozen."
            )


def _option(name: str) -> str:
    return name.replace("_", "-")


def _as_name(text: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "set"
