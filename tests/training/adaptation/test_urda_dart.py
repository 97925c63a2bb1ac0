"""DART in training: what it attacks with which labels, what it leaves alone, which of its terms makes robust."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.adaptation.domains import SIDE, saved_teacher
from vlmdefend.defenses.adaptation import dart_urda
from vlmdefend.defenses.adaptation.dart_urda import DartUrda
from vlmdefend.defenses.adaptation.source_only import SourceOnly
from vlmdefend.models import load_model
from vlmdefend.models.classifier.backbones import Backbone
from vlmdefend.models.classifier.classifier import ImageClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.training.adaptation.measure import TargetNumbers, target_numbers
from vlmdefend.training.adaptation.student import AdaptedStudent, copy_of
from vlmdefend.training.adaptation.teacher import FrozenTeacher, as_teacher, predictions
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator, make_optimizer, update
from vlmdefend.types import Batch, Threat

CLASSES = ("bar", "cross", "square")


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_teacher(tmp_path_factory.mktemp("teacher"))


def student_and_teacher(name: str) -> tuple[AdaptedStudent, FrozenTeacher]:
    model: Any = load_model(name, device="cpu")
    student = AdaptedStudent(copy_of(model.classifier), (DartUrda(),), Processes("cpu"))
    with torch.no_grad():  # another function than the teacher's
        student.classifier.head.weight.add_(0.05 * torch.randn(3, 16, generator=torch.Generator().manual_seed(4)))
    return student, as_teacher(model, CLASSES)


def batch_of(count: int = 6) -> Batch:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    return Batch([f"target/{i}" for i in range(count)], images, torch.full((count,), -1))


def losses(dart: DartUrda, student: AdaptedStudent, teacher: FrozenTeacher, batch: Batch) -> Any:
    return dart.losses(student, teacher, batch, ImageRng(0, batch.ids, "x"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What each attack was given and what it found."""
    calls: list[dict[str, Tensor]] = []
    ascend, away_from = dart_urda.ascend, dart_urda.away_from

    def labelled(logits: Any, labels: Tensor) -> Any:
        calls.append({"labels": labels})
        return away_from(logits, labels)

    def attacked(loss: Any, images: Tensor, **options: Any) -> Tensor:
        found = ascend(loss, images, **options)
        calls[-1] |= {"images": images, "found": found, "loss": loss(images), "raised": loss(found)}
        return found

    monkeypatch.setattr(dart_urda, "away_from", labelled)
    monkeypatch.setattr(dart_urda, "ascend", attacked)
    return calls


def test_the_attack_is_on_the_student_against_the_teachers_class_and_keeps_its_budget(name: str, seen: Any) -> None:
    student, teacher = student_and_teacher(name)
    batch = batch_of()
    labels = teacher(batch.images).logits.argmax(dim=1)
    expected = torch.nn.functional.cross_entropy(student.attacked(batch.images), labels, reduction="sum")
    losses(DartUrda(eps=0.03, alpha=0.01), student, teacher, batch)
    call = {name: value.detach() for name, value in seen[0].items()}
    assert torch.equal(call["labels"], labels)
    assert Threat("linf", 0.03).contains(call["found"], batch.images).all()
    assert float(call["raised"]) > float(call["loss"]) + 1e-3
    assert torch.allclose(call["loss"], expected)


def test_the_attack_moves_no_statistic_and_leaves_no_gradient_and_has_no_chance_in_it(name: str) -> None:
    student, teacher = student_and_teacher(name)
    before = {n: b.clone() for n, b in student.weights().items()}
    dart, batch = DartUrda(), batch_of()
    found = [dart._attacked(student, batch.images, torch.zeros(6, dtype=torch.int64)) for _ in range(2)]
    assert torch.equal(*found)
    assert all(torch.equal(before[n], b) for n, b in student.weights().items())
    assert all(p.grad is None for p in student.parameters.values())
    assert not any(m.training for m in student.classifier.modules())
    losses(dart, student, teacher, batch)  # the two training forwards do
    assert any(not torch.equal(before[n], b) for n, b in student.weights().items() if n.endswith("running_mean"))
    assert not any(m.training for m in student.classifier.modules())


def test_in_the_released_space_images_are_clipped_to_the_unit_range_and_leave_the_ball(name: str, seen: Any) -> None:
    student, teacher = student_and_teacher(name)
    losses(DartUrda(space="released"), student, teacher, batch_of())
    moved = (seen[0]["found"] - seen[0]["images"]).abs()
    assert 0.0 <= float(seen[0]["found"].min()) <= float(seen[0]["found"].max()) <= 1.0
    assert float(seen[0]["images"].min()) < -0.9  # normalised
    assert float((moved > 0.1 + 1e-6).float().mean()) > 0.3


@pytest.mark.parametrize("left_out", ["defense", "prediction", "features"])
def test_a_term_that_is_switched_off_is_gone_and_the_others_stay(name: str, left_out: str) -> None:
    student, teacher = student_and_teacher(name)
    student.classifier.batch_norm = "frozen"
    whole = losses(DartUrda(), student, teacher, batch_of()).losses
    less = losses(DartUrda(**{left_out: False}), student, teacher, batch_of()).losses
    assert set(whole) - set(less) == {left_out}
    assert all(torch.equal(less[term], whole[term]) for term in less)


