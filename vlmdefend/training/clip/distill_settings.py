"""What the user of ``vlmdefend distill`` asked for, checked and filled in from the profile. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vlmdefend.errors import UserError
from vlmdefend.models.names import EMBEDDED as EMBEDDED_MODELS
from vlmdefend.training.clip.distill_profiles import Profile, profile_defaults
from vlmdefend.training.clip.settings import ClipSettings
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, Share
from vlmdefend.training.settings.run_settings import as_name, refusal


class DistillSettings(ClipSettings):
    """One run of HPT-GPD."""

    anyway = ClipSettings.anyway | {"proxy_weights", "pivot", "gap_images", "force"}  # the first two: as the weights

    proxy: str
    target: str
    profile: Profile
    stage: Literal["both", "a", "b"] = "both"
    pivot: Path | None = None
    force: bool = False
    proxy_weights: Path | None = None

    direction: Literal["proxy-first", "target-first"]
    reduction: Literal["sum", "mean"]
    steps: AtLeastOne
    epochs_a: AtLeastOne
    epochs_b: AtLeastOne
    lr_a: NotNegative
    lr_b: NotNegative
    ema: Share
    pull: Share
    pull_first: bool
    gap_images: Count = 200

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run."""
        return ("a", "b") if self.stage == "both" else (self.stage,)

    def check(self) -> None:
        """As of every run; and two models that differ, and a pivot where one is needed.

        Raises:
            UserError: names what to give.
        """
        super().check()
        if self.target == self.proxy and self.weights == self.proxy_weights and not self.force:
            raise UserError(
                f"--proxy and --target are both {self.target}: a model has nothing to learn from itself; give a "
                "proxy of another architecture, or --force to try all the same."
            )
        if self.pivot is not None and self.stage != "b":
            raise UserError("--pivot: stage a makes the pivot; give --stage b to start from one that you have.")
        if self.pivot is not None and not self.pivot.exists():
            raise UserError(f"--pivot {self.pivot}: there is no such file or folder; give OUT/pivot of a run.")
        if self.stage == "b" and self.pull < 1 and self.pivot is None:
            raise UserError(
                "--stage b pulls towards a pivot: give --pivot OUT/pivot of a run of stage a, or --pull 1 for plain "
                "HPT without a pull."
            )


def make_distill_settings(given: Mapping[str, Any]) -> DistillSettings:
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
    }
    try:
        settings = DistillSettings(**(defaults | given | {"target": target, "proxy": proxy}))
    except ValidationError as error:
        raise refusal(error, "distill") from None
    settings.check()
    return settings
