"""A batch in parts: which methods' losses add up over processes, and what is said when memory is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.functional import to_tensor

from tests.training.adaptation.domains import CLASSES, adaptation, picture, weights_of, write_domains
from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import UNKNOWN
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.rng import ImageRng
from vlmdefend.training.adaptation import summary
from vlmdefend.training.adaptation.student import AdaptedStudent, copy_of
from vlmdefend.training.adaptation.teacher import as_teacher
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.stage import Optimization
from vlmdefend.training.loop.update import Accumulator
from vlmdefend.types import Batch

TRAINS = [c.name for c in ADAPTATIONS if c.trains]
EACH = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domains(tmp_path_factory.mktemp("domains"), train=4, test=2)


def share(method: Any, places: list[int]) -> Batch:
    """The images of these places, of each domain that the method asks for."""
    drawn = [to_tensor(picture(i % 3, i, dark=i >= EACH)) for i in range(2 * EACH)]
    images = torch.stack(drawn)
    ids = [*(f"source/{i}" for i in range(EACH)), *(f"target/{i}" for i in range(EACH))]
    labels = torch.tensor([i % 3 for i in range(EACH)] + [UNKNOWN] * EACH)
    chosen = [] if method.domains == "target" else list(places)
    chosen += [] if method.domains == "source" else [EACH + i for i in places]
    return Batch([ids[i] for i in chosen], images[chosen], labels[chosen])


@pytest.mark.parametrize("name", TRAINS)
def test_losses_add_up_over_shares_exactly_where_a_method_says_so(teacher: str, name: str) -> None:
    options = {"steps": 2} if hasattr(ADAPTATIONS.get(name), "steps") else {}
    method = ADAPTATIONS.create(name, **options)
    model: Any = load_model(teacher, device="cpu")

    def total(places: list[int]) -> float:
        student = AdaptedStudent(copy_of(model.classifier), (method,), Processes("cpu"))
        student.classifier.batch_norm = "frozen"
        student.iteration = 500
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():  # images that are distinguished
            student.classifier.head.weight.mul_(40.0)
            for parameter in student.auxiliary.get("discriminator", torch.nn.Identity()).parameters():
                parameter.mul_(4.0)
            student.classifier.bottleneck[0].weight.add_(0.05 * torch.randn(16, 576, generator=generator))
        batch = share(method, places)
        found = method.losses(student, as_teacher(model, CLASSES), batch, ImageRng(0, batch.ids, "x")).losses
        return float(torch.stack(list(found.values())).sum(dim=0).mean().detach())

    apart = abs(total(list(range(EACH))) - 0.5 * (total([0, 1, 2, 3]) + total([4, 5, 6, 7])))
    assert apart < 2e-5 if method.additive else apart > 1e-4


def test_processes_are_refused_where_they_would_make_another_model(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Processes.__init__

    def two(self: Processes, *args: Any) -> None:
        made(self, *args)
        self.count = 2

    monkeypatch.setattr(Processes, "__init__", two)
    frozen = {"batch_norm": "frozen"}
    for options, message in (
        ({"method": "mcc"}, "mcc compares the images of a batch with one another"),
        ({"method": "shot"}, "shot compares"),
        ({"teacher": teacher, "reduction": "sum"}, "--reduction sum"),
        ({"teacher": teacher, "robustify": "srouda"}, "srouda compares"),
    ):
        with pytest.raises(UserError, match=message):
            adaptation(root, tmp_path / "out", **frozen, **options)
    adaptation(root, tmp_path / "out", **frozen, method="mdd")
    adaptation(root, tmp_path / "out", **frozen, method="mcc", teacher=teacher)  # of the two, DART alone trains


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mdd"}, r"--batch-norm train .* smaller --batch-size, or --batch-norm frozen"),
        (
            {"method": "mdd", "batch_norm": "frozen"},
            r"mdd needs the whole batch at once; give a smaller --batch-size\.",
        ),
        ({"step": 2}, r"--batch-norm train .* smaller --batch-size-student, or"),
        ({"step": 2, "batch_norm": "frozen", "reduction": "sum"}, r"whole batch at once; .* --batch-size-student"),
    ],
)
def test_short_memory_is_one_sentence_with_the_option_of_its_step(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    given = {"teacher": teacher} if options.pop("step", 1) == 2 else {}
    cls = ADAPTATIONS.get("dart-urda" if given else "mdd")

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cls, "losses", full)
    with pytest.raises(UserError, match=message) as caught:
        adaptation(root, tmp_path / "out", **given, **options).run(Progress())
    assert "\n" not in str(caught.value)


def test_where_images_do_not_see_one_another_the_batch_is_worked_on_in_halves(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = ADAPTATIONS.get("dart-urda")
    losses, most = cls.losses, 8

    def small(self: Any, student: Any, given: Any, batch: Batch, rng: Any) -> Any:
        if len(batch.ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses(self, student, given, batch, rng)

    monkeypatch.setattr(cls, "losses", small)
    options = {"teacher": teacher, "batch_norm": "frozen", "epochs_student": 1}
    notes: list[str] = []
    for most, name in ((8, "whole"), (3, "halves")):  # noqa: B007
        heard = Progress()
        heard.note = notes.append  # type: ignore[method-assign]
        adaptation(root, tmp_path / name, **options).run(heard)
    assert notes == [
        f"out of memory: the micro-batch is halved to {size} images; the batch stays as it is" for size in (4, 2)
    ]
    first, second = (load_model(f"local-dir:{tmp_path / n}", device="cpu").clip for n in ("whole", "halves"))
    for name, tensor in first.state_dict().items():
        assert torch.allclose(tensor, second.state_dict()[name], atol=1e-5), name
    assert weights_of(tmp_path / "whole") != weights_of(Path(teacher.removeprefix("local-dir:")))


def test_short_memory_in_judging_keeps_the_training(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(summary, "target_numbers", full)
        with pytest.raises(UserError, match=r"out of memory while the 6 test images were judged.*--eval-limit"):
            adaptation(root, tmp_path / "out", teacher=teacher).run(Progress())
    assert adaptation(root, tmp_path / "out", teacher=teacher).run(Progress()).after is not None


def test_other_errors_are_not_taken_for_short_memory(
    root: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(summary, "target_numbers", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        adaptation(root, tmp_path / "out", teacher=teacher).run(Progress())


def test_a_gradient_of_many_images_is_that_of_their_halves(teacher: str) -> None:
    model: Any = load_model(teacher, device="cpu")
    method = ADAPTATIONS.create("dart-urda", steps=2)
    gradients = []
    for micro_batch in (None, 3):
        student = AdaptedStudent(copy_of(model.classifier), (method,), Processes("cpu"))
        student.classifier.batch_norm = "frozen"
        with torch.no_grad():
            student.classifier.head.weight.add_(0.1)
        batch = share(method, list(range(EACH)))
        accumulator = Accumulator(student, as_teacher(model, CLASSES), Optimization(micro_batch=micro_batch))
        accumulator.gradients(method, batch, ImageRng(0, batch.ids, "x"))
        gradients.append(student.classifier.bottleneck[0].weight.grad.clone())
    assert float(gradients[0].abs().max()) > 0
    assert torch.allclose(*gradients, atol=1e-6)
