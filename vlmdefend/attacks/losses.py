"""The losses that an attack raises, one value per image, never averaged (a mean underflows in low precision).

Each takes the outputs at the adversarial images and the :class:`~vlmdefend.attacks.goal.Goal`, and returns (B,).
With targets in the goal a loss is the targeted variant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.goal import Goal, best_other
from vlmdefend.errors import UserError
from vlmdefend.types import Outputs

Loss = Callable[[Outputs, Goal], Tensor]


def ce(outputs: Outputs, goal: Goal) -> Tensor:
    """Cross-entropy of the label; targeted: minus that of the target."""
    if goal.targets is None:
        return F.cross_entropy(outputs.logits, goal.labels, reduction="none")
    return -F.cross_entropy(outputs.logits, goal.targets, reduction="none")


def cw(outputs: Outputs, goal: Goal) -> Tensor:
    """Logit margin max_{i != y} z_i - z_y (Carlini & Wagner 2017, f_6 without the floor)."""
    return goal.margin(outputs.logits)


def cw50(outputs: Outputs, goal: Goal) -> Tensor:
    """-relu(50 - margin): what the TeCoA line of code calls CW; flat once the margin passes 50."""
    return -F.relu(50.0 - goal.margin(outputs.logits))


def dlr(outputs: Outputs, goal: Goal) -> Tensor:
    """Difference of logits ratio, free of the logits' scale and shift (Croce & Hein 2020, eq. 6; targeted: eq. 7).

    Raises:
        UserError: fewer than 3 classes (4 when targeted): the denominator needs the third (fourth) logit.
    """
    z = outputs.logits
    needed = 3 if goal.targets is None else 4
    if z.shape[1] < needed:
        raise UserError(
            f"loss dlr needs at least {needed} classes{'' if goal.targets is None else ' when targeted'}, "
            f"the model has {z.shape[1]}; use loss=cw."
        )
    top = z.topk(needed, dim=1).values
    label = z.gather(1, goal.labels[:, None])[:, 0]
    if goal.targets is None:
        return -(label - best_other(z, goal.labels)) / (top[:, 0] - top[:, 2] + 1e-12)
    target = z.gather(1, goal.targets[:, None])[:, 0]
    return -(label - target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def kl(outputs: Outputs, goal: Goal) -> Tensor:
    """KL(clean prediction || adversarial prediction); needs no label (TRADES, Zhang et al. 2019)."""
    clean = _reference(goal).logits.log_softmax(dim=1)
    return F.kl_div(outputs.logits.log_softmax(dim=1), clean, reduction="none", log_target=True).sum(dim=1)


def feature(outputs: Outputs, goal: Goal) -> Tensor:
    """Squared L2 distance of the image features from the clean ones, unnormalised (FARE, Schlarmann et al. 2024)."""
    adversarial, clean = _features(outputs, goal)
    return (adversarial - clean).pow(2).sum(dim=1)


def feature_cos(outputs: Outputs, goal: Goal) -> Tensor:
    """1 - cosine between the image features and the clean ones."""
    return 1.0 - F.cosine_similarity(*_features(outputs, goal), dim=1)


def _reference(goal: Goal) -> Outputs:
    if goal.reference is None:
        raise RuntimeError("this loss compares with the clean outputs; the attack must put them into the goal")
    if goal.targets is not None:
        raise UserError("losses kl, feature and feature_cos know no target class; use loss=ce, cw or dlr.")
    return goal.reference


def _features(outputs: Outputs, goal: Goal) -> tuple[Tensor, Tensor]:
    clean = _reference(goal).features
    if outputs.features is None or clean is None:
        raise UserError("loss feature needs a pipeline that gives image features; this one gives logits only.")
    return outputs.features, clean


LOSSES: dict[str, Loss] = {
    "ce": ce,
    "cw": cw,
    "cw50": cw50,
    "dlr": dlr,
    "kl": kl,
    "feature": feature,
    "feature_cos": feature_cos,
}
NEEDS_REFERENCE = frozenset({"kl", "feature", "feature_cos"})
