"""The profiles of ``vlmdefend urda-train``: as the authors' code has it, and ours. Torch-free.

``released``: step 2 as the authors' code has it, but that it attacks pixels (``--space released`` for the
code's way). ``scaled``: ours, the default: the student begins as the teacher (the abstract says post-training), weight
times divergence image by image so that the batch size does not matter, no augmentation on the embedded sets so that the
teacher predicts each image once.
"""

from __future__ import annotations

from typing import Any, Literal

UrdaProfile = Literal["released", "scaled"]

PROFILES: dict[UrdaProfile, dict[str, Any]] = {
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


def profile_defaults(profile: UrdaProfile, *, embedded: bool) -> dict[str, Any]:
    """Returns the value of every option that a profile decides."""
    return COMMON | PROFILES[profile] | (EMBEDDED if embedded and profile == "scaled" else {})
