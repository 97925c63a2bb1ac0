"""Too little memory, less precision, numbers that are not finite: what they change, and what stops a run."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.clip.short_runs import close, result, same, stage_b
from tests.training.conftest import MakeRun
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.errors import UserError
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.loop.weight_averages import copied

# what must not change the result


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_gradient_accumulation_gives_the_same_weights(make_run: MakeRun, micro_batch: int) -> None:
    plan = [stage_b(epochs=2)]
    expected = result(make_run("whole", plan=plan))
    assert close(result(make_run("parts", plan=plan, micro_batch=micro_batch)), expected, atol=1e-5)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(make_run: MakeRun) -> None:
    objective = HptGpd.losses

    def hungry(self: HptGpd, student: object, teacher: object, batch: object, rng: object) -> object:
        terms = objective(self, student, teacher, batch, rng)
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return terms

    plan = [stage_b(epochs=2)]
    expected = result(make_run("small", plan=plan, micro_batch=2))
    run = make_run("hungry", plan=plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HptGpd, "losses", hungry)
        assert same(result(run), expected)
    assert run.accumulator.halved == [4, 2]
    assert [note.partition(";")[0] for note in run.progress.notes] == [
        f"out of memory: the micro-batch is halved to {size} images" for size in (4, 2)
    ]


def test_a_single_image_that_does_not_fit_is_one_sentence(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> object:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(HptGpd, "losses", never)
    with pytest.raises(UserError, match="a single image does not fit into memory in training"):
        make_run().run()


def test_another_error_is_not_taken_for_memory(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> object:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HptGpd, "losses", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        make_run().run()


def test_bfloat16_trains_in_bfloat16_and_attacks_in_float32(make_run: MakeRun) -> None:
    run = make_run(precision="bfloat16", plan=[stage_b(epochs=1)])
    dtypes: dict[str, set[torch.dtype]] = {"attacked": set(), "trained": set()}
    inside = {"which": "attacked"}
    conv = run.student.classifier.clip.visual.conv1
    conv.register_forward_hook(lambda module, args, output: dtypes[inside["which"]].add(output.dtype))
    call = ClipStudent.__call__

    def trained(self: ClipStudent, images: torch.Tensor) -> object:
        inside["which"] = "trained"
        try:
            return call(self, images)
        finally:
            inside["which"] = "attacked"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipStudent, "__call__", trained)
        run.run()
    assert dtypes == {"attacked": {torch.float32}, "trained": {torch.bfloat16}}
    assert all(w.dtype == torch.float32 for w in run.student.weights().values())


# what stops a run


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_state(make_run: MakeRun) -> None:
    objective, calls = HptGpd.losses, []

    def sick(self: HptGpd, *args: object) -> object:
        terms = objective(self, *args)
        calls.append(1)
        return terms._replace(losses={"hpt": terms.losses["hpt"] * (math.nan if len(calls) == 6 else 1)})

    run = make_run(plan=[stage_b()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HptGpd, "losses", sick)
        with pytest.raises(
            UserError, match=r"stage b, epoch 2, step 6: the loss is nan; nothing of this step was kept"
        ):
            run.run()
    assert all(w.isfinite().all() for w in run.student.weights().values())
    healthy = make_run(plan=[stage_b()])
    assert same(result(healthy), result(make_run("other", plan=[stage_b()])))


def test_a_gradient_that_is_not_finite_stops_too(make_run: MakeRun) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.inf

    objective = HptGpd.losses

    def sick(self: HptGpd, *args: object) -> object:
        terms = objective(self, *args)
        return terms._replace(losses={"hpt": Broken.apply(terms.losses["hpt"])})

    run = make_run(plan=[stage_b()])
    vanilla = copied(run.student.weights())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HptGpd, "losses", sick)
        with pytest.raises(UserError, match=r"the norm of the gradient is (nan|inf).*smaller --lr-b"):
            run.run()
    assert same(copied(run.student.weights()), vanilla)


def test_clipping_bounds_the_step(make_run: MakeRun) -> None:
    plan = [stage_b(rate=0.1, epochs=1)]
    run = make_run(plan=plan, images=8, momentum=0.0, clip=0.01, warm_up=0)
    vanilla = copied(run.student.weights())
    moved = result(run)
    length = math.sqrt(sum(float((moved[n] - vanilla[n]).square().sum()) for n in moved))
    assert length == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert run.progress.lines[0]["gradient_norm"] > 0.01
