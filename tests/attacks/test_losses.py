"""The losses equal reference formulas, ties and few classes included."""

from __future__ import annotations

import pytest
import torch

from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.errors import UserError
from vlmdefend.types import Outputs

TIED = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, -1.0, -1.0], [-5.0, -6.0, -5.0, -7.0, -5.0]])


def logits_and_labels(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(64, classes, generator=generator) * 5
    return z, torch.randint(0, classes, (64,), generator=generator)


def naive(name: str, z: list[float], y: int, t: int | None) -> float:
    """The formulas of the papers, one image at a time, in Python."""
    others = [v for i, v in enumerate(z) if i != (y if t is None else t)]
    down = sorted(z, reverse=True)
    log_sum = torch.tensor(z, dtype=torch.float64).logsumexp(0).item()
    if name == "ce":
        return log_sum - z[y] if t is None else z[t] - log_sum
    margin = max(others) - z[y] if t is None else z[t] - max(others)
    if name == "cw":
        return margin
    if name == "cw50":
        return -max(0.0, 50 - margin)
    if t is None:
        return -(z[y] - max(others)) / (down[0] - down[2] + 1e-12)
    return -(z[y] - z[t]) / (down[0] - 0.5 * (down[2] + down[3]) + 1e-12)


@pytest.mark.parametrize("name", ["ce", "cw", "cw50", "dlr"])
@pytest.mark.parametrize("classes", [2, 3, 5, 10])
@pytest.mark.parametrize("targeted", [False, True])
def test_losses_equal_the_formulas(name: str, classes: int, targeted: bool) -> None:
    z, labels = logits_and_labels(classes)
    if classes == 5:
        z, labels = torch.cat([z, TIED]), torch.cat([labels, torch.tensor([0, 1, 2])])
    targets = (labels + 1) % classes if targeted else None
    if name == "dlr" and classes < (4 if targeted else 3):
        with pytest.raises(UserError, match="classes"):
            LOSSES[name](Outputs(z), Criterion(labels, targets))
        return
    found = LOSSES[name](Outputs(z), Criterion(labels, targets))
    assert found.shape == labels.shape
    for i in range(len(z)):
        if name == "dlr" and i == 64:
            continue  # all logits equal: 0 / 1e-12, tested below
        expected = naive(name, z[i].tolist(), int(labels[i]), None if targets is None else int(targets[i]))
        assert found[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_dlr_of_equal_logits_is_zero_and_finite() -> None:
    z = torch.ones(1, 5, requires_grad=True)
    value = LOSSES["dlr"](Outputs(z), Criterion(torch.tensor([0])))
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_knows_neither_scale_nor_shift(targeted: bool) -> None:
    z, labels = logits_and_labels(8)
    criterion = Criterion(labels, (labels + 3) % 8 if targeted else None)
    plain = LOSSES["dlr"](Outputs(z.double()), criterion)
    assert torch.allclose(plain, LOSSES["dlr"](Outputs(z.double() * 100 - 10), criterion), rtol=1e-9)


def test_kl_and_feature_losses_measure_the_way_from_the_clean_outputs() -> None:
    clean = Outputs(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    moved = Outputs(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]))
    criterion = Criterion(torch.tensor([0]), reference=clean)
    p = torch.tensor([1.0, 0.0]).softmax(0)
    q = torch.tensor([0.0, 1.0]).softmax(0)
    assert LOSSES["kl"](moved, criterion).item() == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert LOSSES["feature"](moved, criterion).item() == pytest.approx(16.0)
    assert LOSSES["feature_cos"](moved, criterion).item() == pytest.approx(1 - 0.6)
    for name in ("kl", "feature", "feature_cos"):
        assert LOSSES[name](clean, criterion).item() == pytest.approx(0.0, abs=1e-6)


def test_losses_are_per_image_and_never_averaged() -> None:
    z, labels = logits_and_labels(6)
    for name in ("ce", "cw", "cw50", "dlr"):
        whole = LOSSES[name](Outputs(z), Criterion(labels))
        parts = torch.cat([LOSSES[name](Outputs(z[i : i + 1]), Criterion(labels[i : i + 1])) for i in range(len(z))])
        assert torch.allclose(whole, parts)
