"""Options of ``vlmdefend train``, completed from the method's schedule and the profile. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ValidationError

from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.models.names import EMBEDDED as EMBEDDED_MODELS
from vlmdefend.options import Option
from vlmdefend.registry import check_options, parse_spec
from vlmdefend.training.settings.clip_settings import PROMPT_KINDS, ClipSettings
from vlmdefend.training.settings.option_types import AtLeastOne, NotNegative, Share, option
from vlmdefend.training.settings.run_settings import METHOD, TRAIN, WHAT, as_name, refusal
from vlmdefend.types import format_eps

if TYPE_CHECKING:
    from vlmdefend.defenses.training_time.base import Objective, Schedule
    from vlmdefend.training.loop.stage import Optimization, Stage

TrainProfile = Literal["paper", "scaled"]
Augment = Literal["none", "crop-flip"]
OWN = ("eps", "steps", "alpha", "batch_size")  # options of objectives that are options of the command
PROMPT_RATE = 40.0  # the published rate of a visual prompt (Mao et al. 2023)
TOY = {"eps": "8/255", "batch_size": 64, "epochs": 2}


class TrainSettings(ClipSettings):
    """Options of one run of a training-time defense."""

    anyway = ClipSettings.anyway | {"mix"}

    method: Annotated[
        str,
        Option(
            "tecoa, fare, pmg-aft, tga-zsr, sim-clip, agft, adv-lora; apt, fap, advpt learn prompts; baselines at, "
            "trades; with options: at:images=clean. What each is: `vlmdefend list methods`.",
            METHOD,
            flags=("--method", "-m"),
            complete="objectives",
            required=True,
        ),
    ]
    model: Annotated[
        str, Option("Model to make robust: ViT-B/32, tiny-vit ...", WHAT, complete="models", required=True)
    ]
    profile: Annotated[
        TrainProfile,
        Option(
            "paper: as published. scaled: the same, with warm-up at most a tenth of the run and gradients no longer "
            "than 1; the embedded models have rates of their own.  \\[default: scaled]",
            METHOD,
        ),
    ]
    augment: Annotated[
        Augment,
        Option(
            "crop-flip: every image as another random crop, flipped or not, in each epoch. none.  \\[default: none; "
            "--profile paper: as published]",
            METHOD,
        ),
    ] = "none"
    mix: Annotated[
        tuple[Share, ...],
        Option(
            "Also write OUT/mix-A: (1-A) x vanilla + A x trained weights (WiSE-FT); repeat for several. May be given "
            "to a finished run.",
            METHOD,
        ),
    ] = ()
    epochs: Annotated[AtLeastOne, Option("\\[default: the method's; embedded: 2]", TRAIN)]
    lr: Annotated[NotNegative, Option("Base rate.  \\[default: the method's; of a visual prompt: 40]", TRAIN)]

    @property
    def objective(self) -> Objective:
        """The method with its options."""
        return OBJECTIVES.create(self.method, **_own(self.method, self))

    @property
    def stage(self) -> Stage:
        """The one stage of the run."""
        from vlmdefend.training.loop.stage import ONLY, Stage

        return Stage(name=ONLY, objective=self.objective, epochs=self.epochs, rate=self.lr)

    @property
    def optimization(self) -> Optimization:
        """The optimizer and its options."""
        from vlmdefend.training.loop.stage import Optimization

        names = ("optimizer", "momentum", "weight_decay", "warm_up", "clip", "batch_size", "micro_batch", "seed")
        return Optimization(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Checks the method's options, and that prompts are trained by methods that learn prompts."""
        super().check()
        method, kind = self.objective, self.trains.partition(":")[0]
        if method.learns and kind not in method.learns:
            kinds = " or ".join(f"{one}:M" for one in method.learns)
            raise UserError(f"--trains {self.trains}: {method.name} learns prompts; write {kinds}.")
        if not method.learns and kind in PROMPT_KINDS:
            raise UserError(
                f"--trains {self.trains}: {method.name} trains weights; apt, advpt and fap are made to learn prompts."
            )
        if method.learns and self.mix:
            raise UserError("--mix: a learned prompt has no vanilla weights to be mixed with; leave it out.")


def make_train_settings(given: Mapping[str, Any]) -> TrainSettings:
    """Completes the given options from the method's schedule and the profile.

    Raises:
        UserError: names the option, what it was and what it takes; an unknown method, or one of another command.
    """
    given = {name: value for name, value in given.items() if value is not None}
    profile = given.get("profile", "scaled")
    if profile not in ("paper", "scaled"):
        raise UserError(f"--profile {profile}: write paper or scaled.")
    method, written = parse_spec(str(given["method"]))
    cls = OBJECTIVES.get(method)
    if cls.schedule is None:
        raise UserError(f"--method {method}: learns from another model; use `vlmdefend distill --proxy P --target T`.")
    for name in OWN:
        if name in written:
            raise UserError(f"--method {given['method']}: give {name} as --{option(name)} instead.")
    model = str(given["model"]).strip()
    toy = profile == "scaled" and model in EMBEDDED_MODELS
    preset = cls.schedule.toy_options if toy else cls.schedule.options if profile == "paper" else {}
    options = {**preset, **check_options("method", cls, dict(written))}
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
        raise refusal(error, "train") from None
    settings.check()
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
        "trains": (toy and schedule.toy_trains) or schedule.trains,
        "augment": schedule.augment if profile == "paper" else "none",
        "logit_scale": "model" if schedule.logit_scale is None else f"{schedule.logit_scale:g}",
    }
    return found | (
        {**TOY, "optimizer": schedule.toy_optimizer, "weight_decay": 0.0, "lr": schedule.toy_rate} if toy else {}
    )


def _published(cls: type[Objective]) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]


def _share(cls: type[Objective]) -> str:
    """Returns the attack's step as the published share of its radius: ``eps``, ``0.25eps``."""
    of = _published(cls)
    return f"{of['alpha'] / of['eps']:.4g}eps"


def _own(method: str, settings: TrainSettings) -> dict[str, Any]:
    """Returns the objective's options that are options of the command."""
    takes = {f.name for f in fields(OBJECTIVES.get(parse_spec(method)[0]))}  # type: ignore[arg-type]
    values = {
        "eps": settings.radius,
        "steps": settings.steps,
        "alpha": settings.step_size,
        "batch_size": settings.batch_size,
    }
    return {name: value for name, value in values.items() if name in takes}
