"""What the user of ``vlmdefend urda-train`` asked for, checked and filled in from the profile. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlmdefend.errors import UserError
from vlmdefend.registry import parse_spec
from vlmdefend.training.adaptation.profiles import UrdaProfile, profile_defaults
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, option
from vlmdefend.training.settings.run_settings import RunSettings, as_name, refusal

Term = Literal["defense", "prediction", "features", "entropy-weight"]
Select = Literal["last", "agreement", "entropy", "oracle"]
EVALUATED = 2000  # images of a set that may be large: all of them are in memory at once
EMBEDDED_PREFIXES = ("mnist", "uci-digits", "fashion", "emoji:")


class UrdaSettings(RunSettings):
    """One run of unsupervised robust domain adaptation."""

    source: str
    target: str
    profile: UrdaProfile

    method: str = "mdd"
    robustify: str = "dart-urda"
    teacher: str | None = None
    backbone: str
    pretrained: bool = True
    bottleneck: Count
    head: Literal["linear", "two-layer"] = "linear"
    batch_norm: Literal["train", "frozen"] = "train"

    init: Literal["imagenet", "teacher"]
    reduction: Literal["released", "sum", "mean"]
    space: Literal["pixel", "released"] = "pixel"
    trade_off: NotNegative
    ablate: tuple[Term, ...] = ()
    augment: Literal["off", "shift", "crop", "crop-flip"]
    steps: AtLeastOne

    epochs_teacher: AtLeastOne
    epochs_student: AtLeastOne
    iterations_teacher: AtLeastOne | None = None
    iterations_student: AtLeastOne | None = None
    lr_teacher: NotNegative
    lr_student: NotNegative
    backbone_factor: NotNegative | None = None
    batch_size: AtLeastOne = 36
    batch_size_student: AtLeastOne

    select: Select = "last"
    held_out: Count = 0
    eval_split: str = "test"
    eval_limit: AtLeastOne | None = None

    def check(self) -> None:
        """As of every run; and two domains, images to choose by, and enough of them for BatchNorm.

        Raises:
            UserError: names what to give.
        """
        super().check()
        if self.source == self.target:
            raise UserError(f"--source and --target are both {self.source}: there is no shift to adapt to.")
        if self.select != "last" and self.held_out < 1:
            raise UserError(f"--select {self.select}: chooses by held-out target images; give --held-out 200.")
        for name in ("batch_size", "batch_size_student"):
            if self.batch_norm == "train" and getattr(self, name) < 2:
                raise UserError(
                    f"--{option(name)} {getattr(self, name)}: BatchNorm has no statistics of one image; give 2 or "
                    "more, or --batch-norm frozen."
                )


def make_urda_settings(given: Mapping[str, Any]) -> UrdaSettings:
    """Fill in what was not given (None), from the profile and the sets.

    Raises:
        UserError: names the option, what it was and what it takes.
    """
    given = {name: value for name, value in given.items() if value is not None}
    profile: UrdaProfile = given.get("profile", "scaled")
    if profile not in ("released", "scaled"):
        raise UserError(f"--profile {profile}: write released or scaled.")
    source, target = str(given["source"]).strip(), str(given["target"]).strip()
    embedded = all(name.startswith(EMBEDDED_PREFIXES) for name in (source, target))
    method = parse_spec(str(given.get("method", "mdd")))[0]
    robustify = parse_spec(str(given.get("robustify", "dart-urda")))[0]
    defaults: dict[str, Any] = profile_defaults(profile, embedded=embedded) | {
        "profile": profile,
        "backbone": "tiny-cnn" if embedded else "timm:resnet50",
        "head": "two-layer" if method == "mdd" else "linear",
        "eval_limit": None if embedded else EVALUATED,
        "held_out": 0 if given.get("select", "last") == "last" else 200,
        "out": Path("adapted") / "-".join([as_name(source), "to", *map(as_name, (target, method, robustify))]),
    }
    try:
        settings = UrdaSettings(**(defaults | given | {"source": source, "target": target}))
    except ValidationError as error:
        raise refusal(error, "urda-train") from None
    settings.check()
    return settings
