"""Losses that an attack maximises, one value per image, never averaged (a mean underflows in low precision).

Each takes the outputs at the adversarial images and the criterion, and returns (B,) losses.
With targets in the criterion a loss is the targeted variant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.errors import UserError
from vlmdefend.kernels import margin
from vlmdefend.types import Outputs

Loss = Callable[[Outputs, Criterion], Tensor]


def ce(outputs: Outputs, criterion: Criterion) -> Tensor:
    """Cross-entropy of the label; targeted: minus that of the target."""
    if criterion.targets is None:
        return F.cross_entropy(outputs.logits, criterion.labels, reduction="none")
    return -F.cross_entropy(outputs.logits, criterion.targets, reduction="none")


def cw(outputs: Outputs, criterion: Criterion) -> Tensor:
    """Logit margin max_{i != y} z_i - z_y (Carlini & Wagner 2017, f_6 without the floor)."""
    if criterion.targets is None:
        return margin.margin(outputs.logits, criterion.labels)
    return -margin.margin(outputs.logits, criterion.targets)


def cw50(outputs: Outputs, criterion: Criterion) -> Tensor:
    """-relu(50 - margin): what the TeCoA line of code calls CW; flat once the margin passes 50."""
    return -F.relu(50.0 - cw(outputs, criterion))


def dlr(outputs: Outputs, criterion: Criterion) -> Tensor:
    """Difference of logits ratio, free of the logits' scale and shift (Croce & Hein 2020, eq. 6; targeted: eq. 7).

    Raises:
        UserError: fewer than 3 classes (4 when targeted): the denominator needs the third (fourth) logit.
    """
    z = outputs.logits
    needed = 3 if criterion.targets is None else 4
    if z.shape[1] < needed:
        raise UserError(
            f"loss dlr needs at least {needed} classes{'' if criterion.targets is None else ' when targeted'}, "
            f"the model has {z.shape[1]}; use loss=cw."
        )
    if criterion.targets is None:
        return margin.dlr(z, criterion.labels)
    z = margin.wide(z)
    top = z.topk(4, dim=1).values
    label = z.gather(1, criterion.labels[:, None])[:, 0]
    target = z.gather(1, criterion.targets[:, None])[:, 0]
    return -(label - target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def kl(outputs: Outputs, criterion: Criterion) -> Tensor:
    """KL(clean prediction || adversarial prediction); needs no label (TRADES, Zhang et al. 2019)."""
    clean = _reference(criterion).logits.log_softmax(dim=1)
    return F.kl_div(outputs.logits.log_softmax(dim=1), clean, reduction="none", log_target=True).sum(dim=1)


def feature(outputs: Outputs, criterion: Criterion) -> Tensor:
    """Squared L2 distance of the image features from the clean ones, unnormalised (FARE, Schlarmann et al. 2024)."""
    adversarial, clean = _features(outputs, criterion)
    return (adversarial - clean).pow(2).sum(dim=1)


def feature_cos(outputs: Outputs, criterion: Criterion) -> Tensor:
    """1 - cosine between the image features and the clean ones."""
    return 1.0 - F.cosine_similarity(*_features(outputs, criterion), dim=1)


def co(outputs: Outputs, criterion: Criterion) -> Tensor:
    """3 x cross-entropy + KL(softmax of the clean image features || softmax of these).

    Away from the label's prompt and from the clean image (Zhang et al. 2022, eq. 6 as their code for classification
    computes it, with alpha 3 and the softmax over the features' dimensions).
    """
    adversarial, clean = (features.log_softmax(dim=1) for features in _features(outputs, criterion))
    moved = F.kl_div(adversarial, clean, reduction="none", log_target=True).sum(dim=1)
    return 3.0 * ce(outputs, criterion) + moved


def _reference(criterion: Criterion) -> Outputs:
    if criterion.reference is None:
        raise RuntimeError("this loss compares with the clean outputs; the attack must put them into the criterion")
    if criterion.targets is not None:
        raise UserError("losses kl, feature, feature_cos and co know no target class; use loss=ce, cw or dlr.")
    return criterion.reference


def _features(outputs: Outputs, criterion: Criterion) -> tuple[Tensor, Tensor]:
    clean = _reference(criterion).features
    if outputs.features is None or clean is None:
        raise UserError(
            "losses feature, feature_cos and co need a pipeline that gives image features; this one gives logits only."
        )
    return outputs.features, clean


LOSSES: dict[str, Loss] = {
    "ce": ce,
    "cw": cw,
    "cw50": cw50,
    "dlr": dlr,
    "kl": kl,
    "feature": feature,
    "feature_cos": feature_cos,
    "co": co,
}
NEEDS_REFERENCE = frozenset({"kl", "feature", "feature_cos", "co"})
