"""The loop: identities of the two stages, and what must not change the result."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from tests.training.conftest import EPS, MakeRun, stages
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.errors import UserError
from vlmdefend.training.loop import Run
from vlmdefend.training.memory import STATE
from vlmdefend.training.stage import Stage
from vlmdefend.training.student import TrainedStudent
from vlmdefend.training.weights import Weights, copied

EPOCHS = 3


def result(run: Run) -> Weights:
    run.run()
    return copied(run.student.weights())


def same(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def close(first: Weights, second: Weights, atol: float = 1e-6) -> bool:
    return all(torch.allclose(first[name], second[name], atol=atol, rtol=1e-4) for name in first)


def stage_b(**changes: object) -> Stage:
    return replace(Stage(name="b", objective=HptGpd(eps=EPS, alpha=EPS), epochs=EPOCHS, rate=0.05), **changes)


@pytest.fixture
def pivot(make_run: MakeRun) -> Weights:
    vanilla = copied(make_run("pivot").student.weights())
    generator = torch.Generator().manual_seed(0)
    return {name: w + 0.01 * torch.randn(w.shape, generator=generator) for name, w in vanilla.items()}


# identities


def test_at_rate_zero_the_pivot_is_vanilla_to_the_bit_and_so_is_the_result(make_run: MakeRun) -> None:
    plan = [replace(stage, rate=0.0) for stage in stages()]
    run = make_run(plan=plan)
    vanilla = copied(run.student.weights())
    memory = run.run()
    assert same(memory.pivot, vanilla)
    assert same(copied(run.student.weights()), vanilla)


@pytest.mark.parametrize("pull", [0.0, 0.5, 0.9, 1.0])
def test_at_rate_zero_stage_b_is_a_geometric_way_to_the_pivot(make_run: MakeRun, pivot: Weights, pull: float) -> None:
    run = make_run(plan=[stage_b(rate=0.0, pull=pull)], pivot=pivot)
    vanilla = copied(run.student.weights())
    share = pull ** (EPOCHS - 1)
    expected = {name: share * vanilla[name] + (1 - share) * pivot[name] for name in vanilla}
    assert close(result(run), expected)


def test_a_pull_before_the_first_epoch_is_one_pull_more(make_run: MakeRun, pivot: Weights) -> None:
    run = make_run(plan=[stage_b(rate=0.0, pull=0.5, pull_first=True)], pivot=pivot)
    vanilla = copied(run.student.weights())
    expected = {name: 0.5**EPOCHS * vanilla[name] + (1 - 0.5**EPOCHS) * pivot[name] for name in vanilla}
    assert close(result(run), expected)


def test_stage_b_begins_from_vanilla_to_the_bit_whatever_stage_a_did(make_run: MakeRun) -> None:
    run = make_run()
    vanilla, seen = copied(run.student.weights()), {}
    objective = HptGpd.losses

    def losses(self: HptGpd, student: TrainedStudent, *rest: object) -> object:
        seen.setdefault(self.anchored, copied(student.weights()))
        return objective(self, student, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HptGpd, "losses", losses)
        run.run()
    assert same(seen[True], vanilla)
    assert same(seen[False], vanilla)
    assert not same(copied(run.student.weights()), vanilla)


def test_the_pivot_is_the_average_of_the_epochs_of_stage_a(make_run: MakeRun) -> None:
    only_a = stages()[:1]
    run = make_run("whole", plan=only_a)
    vanilla = copied(run.student.weights())
    memory = run.run()
    thetas = [make_run("whole").student.weights()]  # epoch 2 is where the run ended
    thetas = [copied(run.student.weights())]
    interrupted = make_run("first epoch", plan=only_a, at=3)  # 20 images in batches of 8: 3 steps
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    thetas.insert(0, copied(interrupted.student.weights()))
    expected = {n: 0.81 * vanilla[n] + 0.09 * thetas[0][n] + 0.1 * thetas[1][n] for n in vanilla}
    assert close(memory.pivot, expected)


def test_a_sum_at_a_rate_is_a_mean_at_that_rate_times_the_batch(make_run: MakeRun) -> None:
    plan = lambda reduction, rate: [  # noqa: E731
        stage_b(objective=HptGpd(eps=EPS, alpha=EPS, batch_reduction=reduction), rate=rate, epochs=2)
    ]
    common = {"images": 16, "clip": None}
    summed = make_run("sum", plan=plan("sum", 1e-4), **common)
    start = copied(summed.student.weights())
    summed, mean = result(summed), result(make_run("mean", plan=plan("mean", 8e-4), **common))
    assert close(summed, mean, atol=1e-5)
    assert not close(summed, start, atol=1e-4)


def test_stage_b_depends_on_stage_a_through_the_pivot_alone(make_run: MakeRun) -> None:
    both = make_run("both")
    memory = both.run()
    alone = make_run("alone", plan=stages()[1:], pivot=memory.pivot)
    assert same(result(alone), copied(both.student.weights()))


def test_a_pull_without_a_pivot_is_refused(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match="pulls towards a pivot and there is none"):
        make_run(plan=stages()[1:]).run()


# what stays as it is


def test_the_proxy_the_text_tower_and_the_scale_stay_to_the_bit(make_run: MakeRun) -> None:
    run = make_run()
    clip, proxy = run.student.classifier.clip, run.teacher.classifier.clip
    before = copied(clip.state_dict()), copied(proxy.state_dict())
    run.run()
    assert same(copied(proxy.state_dict()), before[1])
    for name, tensor in clip.state_dict().items():
        moved = not torch.equal(tensor, before[0][name])
        trains = name in run.student.parameters
        assert moved <= trains, name
    still = {n for n in run.student.parameters if torch.equal(clip.state_dict()[n], before[0][n])}
    assert still <= {"visual.attnpool.k_proj.bias"}  # softmax does not feel it


def test_training_everything_moves_the_text_tower_and_keeps_the_scale_in_range(make_run: MakeRun) -> None:
    run = make_run(trains="all")
    clip = run.student.classifier.clip
    before = clip.token_embedding.weight.detach().clone(), clip.positional_embedding.detach().clone()
    run.run()
    assert not torch.equal(clip.token_embedding.weight, before[0])
    assert not torch.equal(clip.positional_embedding, before[1])
    assert 0 <= float(clip.logit_scale.detach()) <= math.log(100)


def test_trained_batch_norm_goes_into_average_and_pull(make_run: MakeRun) -> None:
    run = make_run(batch_norm="train")
    memory = run.run()
    statistics = [name for name in memory.pivot if name.endswith("running_var")]
    assert statistics
    assert all((memory.pivot[name] > 0).all() for name in statistics)
    assert not any(name.endswith("num_batches_tracked") for name in memory.pivot)


# going on after an interruption


def whole(make_run: MakeRun, name: str, **options: object) -> tuple[Run, Weights]:
    run = make_run(name, **options)
    return run, result(run)


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7, 9, 12])
def test_a_run_broken_off_at_any_step_ends_with_the_bits_of_one_that_was_not(make_run: MakeRun, at: int) -> None:
    first, expected = whole(make_run, "whole")
    with pytest.raises(KeyboardInterrupt):
        make_run("broken", at=at).run()
    second, found = whole(make_run, "broken")
    assert same(found, expected)
    assert same(second.memory.pivot, first.memory.pivot)
    assert second.memory.epochs == first.memory.epochs
    for file in (STATE, "log.jsonl"):
        assert (second.folder / file).read_bytes() == (first.folder / file).read_bytes()


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"trains": "all"}, {"batch_norm": "train"}])
def test_so_does_one_that_is_broken_off_twice_whatever_trains(make_run: MakeRun, options: dict[str, str]) -> None:
    first, expected = whole(make_run, "whole", **options)
    for at in (5, 11):
        with pytest.raises(KeyboardInterrupt):
            make_run("broken", at=at, **options).run()
    _, found = whole(make_run, "broken", **options)
    assert same(found, expected)
    assert (first.folder / STATE).read_bytes() == (first.folder.parent / "broken" / STATE).read_bytes()


def test_a_finished_run_is_found_done(make_run: MakeRun) -> None:
    _, expected = whole(make_run, "whole")
    again = make_run("whole")
    assert same(result(again), expected)
    assert again.listener.lines == []


def test_the_log_has_one_line_a_step_with_every_loss_and_the_proxys_accuracy(make_run: MakeRun) -> None:
    run, _ = whole(make_run, "whole")
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    steps, epochs = [x for x in lines if "rate" in x], [x for x in lines if "mean" in x]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"ga", "loss", "gradient_norm", "proxy_accuracy_clean"} <= set(steps[0])
    assert {"hpt", "loss", "proxy_accuracy_adversarial", "target_accuracy_adversarial"} <= set(steps[-1])
    assert [(line["stage"], line["epoch"]) for line in epochs] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    first = [line["ga"] for line in steps[:3]]
    assert epochs[0]["mean"]["ga"] == pytest.approx((8 * first[0] + 8 * first[1] + 4 * first[2]) / 20)


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
    assert [note.partition(";")[0] for note in run.listener.notes] == [
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
    call = TrainedStudent.__call__

    def trained(self: TrainedStudent, images: torch.Tensor) -> object:
        inside["which"] = "trained"
        try:
            return call(self, images)
        finally:
            inside["which"] = "attacked"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainedStudent, "__call__", trained)
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
    assert run.listener.lines[0]["gradient_norm"] > 0.01
