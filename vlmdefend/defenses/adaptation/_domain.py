"""The domain discriminator of the adversarial methods, and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmdefend.defenses.adaptation._reversal import reverse


def discriminator(width: int, hidden: int = 256) -> nn.Sequential:
    """Builds a network from (B, width) features to a (B, 1) logit of "source"; without BatchNorm, whose statistics
    would reveal the domain.

    Ganin et al. 2016 use two hidden layers for classification at this scale.
    """
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )


def domain_loss(
    network: nn.Module,
    source: Tensor,
    target: Tensor,
    coefficient: float,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Returns half the binary cross-entropy of source plus half that of target.

    Args:
        network: (B, D) -> (B, 1).
        source: (B_s, D) features.
        target: (B_t, D) features.
        coefficient: of the gradient reversal.
        weights: (B_s,) and (B_t,), of mean 1.
    """
    logits = network(reverse(torch.cat([source, target]), coefficient))[:, 0]
    truth = torch.cat([logits.new_ones(len(source)), logits.new_zeros(len(target))])
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if weights is not None:
        losses = losses * torch.cat(weights)
    return 0.5 * (losses[: len(source)].mean() + losses[len(source) :].mean())