def test_without_the_entropy_weight_every_image_counts_as_one(name: str) -> None:
    student, teacher = student_and_teacher(name)
    student.classifier.batch_norm = "frozen"
    batch = batch_of()
    found = losses(DartUrda(entropy_weight=False, trade_off=1.0), student, teacher, batch)
    taught, own = teacher(batch.images).logits, student.evaluated(batch.images).logits
    expected = dart_urda.divergences(taught, own, 2.0).mean()
    assert torch.allclose(found.losses["prediction"][0], expected)
    assert torch.equal(found.metrics["certainty"], torch.ones(6))


def test_cached_teacher_outputs_equal_new_ones_and_the_teacher_runs_once(name: str) -> None:
    student, teacher = student_and_teacher(name)
    batch = batch_of()
    asked: list[int] = []
    outputs = teacher._outputs

    class Images:
        def __len__(self) -> int:
            return 6

        def batch(self, index: list[int]) -> Batch:
            return Batch(
                [batch.ids[i].removeprefix("target/") for i in index], batch.images[index], batch.labels[index]
            )

    def counted(images: Tensor) -> Any:
        asked.append(len(images))
        return outputs(images)

    teacher._outputs = counted
    plain = losses(DartUrda(), student, teacher, batch)
    teacher.cache_outputs(Images(), torch.device("cpu"))
    asked.clear()
    again = teacher.of(Batch([batch.ids[2] + "\0" + "1", batch.ids[0]], batch.images[[2, 0]], batch.labels[:2]))
    assert asked == []
    assert torch.allclose(again.logits, outputs(batch.images[[2, 0]]).logits, atol=1e-5)
    student_again, _ = student_and_teacher(name)
    assert torch.allclose(
        losses(DartUrda(), student_again, teacher, batch).losses["defense"], plain.losses["defense"], atol=1e-4
    )
    losses(DartUrda(augment="shift"), student, teacher, batch)
    assert asked == [6]  # a changed image is another one


# which term makes robust: four strong directions whose labels are noisy, 239 weak ones that together are sure

WIDTH = 9


def toy(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, 9, 9) in [0, 1], labels, and the class that the strong pixels show, which is another one now and then."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(4, 239, generator=torch.Generator().manual_seed(9)).sign()
    labels = torch.randint(0, 4, (count,), generator=generator)
    other = torch.randint(0, 4, (count,), generator=generator)
    shown = torch.where(torch.rand(count, generator=generator) < 0.1, other, labels)
    strong = 0.25 + 0.5 * torch.eye(4)[shown] + 0.02 * torch.randn(count, 4, generator=generator)
    weak = 0.5 + 0.02 * signs[labels] + 0.03 * torch.randn(count, 239, generator=generator)
    return torch.cat([strong, weak], dim=1).clamp(0, 1).view(count, 3, WIDTH, WIDTH), labels, shown


def trained(student: AdaptedStudent, teacher: FrozenTeacher | None, images: Tensor, labels: Tensor, steps: int) -> None:
    """So many steps of the one objective of ``student``, batches of 18."""
    options = Optimization(nesterov=True, weight_decay=5e-4)
    optimizer, accumulator = make_optimizer(student.parameters, options), Accumulator(student, teacher, options)
    for step in range(steps):
        index = torch.randint(0, len(images), (18,), generator=torch.Generator().manual_seed(step))
        ids = [f"target/{step}/{i}" for i in range(18)]
        accumulator.gradients(student.method, Batch(ids, images[index], labels[index]), ImageRng(0, ids, "toy"))
        update(student, optimizer, 0.05, None)


def toy_student(network: ImageClassifier, method: Any) -> AdaptedStudent:
    student: Any = AdaptedStudent(network, (method,), Processes("cpu"))
    student.method = method
    return student


def test_the_term_at_adversarial_images_makes_robust_and_the_others_alone_do_not() -> None:
    images, labels, _ = toy(1000, 1)
    held, truth, shown = toy(200, 2)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * WIDTH**2, 64), nn.ReLU())
    with torch.no_grad():
        flat[1].weight.normal_(0.0, 0.03, generator=torch.Generator().manual_seed(0))
        flat[1].bias.zero_()
    backbone = Backbone(flat, 64, WIDTH, (0.5,) * 3, (0.3,) * 3, "bicubic", {"kind": "toy"}, False)
    network = ImageClassifier(backbone, 4, bottleneck=64)
    trained(toy_student(network, SourceOnly()), None, images, labels, 150)
    teacher = FrozenTeacher("toy", copy_of(network))
    batch = Batch([str(i) for i in range(200)], held, truth)
    pseudo = predictions(teacher, batch)
    found: dict[bool, TargetNumbers] = {}
    for defense in (True, False):
        student = toy_student(copy_of(network), DartUrda(defense=defense))
        trained(student, teacher, images, torch.full_like(labels, -1), 250)
        found[defense] = target_numbers(student.classifier, batch, pseudo, 0.1, 0)
    before = target_numbers(copy_of(network), batch, pseudo, 0.1, 0)
    assert before.clean.share > 0.95
    assert before.worst.share < 0.05
    assert found[True].worst.share - found[False].worst.share > 0.8
    # what is robust says another class now and then: clean accuracy falls by that share, and by little more
    assert found[True].clean.share >= float((shown == truth).float().mean()) - 0.02
