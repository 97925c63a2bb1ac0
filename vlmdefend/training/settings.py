"""What the user of ``vlmdefend distill`` asked for, checked and filled in from the profile. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vlmdefend.errors import UserError
from vlmdefend.models.names import EMBEDDED as EMBEDDED_MODELS
from vlmdefend.training.profiles import Profile, profile_defaults
from vlmdefend.types import parse_eps

ANYWAY = frozenset(  # may differ when a run goes on: they change how it runs, not what comes out
    ("out", "device", "threads", "track", "save_every", "micro_batch", "root", "gap_images", "force", "weights")
) | {"proxy_weights", "pivot"}  # these three are known by the hash of what they hold

TEST_SPLITS = frozenset(("test", "val", "valid", "validation"))


class Settings(BaseModel):
    """One run of HPT-GPD, every choice made. The names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    proxy: str
    target: str
    out: Path
    profile: Profile
    stage: Literal["both", "a", "b"] = "both"
    pivot: Path | None = None
    force: bool = False

    dataset: str
    split: str = "train"
    limit: int | None = None
    held_out: int
    classes: Path | None = None
    templates: tuple[str, ...]
    root: Path | None = None
    skip_bad: bool = False
    weights: Path | None = None
    proxy_weights: Path | None = None

    direction: Literal["proxy-first", "target-first"]
    reduction: Literal["sum", "mean"]
    logit_scale: str
    normalization: Literal["model", "clip", "imagenet"]
    pixel_space: Literal["model", "native"]
    trains: str
    batch_norm: Literal["frozen", "train"]
    eps: str
    steps: int
    alpha: str
    epochs_a: int
    epochs_b: int
    lr_a: float
    lr_b: float
    ema: float
    pull: float
    pull_first: bool
    select: Literal["last", "best"]

    optimizer: Literal["sgd", "adamw"]
    momentum: float
    weight_decay: float
    warm_up: int | None
    clip: float | None
    batch_size: int
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0

    gap_images: int = 200
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

    @field_validator("limit", "epochs_a", "epochs_b", "batch_size", "micro_batch", "save_every", "threads", "steps")
    @classmethod
    def _at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{_option(info.field_name)} {value}: must be at least 1.")
        return value

    @field_validator("warm_up", "held_out", "gap_images", "weight_decay")
    @classmethod
    def _not_negative(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value < 0:
            raise UserError(f"--{_option(info.field_name)} {value}: must be zero or more.")
        return value

    @field_validator("ema", "pull", "momentum")
    @classmethod
    def _a_share(cls, value: float, info: Any) -> float:
        if not 0 <= value <= 1:
            raise UserError(f"--{_option(info.field_name)} {value}: must lie between 0 and 1.")
        return value

    @field_validator("lr_a", "lr_b", "clip")
    @classmethod
    def _no_less_than_zero(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value < 0:
            raise UserError(f"--{_option(info.field_name)} {value}: must not be negative.")
        return value

    @property
    def radius(self) -> float:
        """eps as a number."""
        return parse_eps(self.eps)

    @property
    def step_size(self) -> float:
        """alpha as a number: ``eps``, ``0.5eps``, ``eps/2`` or ``1/255``."""
        return step_size_of(self.alpha, self.radius)

    @property
    def scale(self) -> float | None:
        """The logit scale as a number; None: the model's own."""
        if self.logit_scale == "model":
            return None
        try:
            value = float(self.logit_scale)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"--logit-scale {self.logit_scale}: write model, 1, or another positive number.")
        return value

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run."""
        return ("a", "b") if self.stage == "both" else (self.stage,)

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in ANYWAY}


def step_size_of(alpha: str, radius: float) -> float:
    """``eps``, ``0.5eps``, ``eps/2`` or ``1/255`` as a number.

    Raises:
        UserError: written otherwise.
    """
    written = alpha.replace(" ", "").lower()
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\*?eps(?:/(\d+\.?\d*))?", written)
    if match is None:
        try:
            return parse_eps(written)
        except UserError:
            raise UserError(f"--alpha {alpha}: write eps, eps/2, or a number such as 1/255.") from None
    return radius * float(match[1] or 1) / float(match[2] or 1)


def make_settings(given: dict[str, Any]) -> Settings:
    """Fill in what was not given (None), from the profile.

    Raises:
        UserError: names the option, what it was and what it takes.
    """
    given = {name: value for name, value in given.items() if value is not None}
    profile: Profile = given.get("profile", "scaled")
    if profile not in ("paper", "code", "scaled"):
        raise UserError(f"--profile {profile}: write paper, code or scaled.")
    target, proxy = str(given["target"]).strip(), str(given["proxy"]).strip()
    embedded = target in EMBEDDED_MODELS
    defaults: dict[str, Any] = profile_defaults(profile, embedded=embedded) | {
        "profile": profile,
        "dataset": "fashion" if embedded else "tiny-imagenet",
        "out": Path("distilled") / f"{as_name(target)}-from-{as_name(proxy)}",
        "held_out": 500,
    }
    try:
        settings = Settings(**(defaults | given | {"target": target, "proxy": proxy}))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"--{_option(str(first['loc'][0]))} {first['input']}: {message}; `vlmdefend distill --help` says what it "
            "takes."
        ) from None
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    _ = settings.radius, settings.step_size, settings.scale
    if settings.radius <= 0 or settings.step_size <= 0:
        raise UserError("--eps and --alpha must be larger than 0; without an attack there is nothing to learn from.")
    if settings.target == settings.proxy and settings.weights == settings.proxy_weights and not settings.force:
        raise UserError(
            f"--proxy and --target are both {settings.target}: a model has nothing to learn from itself; give a "
            "proxy of another architecture, or --force to try all the same."
        )
    if settings.split in TEST_SPLITS:
        raise UserError(
            f"--split {settings.split}: is what models are tested on; train on another, so that the verdict holds."
        )
    if settings.pivot is not None and settings.stage != "b":
        raise UserError("--pivot: stage a makes the pivot; give --stage b to start from one that you have.")
    if settings.pivot is not None and not settings.pivot.exists():
        raise UserError(f"--pivot {settings.pivot}: there is no such file or folder; give OUT/pivot of a run.")
    if settings.stage == "b" and settings.pull < 1 and settings.pivot is None:
        raise UserError(
            "--stage b pulls towards a pivot: give --pivot OUT/pivot of a run of stage a, or --pull 1 for plain HPT "
            "without a pull."
        )
    for template in settings.templates:
        if "{c}" not in template:
            raise UserError(f"--template {template!r}: has no {{c}}; write it where the class name goes.")


def _option(name: str) -> str:
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
