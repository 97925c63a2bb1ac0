"""Options of ``vlmdefend distill``, checked and completed from the profile. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ValidationError

from vlmdefend.errors import UserError
from vlmdefend.models.names import EMBEDDED as EMBEDDED_MODELS
from vlmdefend.options import Option
from vlmdefend.training.settings.clip_settings import ClipSettings
from vlmdefend.training.settings.distill_profiles import Profile, profile_defaults
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, Positive, Share
from vlmdefend.training.settings.run_settings import METHOD, RUN, TRAIN, WHAT, as_name, refusal


class DistillSettings(ClipSettings):
    """Options of one run of HPT-GPD."""

    anyway = ClipSettings.anyway | {"proxy_weights", "pivot", "gap_images", "force"}  # the first two: as the weights

    proxy: Annotated[
        str, Option("Vanilla model to learn from: ViT-B/32, tiny-vit ...", WHAT, complete="models", required=True)
    ]
    target: Annotated[str, Option("Model to make robust: RN50, tiny-rn ...", WHAT, complete="models", required=True)]
    profile: Annotated[
        Profile,
        Option(
            "scaled: ours, any batch size and length. paper: as printed, with cosines and a sum where that cannot "
            "train. code: the authors' last commit. Options below win over it.  \\[default: scaled]",
            METHOD,
        ),
    ]
    stage: Annotated[
        Literal["both", "a", "b"],
        Option("a: anchor alone, gives the pivot. b: transfer alone, from --pivot.  \\[default: both]", METHOD),
    ] = "both"
    pivot: Annotated[Path | None, Option("OUT/pivot of another run, or a weights file.", METHOD)] = None
    force: Annotated[bool, Option("Also where proxy and target are the same.", RUN)] = False
    proxy_weights: Annotated[Path | None, Option("Local weights file for the proxy.", WHAT)] = None

    direction: Annotated[
        Literal["proxy-first", "target-first"],
        Option(
            "proxy-first: KL(P||T), distillation, the code's. target-first: KL(T||P), the paper's equations.  "
            "\\[default: proxy-first; paper: target-first]",
            METHOD,
        ),
    ]
    reduction: Annotated[
        Literal["sum", "mean"],
        Option(
            "mean over the batch: the rate does not depend on its size. sum: as the code; a rate of r is a mean's "
            "rate of r x batch.  \\[default: mean; paper, code: sum]",
            METHOD,
        ),
    ]
    steps: Annotated[AtLeastOne, Option("Its steps.  \\[default: 2; code: 5]", METHOD)]
    epochs_a: Annotated[
        AtLeastOne, Option("The paper says 10 in all, not how many each.  \\[default: 5; embedded: 2]", TRAIN)
    ]
    epochs_b: Annotated[AtLeastOne, Option("\\[default: 5; embedded: 4]", TRAIN)]
    lr_a: Annotated[NotNegative, Option("Base rate of stage a.  \\[default: 5e-5; code: 5e-4; embedded: 3e-3]", TRAIN)]
    lr_b: Annotated[
        NotNegative, Option("Base rate of stage b.  \\[default: 5e-4; paper: 5e-2; code: 0.5; embedded: 1e-2]", TRAIN)
    ]
    ema: Annotated[
        Share, Option("Decay of stage a's average over epochs, which is the pivot.  \\[default: 0.9]", METHOD)
    ]
    pull: Annotated[
        Share,
        Option(
            "Share of the weights that stays when an epoch of stage b begins; the rest is the pivot. 1: HPT alone.  "
            "\\[default: 0.5]",
            METHOD,
        ),
    ]
    pull_first: Annotated[
        bool,
        Option(
            "Pull before the first epoch too (code); the paper begins from vanilla.  \\[default: no; code: yes]",
            METHOD,
            flags=("--pull-first/--no-pull-first",),
        ),
    ]
    gap_images: Annotated[
        Count, Option("Held-out images for the proxy gap, before training and after each epoch.  \\[default: 200]", RUN)
    ] = 200

    out: Annotated[
        Path, Option("Model folder to write; the same command resumes.  \\[default: distilled/TARGET-from-PROXY]", RUN)
    ]
    eps: Annotated[
        str, Option("Radius of the training attack.  \\[default: 1/255; code: 2/255; embedded: 8/255]", METHOD)
    ]
    alpha: Annotated[
        str,
        Option(
            "Its step size: eps, eps/2, 1/255. The paper gives none; its ancestor's command has eps.  \\[default: "
            "eps; code: 1/255]",
            METHOD,
        ),
    ]
    weight_decay: Annotated[NotNegative, Option("\\[default: 0]", TRAIN)]
    clip: Annotated[Positive | None, Option("Longest gradient norm.  \\[default: 1; paper, code: none]", TRAIN)] = None
    batch_size: Annotated[AtLeastOne, Option("Images of a step, over all processes.  \\[default: 64]", TRAIN)]
    dataset: Annotated[
        str,
        Option(
            "What to train on: tiny-imagenet, cifar10, imagenet, folder:PATH, wds:PATH ...  \\[default: "
            "tiny-imagenet; of the embedded models: fashion]",
            WHAT,
            complete="datasets",
        ),
    ]
    weights: Annotated[Path | None, Option("Local weights file for the target.", WHAT)] = None
    logit_scale: Annotated[
        str,
        Option(
            "model: exp(logit_scale), as deployed. 1: plain cosines, the code's first version. It sets the size of "
            "gradients and rates, x 40,000 between the two.  \\[default: model; paper: 1]",
            METHOD,
        ),
    ] = "model"
    normalization: Annotated[
        Literal["model", "clip", "imagenet"],
        Option(
            "model, clip or imagenet: mean and deviation. Paper and code use ImageNet's, which CLIP was not trained "
            "with; the result is saved with its own.  \\[default: model; paper, code: imagenet]",
            METHOD,
        ),
    ] = "model"
    pixel_space: Annotated[
        Literal["model", "native"],
        Option(
            "model: perturb at the model's size. native: at the images' own, resized inside (the paper's CIFAR).  "
            "\\[default: model]",
            METHOD,
        ),
    ] = "model"
    trains: Annotated[
        str,
        Option(
            "image: the image tower (the code at last; text features are computed once). all: text and scale too (the "
            "paper's notation, the first code). last:K: its last K tensors.  \\[default: image]",
            METHOD,
        ),
    ] = "image"
    batch_norm: Annotated[
        Literal["frozen", "train"],
        Option(
            "frozen: statistics stay, so an image's logits do not depend on its batch and averages of weights are "
            "sound. train: batch statistics in the update (never in the attack), one process.  \\[default: frozen; "
            "code: train]",
            METHOD,
        ),
    ] = "frozen"
    select: Annotated[
        Literal["last", "best"],
        Option("last epoch of stage b, or the best on the held-out images.  \\[default: last]", METHOD),
    ] = "last"
    optimizer: Annotated[Literal["sgd", "adamw"], Option("sgd or adamw.  \\[default: sgd]", TRAIN)]
    warm_up: Annotated[
        Count | None,
        Option("Steps of linear warm-up, then a cosine to 0.  \\[default: 1000, at most a tenth of a stage]", TRAIN),
    ]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run."""
        return ("a", "b") if self.stage == "both" else (self.stage,)

    def check(self) -> None:
        """Checks that the two models differ, and that there is a pivot where one is needed.

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
    """Completes the given options from the profile.

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
