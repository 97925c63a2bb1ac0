"""Each robust baseline on a linear model, whose worst image in the ball is a corner: its losses by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import UNKNOWN
from vlmdefend.models.classifier.backbones import Backbone
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

WEIGHT = tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])  # of class 0 against class 1
SIGNS = tensor([1.0, -1.0, 1.0]).view(3, 1, 1)
SOURCE = tensor([[0.6, 0.3, 0.5], [0.2, 0.7, 0.4]]).view(2, 3, 1, 1)
TARGET = tensor([[0.5, 0.4, 0.5], [0.3, 0.8, 0.2]]).view(2, 3, 1, 1)  # margins 0.85 and -0.1
EPS = 0.05
FAR = {"eps": EPS, "alpha": EPS, "steps": 4}  # more than enough steps to reach the corner from any start


def logits(images: Tensor) -> Tensor:
    return images.flatten(1) @ WEIGHT.T


class Linear:
    """A student with no statistics, whose features are its pixels."""

    iteration, steps = 50, 1000

    def __init__(self) -> None:
        self.auxiliary: dict[str, nn.Module] = {"discriminator": First()}

    def __call__(self, images: Tensor) -> Outputs:
        return Outputs(logits(images), images.flatten(1))

    evaluated = __call__

    def attacked(self, images: Tensor) -> Tensor:
        return logits(images)


class First(nn.Module):
    """Domain by the first pixel."""

    def forward(self, features: Tensor) -> Tensor:
        return 4.0 * features[:, :1] - 2.0


class Teacher:
    """Says class 1, then class 0, whatever it sees."""

    def of(self, batch: Batch) -> Outputs:
        return Outputs(tensor([[0.0, 1.0], [1.0, 0.0]]))


def batch(domains: str) -> Batch:
    parts = {"source": (SOURCE, [0, 1]), "target": (TARGET, [UNKNOWN] * 2)}
    chosen = [parts[name] for name in ("source", "target") if domains in ("both", name)]
    labels = [label for _, some in chosen for label in some]
    return Batch([str(i) for i in range(len(labels))], torch.cat([x for x, _ in chosen]), torch.tensor(labels))


def losses(name: str, **options: Any) -> dict[str, float]:
    method = ADAPTATIONS.create(name, **FAR, **options)
    given = batch(method.domains)
    found = method.losses(Linear(), Teacher(), given, ImageRng(0, given.ids, "x")).losses
    assert all(value.shape == (len(given.ids),) for value in found.values())
    return {term: float(value[0]) for term, value in found.items()}


def corner(images: Tensor, labels: Tensor) -> Tensor:
    """Where the true class is least likely: against the weight for class 0, along it for class 1."""
    return images - EPS * SIGNS * (1 - 2 * labels).view(-1, 1, 1, 1)


def error(images: Tensor, labels: Tensor) -> float:
    """The mean cross-entropy: log(1 + e^-margin) of the class."""
    margins = logits(images)[:, 0] * (1 - 2 * labels)
    return float(torch.log1p(torch.exp(-margins)).mean())


PSEUDO, TRUE = torch.tensor([1, 0]), torch.tensor([0, 1])


def test_vat_learns_the_source_at_its_worst_corner() -> None:
    assert losses("vat") == {"source": pytest.approx(error(corner(SOURCE, TRUE), TRUE), abs=1e-6)}


def test_at_learns_the_teachers_classes_at_their_worst_corner() -> None:
    assert losses("at-pl") == {"target": pytest.approx(error(corner(TARGET, PSEUDO), PSEUDO), abs=1e-6)}


def test_trades_learns_them_clean_and_keeps_the_prediction_where_it_changes_most() -> None:
    found = losses("trades-pl", beta=3.0)
    assert found["target"] == pytest.approx(error(TARGET, PSEUDO), abs=1e-6)
    margin = logits(TARGET)[:, 0]
    p, worst = torch.sigmoid(margin), 0.0
    for sign in (1.0, -1.0):  # the divergence is largest in one of the two corners: a random start finds either
        q = torch.sigmoid(margin + sign * EPS * float(WEIGHT.abs().sum()))
        worst = worst + [p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()][0]
    least, most = worst.min() / 2, worst.max()
    assert 3.0 * float(least) <= found["robustness"] <= 3.0 * float(most)


def expected_domain(source: Tensor, target: Tensor) -> float:
    """Half the binary cross-entropy of either domain."""
    read = [4.0 * images[:, 0].flatten() - 2.0 for images in (source, target)]
    return float(0.5 * (F.softplus(-read[0]).mean() + F.softplus(read[1]).mean()))


def test_artuda_has_the_source_two_domain_losses_and_the_divergence() -> None:
    found = losses("artuda", trade_off=2.0, consistency=3.0)
    own = (logits(TARGET)[:, 0] < 0).long()  # the attack is on the student's own class
    moved = corner(TARGET, own)
    assert found["source"] == pytest.approx(error(SOURCE, TRUE), abs=1e-6)
    both = expected_domain(SOURCE, TARGET) + expected_domain(SOURCE, moved)
    assert found["domain"] == pytest.approx(2.0 * both, abs=1e-5)
    p, q = torch.sigmoid(logits(TARGET)[:, 0]), torch.sigmoid(logits(moved)[:, 0])
    divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert found["consistency"] == pytest.approx(3.0 * float(divergence), abs=1e-5)


@pytest.mark.parametrize("divergence", [0.0, 20.0])
def test_dart_dads_attack_raises_the_error_or_where_that_weighs_more_the_divergence(divergence: float) -> None:
    found = losses("dart-dad", pseudo=1.0, divergence=divergence)
    moved = corner(TARGET, PSEUDO)
    if divergence:  # made unlike the source by the first pixel, which is all that the discriminator reads
        moved[:, 0] = TARGET[:, 0] - EPS
    assert found["source"] == pytest.approx(error(SOURCE, TRUE), abs=1e-6)
    assert found["target"] == pytest.approx(error(moved, PSEUDO), abs=1e-5)
    assert found["domain"] == pytest.approx(divergence * expected_domain(SOURCE, moved), abs=1e-4)


def test_source_training_smooths_its_labels_as_shot_wants_them() -> None:
    method = ADAPTATIONS.create("source-only", smoothing=0.1)
    given = batch("source")
    found = method.losses(Linear(), None, given, ImageRng(0, given.ids, "x")).losses["source"][0]
    expected = 0.95 * error(SOURCE, TRUE) + 0.05 * error(SOURCE, 1 - TRUE)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def network() -> ImageClassifier:
    flat = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    backbone = Backbone(flat, 3, 1, (0.0,) * 3, (1.0,) * 3, "bicubic", {"kind": "toy"}, False)
    return ImageClassifier(backbone, 2, bottleneck=0)


class Networks(Linear):
    """A student and its tutor that have weights and statistics."""

    def __init__(self) -> None:
        self.classifier, self.auxiliary = network(), {"teacher": network()}

    def __call__(self, images: Tensor) -> Outputs:
        return self.classifier.training_outputs(images)

    def attacked(self, images: Tensor) -> Tensor:
        found: Tensor = self.classifier(images).logits
        return found


def test_sroudas_feedback_is_how_much_worse_the_source_is_after_a_step_against_the_gradient() -> None:
    trained, method = Networks(), ADAPTATIONS.create("srouda", look_ahead=0.5)
    classifier = trained.classifier.requires_grad_(True)
    loss = F.cross_entropy(classifier(TARGET).logits, PSEUDO)
    found = method._feedback(trained, loss, Batch(["a", "b"], SOURCE, TRUE))
    before = F.cross_entropy(classifier(SOURCE).logits, TRUE)
    loss.backward()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter -= 0.5 * parameter.grad
    after = F.cross_entropy(classifier(SOURCE).logits, TRUE)
    assert float(found) == pytest.approx(float((after - before).detach()), abs=1e-6)
    assert abs(float(found)) > 1e-3


def test_sroudas_teacher_trains_with_the_statistics_of_its_batch() -> None:
    trained, method = Networks(), ADAPTATIONS.create("srouda", **FAR)
    trained.classifier.requires_grad_(True)
    tutor = trained.auxiliary["teacher"].requires_grad_(True)
    given = batch("both")
    found = method.losses(trained, None, given, ImageRng(0, given.ids, "x")).losses
    assert set(found) == {"target", "teacher_source", "teacher_consistency", "teacher_feedback"}
    assert float(tutor.backbone[1].num_batches_tracked) == 1
    statistics = torch.cat([SOURCE, TARGET]).flatten(1).mean(dim=0)
    assert not torch.allclose(tutor.backbone[1].running_mean, 0.1 * statistics)  # masked images are in the batch too
    torch.stack(list(found.values())).sum(dim=0).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tutor.parameters())


def test_the_gradient_reversal_grows_with_the_progress_of_the_stage_or_is_a_constant() -> None:
    from vlmdefend.defenses.adaptation._reversal import scheduled

    student: Any = Linear()
    cases = ((1000, 0, 0.0), (1000, 100, 0.1), (10_000, 1000, 0.1), (50, 50, 1.0))
    for student.steps, student.iteration, share in cases:
        assert scheduled(student, None) == pytest.approx(2 / (1 + math.exp(-10 * share)) - 1)
    student.iteration = 30
    assert scheduled(student, 300) == pytest.approx(math.tanh(0.05))
