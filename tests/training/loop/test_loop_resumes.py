"""A run that was broken off goes on to the bits of one that was not, and logs every step once."""

from __future__ import annotations

import json

import pytest

from tests.training.clip.short_runs import result, same, whole
from tests.training.conftest import MakeRun
from vlmdefend.training.loop.trainer_state import STATE

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7, 9, 12])
def test_a_run_broken_off_at_any_step_ends_with_the_bits_of_one_that_was_not(make_run: MakeRun, at: int) -> None:
    first, expected = whole(make_run, "whole")
    with pytest.raises(KeyboardInterrupt):
        make_run("broken", at=at).run()
    second, found = whole(make_run, "broken")
    assert same(found, expected)
    assert same(second.state.pivot, first.state.pivot)
    assert second.state.epochs == first.state.epochs
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
    assert again.progress.lines == []


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
