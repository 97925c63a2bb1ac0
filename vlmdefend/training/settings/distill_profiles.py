"""The profiles of ``vlmdefend distill``: where paper and code are silent or disagree, three ways to choose. Torch-free.

``paper``: what Fu et al. 2026 print: PGD-2 at 1/255, batch 64, 10 epochs, rates 5e-5 and 5e-2, ImageNet's
    normalisation, KL(target || proxy). Silent or impossible as printed, and chosen here: 5 + 5 epochs; step size 1/255
    (their ancestor's command); cosines without the logit scale, and a sum over the batch. With the mean that their
    equations print, a rate of 5e-2 moves nothing at scale 1 (a step of 7e-6 where adversarial training takes 4e-4); at
    CLIP's scale of 100 it destroys the model. A sum at scale 1 is the one reading under which their rates train.
``code``: the defaults of the authors' repository at its last commit: PGD-5 at 2/255, KL(proxy || target) summed, CLIP's
    logit scale, BatchNorm in training mode, a pull before every epoch, the first too, 1,000 steps of warm-up whatever
    the length. No commit is known to give the paper's numbers, and at these rates a run may well stop on a loss that
    is not finite.
``scaled``: ours, the default: the mean over the batch, the model's own logit scale and normalisation, gradients no
    longer than 1 (which is what keeps the first steps from blowing up), so that batch size and length of the run may be
    anything. The rates were tuned on the embedded pair; for real models they are TeCoA's rate for a loss of this size,
    and ten times that for stage b: a starting point, not a measurement.
"""

from __future__ import annotations

from typing import Any, Literal

Profile = Literal["paper", "code", "scaled"]

COMMON: dict[str, Any] = {
    "momentum": 0.9,
    "weight_decay": 0.0,
    "optimizer": "sgd",
    "trains": "image",
    "ema": 0.9,
    "pull": 0.5,
    "pull_first": False,
    "batch_norm": "frozen",
    "batch_size": 64,
    "epochs_a": 5,
    "epochs_b": 5,
    "warm_up": None,
    "clip": None,
    "steps": 2,
    "alpha": "eps",
    "select": "last",
    "pixel_space": "model",
}
PUBLISHED_TEMPLATE = ("This is a photo of a {c}",)  # no full stop, as the code has it

PROFILES: dict[Profile, dict[str, Any]] = {
    "paper": COMMON
    | {
        "direction": "target-first",
        "reduction": "sum",
        "logit_scale": "1",
        "normalization": "imagenet",
        "templates": PUBLISHED_TEMPLATE,
        "eps": "1/255",
        "lr_a": 5e-5,
        "lr_b": 5e-2,
    },
    "code": COMMON
    | {
        "direction": "proxy-first",
        "reduction": "sum",
        "logit_scale": "model",
        "normalization": "imagenet",
        "templates": PUBLISHED_TEMPLATE,
        "eps": "2/255",
        "alpha": "1/255",
        "steps": 5,
        "pull_first": True,
        "batch_norm": "train",
        "warm_up": 1000,
        "lr_a": 5e-4,
        "lr_b": 5e-1,
    },
    "scaled": COMMON
    | {
        "direction": "proxy-first",
        "reduction": "mean",
        "logit_scale": "model",
        "normalization": "model",
        "templates": ("a photo of a {c}.",),
        "eps": "1/255",
        "clip": 1.0,
        "lr_a": 5e-5,
        "lr_b": 5e-4,
    },
}

EMBEDDED: dict[str, Any] = {"eps": "8/255", "epochs_a": 2, "epochs_b": 4, "lr_a": 3e-3, "lr_b": 1e-2}
"""What ``scaled`` changes where the target is an embedded toy, which has another size and other weights."""


def profile_defaults(profile: Profile, *, embedded: bool) -> dict[str, Any]:
    """Returns the value of every option that a profile decides."""
    return PROFILES[profile] | (EMBEDDED if embedded and profile == "scaled" else {})
