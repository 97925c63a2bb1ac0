"""The record schema of a run, validated when written and when read. Imports no torch.

A *cell* is one (model, defense, dataset, attack, attacker, eps, seed) under one protocol. Its key is a hash of the
whole :class:`Cell`, so everything that can change a result must be a field of it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vlmdefend.types import Attacker, Norm

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class Cell(_Strict):
    """All that can change the result of one cell."""

    schema_version: int = SCHEMA_VERSION
    protocol: str
    protocol_hash: str
    model: str
    weights_hash: str  # of the weights, the architecture and the preprocessing
    defense: str
    defense_config: dict[str, Any]
    dataset: str
    split: str
    ids_hash: str
    images_hash: str = ""  # of the encoded files, where the source can change under the same names
    skip_bad: bool = False
    n: int = Field(ge=1)
    prompts_hash: str  # of the class names and the chosen templates; see also Record.learned_prompt
    attack: str
    attack_config: dict[str, Any]
    attacker: Attacker
    norm: Norm
    eps: float = Field(ge=0)
    seed: int
    batch_size: int = Field(ge=1)
    shard_size: int = Field(ge=1)
    code_hash: str = ""  # of the code that computes results: changed code may change a result
    device: str  # "cpu" or "cuda": the last bit of a float differs between them

    @property
    def key(self) -> str:
        """The name of the cell's folder: 16 hex digits of a hash of all fields."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def title(self) -> str:
        """Returns the cell in one line, for progress and messages."""
        from vlmdefend.types import format_eps

        where = f"{self.model} + {self.defense} on {self.dataset}"
        budget = "" if self.attack == "none" else f" {format_eps(self.eps)} {self.attacker}"
        source = f" of {self.attack_config.get('source')}" if self.attack == "saved" else ""
        return f"{where}: {self.attack}{source}{budget} seed {self.seed}"


class ImageRow(_Strict):
    """Predictions, margins, distance and steps of one image of a cell."""

    id: str
    label: int
    clean_prediction: int  # here and below ABSTAINED (-1) where the defense makes no prediction
    clean_margin: float  # best other logit minus the label's: negative = right
    adversarial_prediction: int
    adversarial_margin: float
    distance: float  # in the threat's norm, float64
    steps: int  # gradient evaluations the attack spent on this image
    certified_radius: float | None = None  # L2, of the clean prediction, where the defense certifies

    clean_score: float | None = None  # of the detector, if the defense may reject images: high = suspicious
    adversarial_score: float | None = None

    @property
    def clean_correct(self) -> bool:
        """Whether the defended model classifies the clean image correctly."""
        return self.clean_prediction == self.label

    @property
    def robust(self) -> bool:
        """Whether both the clean and the adversarial image are classified correctly."""
        return self.clean_correct and self.adversarial_prediction == self.label


class Skipped(_Strict):
    """An image that ``--skip-bad`` left out."""

    id: str
    reason: str


class Cost(_Strict):
    """Forwards and backwards of the bare model, in images, summed over the cell; seconds and peak memory."""

    clean_images: int = 0
    clean_forwards: int = 0  # to predict the clean images with the deployed pipeline
    clean_backwards: int = 0
    clean_seconds: float = 0.0
    attack_images: int = 0  # images that the attack was given: the clean-correct ones
    attack_forwards: int = 0
    attack_backwards: int = 0
    attack_seconds: float = 0.0
    peak_memory_mb: float = 0.0  # CUDA: allocated on the device; CPU: the process's resident peak

    def __add__(self, other: Cost) -> Cost:
        summed = {
            name: getattr(self, name) + getattr(other, name)
            for name in type(self).model_fields
            if name != "peak_memory_mb"
        }
        return Cost(**summed, peak_memory_mb=max(self.peak_memory_mb, other.peak_memory_mb))


class Checks(_Strict):
    """Measurements that show a masked gradient or a broken pipeline."""

    gradient_values: int = 0  # pixel gradients seen
    zero_gradients: int = 0  # of these, exactly zero or not finite: the pixel does not move
    forwards_differ: bool = False  # two predictions of the same images differ
    batch_dependent: bool = False  # a prediction changed with the other images of the batch
    attacked_survivors: int = 0  # attacked images that stayed right
    loss_not_rising: int = 0  # of these, those whose margin the attack did not raise at all
    outside_budget: int = 0  # adversarial images that left the ball or [0, 1]: replaced by the clean image

    def __add__(self, other: Checks) -> Checks:
        merged: dict[str, Any] = {}
        for name in type(self).model_fields:
            a, b = getattr(self, name), getattr(other, name)
            merged[name] = (a or b) if isinstance(a, bool) else a + b
        return Checks(**merged)


class Record(_Strict):
    """The finished cell. ``status`` is ``error`` for a cell that failed; the message is then in ``error``."""

    schema_version: int = SCHEMA_VERSION
    key: str
    cell: Cell
    status: Literal["done", "error"]
    error: str | None = None
    n: int = 0
    clean_correct: int = 0
    robust: int = 0
    skipped: list[Skipped] = []
    cost: Cost = Cost()
    checks: Checks = Checks()
    stochastic: bool = False  # the deployed defense draws random numbers
    adaptive_equals_whitebox: bool = True  # nothing to approximate or average: the two attackers are the same
    gradient_free: bool = False  # the attack uses no gradient
    blind: bool = False  # the attack makes no query: all attackers are the same
    set_level: bool = False  # the attack uses one perturbation or prompt, fitted to the set, for all images
    learned_prompt: str = ""  # the learned context used in place of the templates; weights_hash covers it
    attacked_prompts: list[str] = []  # the first prompt of each class after the attack
    paradigm: str = ""  # the defense's
    environment: dict[str, str] = {}
    started: str = ""
    finished: str = ""
