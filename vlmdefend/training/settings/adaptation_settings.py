"""Options of ``vlmdefend urda-train``, checked and completed from the profile. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ValidationError

from vlmdefend.errors import UserError
from vlmdefend.options import Option
from vlmdefend.registry import parse_spec
from vlmdefend.training.settings.adaptation_profiles import UrdaProfile, profile_defaults
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, Positive, Share, option
from vlmdefend.training.settings.run_settings import METHOD, RUN, TRAIN, WHAT, RunSettings, as_name, refusal

Term = Literal["defense", "prediction", "features", "entropy-weight"]
Select = Literal["last", "agreement", "entropy", "oracle"]
EVALUATED = 2000  # images of a set that may be large: all of them are in memory at once
EMBEDDED_PREFIXES = ("mnist", "uci-digits", "fashion", "emoji:")


class UrdaSettings(RunSettings):
    """One run of unsupervised robust domain adaptation."""

    panels: ClassVar[dict[str, str]] = {WHAT: "Domains and models", METHOD: "The methods"}

    source: Annotated[
        str,
        Option(
            "Labelled domain: mnist, emoji:google, folder:ROOT/DOMAIN, domain:ROOT/DOMAIN ...",
            WHAT,
            complete="datasets",
            required=True,
        ),
    ]
    target: Annotated[
        str,
        Option(
            "Domain without labels; its test split is measured on, never trained on or chosen by.",
            WHAT,
            complete="datasets",
            required=True,
        ),
    ]
    profile: Annotated[
        UrdaProfile,
        Option(
            "scaled: ours. released: step 2 as the authors' code (ImageNet start, 20 x 500 steps of 18 images).  "
            "\\[default: scaled]",
            METHOD,
        ),
    ]

    method: Annotated[
        str,
        Option(
            "Step 1: source-only, dann, cdan, mcc, mdd, dan, jan, mcd, bsp, self-training, shot, zero-shot; options "
            "as mdd:margin=2.  \\[default: mdd, the release's]",
            METHOD,
            complete="adaptations",
        ),
    ] = "mdd"
    robustify: Annotated[
        str,
        Option(
            "Step 2: dart-urda, at-pl, trades-pl, srouda, dart-dad, rfa, artuda, vat, or none.  \\[default: dart-urda]",
            METHOD,
            complete="adaptations",
        ),
    ] = "dart-urda"
    teacher: Annotated[
        str | None,
        Option(
            "In place of step 1: local-dir:PATH, a CLIP's name (text classes), timm:NAME, timm:NAME@FILE, "
            "timm:local-dir:FOLDER, python:MODULE:FUNCTION.",
            WHAT,
        ),
    ] = None
    backbone: Annotated[
        str,
        Option(
            "tiny-cnn, timm:resnet50, timm:resnet50@FILE, timm:local-dir:FOLDER, or a CLIP whose image tower is "
            "taken. The embedded tiny-vit and tiny-rn saw the embedded sets with their labels: nothing is adapted "
            "there.  \\[default: tiny-cnn on embedded sets, else timm:resnet50]",
            WHAT,
        ),
    ]
    pretrained: Annotated[
        bool, Option("Backbone with its published weights.", WHAT, flags=("--pretrained/--random",))
    ] = True
    bottleneck: Annotated[
        Count, Option("Width of the features; 0: the backbone's own.  \\[default: 1024; embedded: 128]", WHAT)
    ]
    head: Annotated[
        Literal["linear", "two-layer"], Option("linear or two-layer.  \\[default: linear; of mdd: two-layer]", WHAT)
    ] = "linear"
    batch_norm: Annotated[
        Literal["train", "frozen"],
        Option(
            "train: batch statistics in the update (never in an attack), one process. frozen.  \\[default: train]",
            TRAIN,
        ),
    ] = "train"

    init: Annotated[
        Literal["imagenet", "teacher"],
        Option(
            "The student begins as the teacher, or from the backbone's own weights (imagenet, the code's way).  "
            "\\[default: teacher; released: imagenet]",
            METHOD,
        ),
    ]
    reduction: Annotated[
        Literal["released", "sum", "mean"],
        Option(
            "Of DART's distillations: mean or sum of weight x divergence, or released: mean divergence x summed "
            "weight, which grows with the batch.  \\[default: mean; released: released]",
            METHOD,
        ),
    ]
    space: Annotated[
        Literal["pixel", "released"],
        Option(
            "DART's attack moves pixels; released: normalised images clipped to [0, 1], for reproduction only.  "
            "\\[default: pixel]",
            METHOD,
        ),
    ] = "pixel"
    trade_off: Annotated[
        NotNegative, Option("Weight of DART's distillations.  \\[default: 1.8; released: 0.1]", METHOD)
    ]
    ablate: Annotated[
        tuple[Term, ...],
        Option("Leave out a part of DART: defense, prediction, features, entropy-weight (repeat).", METHOD),
    ] = ()
    augment: Annotated[
        Literal["off", "shift", "crop", "crop-flip"],
        Option("DART's target images: off, shift, crop, crop-flip.  \\[default: crop-flip; embedded: off]", METHOD),
    ]
    steps: Annotated[AtLeastOne, Option("Steps in training.  \\[default: 10]", METHOD)]

    epochs_teacher: Annotated[AtLeastOne, Option("\\[default: 20; embedded: 10]", TRAIN)]
    epochs_student: Annotated[AtLeastOne, Option("\\[default: 20]", TRAIN)]
    iterations_teacher: Annotated[
        AtLeastOne | None, Option("Steps of an epoch.  \\[default: the larger set once; embedded: 100]", TRAIN)
    ] = None
    iterations_student: Annotated[
        AtLeastOne | None, Option("\\[default: the images once; released: 500; embedded: 40]", TRAIN)
    ] = None
    lr_teacher: Annotated[NotNegative, Option("Base rate of step 1.  \\[default: 0.004; embedded: 0.02]", TRAIN)]
    lr_student: Annotated[NotNegative, Option("Base rate of step 2.  \\[default: 0.005; embedded: 0.05]", TRAIN)]
    backbone_factor: Annotated[
        NotNegative | None,
        Option("Of the rate, for the backbone.  \\[default: 0.1 of published weights, else 1]", TRAIN),
    ] = None
    batch_size: Annotated[AtLeastOne, Option("Images of each domain in a step of step 1.  \\[default: 36]", TRAIN)] = 36
    batch_size_student: Annotated[AtLeastOne, Option("Of step 2.  \\[default: 36; released: 18]", TRAIN)]

    select: Annotated[
        Select,
        Option(
            "Epoch that is kept: last; or the best on held-out target images by agreement with the teacher, or by "
            "entropy. None of them reads a target label.  \\[default: last]",
            METHOD,
        ),
    ] = "last"
    held_out: Annotated[
        Count, Option("Target training images to choose by.  \\[default: 0; to choose: 200]", METHOD)
    ] = 0
    eval_split: Annotated[str, Option("Split that is measured on.  \\[default: test]", WHAT)] = "test"
    eval_limit: Annotated[AtLeastOne | None, Option("Subset of it.  \\[default: 2000; embedded: all]", WHAT)] = None

    out: Annotated[Path, Option("Result folder; the same command resumes in it.  \\[default: adapted/...]", RUN)]
    limit: Annotated[AtLeastOne | None, Option("Subset of so many training images a domain.", WHAT)] = None
    eps: Annotated[str, Option("Radius of the attacks, in training and judging.  \\[default: 0.1]", METHOD)]
    alpha: Annotated[str, Option("Step size in training.  \\[default: eps/2]", METHOD)]
    momentum: Annotated[Share, Option("Of SGD, Nesterov's.  \\[default: 0.9]", TRAIN)] = 0.9
    weight_decay: Annotated[NotNegative, Option("\\[default: 5e-4; released: 1e-3]", TRAIN)]
    clip: Annotated[Positive | None, Option("Longest norm of a step's gradient.  \\[default: as it is]", TRAIN)] = None

    def check(self) -> None:
        """Checks two different domains, images to select by, and batches that BatchNorm can use.

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
    """Completes the given options from the profile and the sets.

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
