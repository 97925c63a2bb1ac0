"""The loop: identities of the two stages, and what no step may move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.training.clip.short_runs import EPOCHS, close, result, same, stage_b
from tests.training.conftest import EPS, MakeRun, stages
from vlmdefend.defenses.training_time.hpt_gpd import HptGpd
from vlmdefend.errors import UserError
from vlmdefend.training.clip.student import ClipStudent
from vlmdefend.training.loop.weight_averages import Weights, copied


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

    def losses(self: HptGpd, student: ClipStudent, *rest: object) -> object:
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
