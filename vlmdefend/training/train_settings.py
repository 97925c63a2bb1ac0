"""What the user of ``vlmdefend train`` asked for, checked and filled in from the method's schedule and the profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.defenses.training_time.base import Objective, Schedule
from vlmdefend.errors import UserError
from vlmdefend.models.names import EMBEDDED as EMBEDDED_MODELS
from vlmdefend.registry import check_options, parse_spec
from vlmdefend.training.settings import TEST_SPLITS, as_name, step_size_of
from vlmdefend.training.stage import ONLY, Optimization, Stage
from vlmdefend.types import format_eps, parse_eps

TrainProfile = Literal["paper", "scaled"]
ANYWAY = frozenset(  # may differ when a run goes on: they change how it runs, or what is made of it afterwards
    ("out", "device", "threads", "track", "save_every", "micro_batch", "root", "weights", "mix")
)
OWN = ("eps", "steps", "alpha", "batch_size")  # options of objectives that are options of the command
PROMPT_RATE = 40.0  # the published rate of a visual prompt (Mao et al. 2023)
TOY = {"eps": "8/255", "batch_size": 64, "epochs": 2}


class TrainSettings(BaseModel):
    """One run, every choice made. The names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    model: str
    out: Path
    profile: TrainProfile
    mix: tuple[float, ...] = ()

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

    epochs: int
    lr: float
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

    @field_validator("limit", "epochs", "batch_size", "micro_batch", "save_every", "threads")
    @classmethod
    def _at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{_option(info.field_name)} {value}: must be at least 1.")
        return value

    @field_validator("warm_up", "held_out", "weight_decay", "lr", "clip", "steps")
    @classmethod
    def _not_negative(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value < 0:
            raise UserError(f"--{_option(info.field_name)} {value}: must be zero or more.")
        return value

    @field_validator("mix", "momentum")
    @classmethod
    def _shares(cls, value: float | tuple[float, ...], info: Any) -> float | tuple[float, ...]:
        for one in value if isinstance(value, tuple) else (value,):
            if not 0 <= one <= 1:
                raise UserError(f"--{info.field_name} {one}: must lie between 0 and 1.")
        return value

    @property
    def radius(self) -> float:
        """eps as a number."""
        return parse_eps(self.eps)

    @property
    def step_size(self) -> float:
        """alpha as a number."""
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
            raise UserError(f"--logit-scale {self.logit_scale}: write model, or a positive number.")
        return value

    @property
    def objective(self) -> Objective:
        """The method with its options."""
        return OBJECTIVES.create(self.method, **_own(self.method, self))

    @property
    def stage(self) -> Stage:
        """The one stage of the run."""
        return Stage(name=ONLY, objective=self.objective, epochs=self.epochs, rate=self.lr)

    @property
    def optimization(self) -> Optimization:
        """How the weights move."""
        names = ("optimizer", "momentum", "weight_decay", "warm_up", "clip", "batch_size", "micro_batch", "seed")
        return Optimization(**{name: getattr(self, name) for name in names})

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in ANYWAY}


def make_train_settings(given: Mapping[str, Any]) -> TrainSettings:
    """Fill in what was not given (None), from the method's schedule and the profile.

    Raises:
        UserError: names the option, what it was and what it takes; an unknown method, or one of another command.
    """
    given = {name: value for name, value in given.items() if value is not None}
    profile = given.get("profile", "scaled")
    if profile not in ("paper", "scaled"):
        raise UserError(f"--profile {profile}: write paper or scaled.")
    name, written = parse_spec(str(given["method"]))
    cls = OBJECTIVES.get(name)
    if cls.schedule is None:
        raise UserError(f"--method {name}: learns from another model; use `vlmdefend distill --proxy P --target T`.")
    for option in OWN:
        if option in written:
            raise UserError(f"--method {given['method']}: give {option} as --{_option(option)} instead.")
    model = str(given["model"]).strip()
    toy = profile == "scaled" and model in EMBEDDED_MODELS
    preset = cls.schedule.toy_options if toy else cls.schedule.options if profile == "paper" else {}
    options = {**preset, **check_options("objective", cls, dict(written))}
    kept = {key: value for key, value in options.items() if key not in OWN}
    method = ":".join([cls.name, *(f"{key}={value}" for key, value in sorted(kept.items()))])
    defaults = _defaults(cls, cls.schedule, profile, toy=toy) | {
        "profile": profile,
        "dataset": "fashion" if model in EMBEDDED_MODELS else cls.schedule.dataset,
        "out": Path("trained") / f"{as_name(model)}-{cls.name}",
    }
    if not toy and str(given.get("trains", "")).startswith("prompt"):
        defaults["lr"] = PROMPT_RATE
    if "eps" in given and profile == "scaled":  # the step keeps its share of the radius
        defaults["alpha"] = _share(cls)
    try:
        settings = TrainSettings(**{**defaults, **given, "model": model, "method": method})
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(
            f"--{_option(str(first['loc'][0]))} {first['input']}: {message}; `vlmdefend train --help` says what "
            "it takes."
        ) from None
    _check(settings)
    return settings


def _defaults(cls: type[Objective], schedule: Schedule, profile: str, *, toy: bool) -> dict[str, Any]:
    of = _published(cls)
    options = {**of, **(schedule.toy_options if toy else {})}
    found: dict[str, Any] = {
        "eps": format_eps(of["eps"]),
        "steps": options["steps"],
        "alpha": format_eps(of["alpha"]) if profile == "paper" else _share(cls),
        "optimizer": schedule.optimizer,
        "lr": schedule.rate,
        "weight_decay": schedule.weight_decay,
        "batch_size": schedule.batch_size,
        "epochs": schedule.epochs,
        "warm_up": schedule.warm_up if profile == "paper" else None,
        "clip": None if profile == "paper" else 1.0,
        "templates": (schedule.template if profile == "paper" else "a photo of a {c}.",),
        "logit_scale": "model" if schedule.logit_scale is None else f"{schedule.logit_scale:g}",
    }
    return found | ({**TOY, "optimizer": "sgd", "weight_decay": 0.0, "lr": schedule.toy_rate} if toy else {})


def _published(cls: type[Objective]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]


def _share(cls: type[Objective]) -> str:
    """The step of the attack as the published share of its radius: ``eps``, ``0.25eps``."""
    of = _published(cls)
    return f"{of['alpha'] / of['eps']:.4g}eps"


def _own(method: str, settings: TrainSettings) -> dict[str, Any]:
    """The objective's options that are the command's."""
    takes = {f.name for f in fields(OBJECTIVES.get(parse_spec(method)[0]))}  # type: ignore[arg-type]
    values = {
        "eps": settings.radius,
        "steps": settings.steps,
        "alpha": settings.step_size,
        "batch_size": settings.batch_size,
    }
    return {name: value for name, value in values.items() if name in takes}


def _check(settings: TrainSettings) -> None:
    _ = settings.scale, settings.objective
    if settings.radius <= 0 or settings.step_size <= 0:
        raise UserError("--eps and --alpha must be larger than 0; without an attack nothing becomes robust.")
    if settings.split in TEST_SPLITS:
        raise UserError(
            f"--split {settings.split}: is what models are tested on; train on another, so that the verdict holds."
        )
    for template in settings.templates:
        if "{c}" not in template:
            raise UserError(f"--template {template!r}: has no {{c}}; write it where the class name goes.")


def _option(name: str) -> str:
    return name.replace("_", "-").replace("templates", "template")
