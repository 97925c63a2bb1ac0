from collections.abc import Callable

import pytest

from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.store.records import Checks, Cost, Skipped
from vlmdefend.reporting import over_seeds, verdict_rows
from vlmdefend.reporting.verdicts.row import VerdictRow

Make = Callable[..., Result]


def only(lines: list[VerdictRow]) -> VerdictRow:
    assert len(lines) == 1, lines
    return lines[0]


def test_worst_is_the_and_over_images_not_the_lowest_attacker(make: Make) -> None:
    line = only(
        verdict_rows(
            [
                make(range(0, 6), attacker="transfer"),
                make(range(3, 9), attacker="whitebox"),
                make([0, 3, 4, 9], attacker="adaptive"),
            ]
        )
    )
    assert {a: share.counts for a, share in line.robust.items()} == {
        "transfer": (6,),
        "whitebox": (6,),
        "adaptive": (4,),
    }
    assert line.worst is not None
    assert line.worst.counts == (2,)  # images 3 and 4
    assert line.worst.value == 0.2
    assert line.worst.interval == pytest.approx((0.0567, 0.5098), abs=1e-4)
    assert (line.n, line.covered) == (10, {"transfer", "whitebox", "adaptive"})


def test_every_attack_of_an_attacker_counts_also_two_settings_of_one(make: Make) -> None:
    line = only(
        verdict_rows(
            [
                make(range(0, 8)),
                make(range(2, 10), attack_config={"steps": 100}),
                make(range(0, 7), attack="square", attack_config={"queries": 500}, gradient_free=True),
            ]
        )
    )
    assert line.robust["whitebox"].counts == (5,)  # images 2 to 6
    assert line.attacks["whitebox"] == ("pgd steps=10", "pgd steps=100", "square queries=500")


def test_settings_that_share_a_label_are_spelled_out_where_they_differ(make: Make) -> None:
    configs = [{"steps": 10, "loss": "ce", "alpha": "eps/4"}, {"steps": 10, "loss": "dlr", "alpha": "eps/4"}]
    line = only(verdict_rows([make(range(5), attack_config=c) for c in configs]))
    assert line.attack_set == ("pgd steps=10 loss=ce", "pgd steps=10 loss=dlr")


def test_an_image_wrong_when_clean_is_not_robust(make: Make) -> None:
    line = only(verdict_rows([make(range(10), clean=range(7))]))
    assert line.clean is not None
    assert line.worst is not None
    assert (line.clean.counts, line.worst.counts) == ((7,), (7,))


def test_without_a_defense_the_three_attackers_are_one(make: Make) -> None:
    line = only(verdict_rows([make(range(5), defense="none")]))
    assert line.same_as_whitebox == ("transfer", "adaptive")
    assert line.covered == {"transfer", "whitebox", "adaptive"}


def test_adaptive_equals_white_box_only_where_the_record_says_so(make: Make) -> None:
    assert only(verdict_rows([make(range(5), adaptive_equals_whitebox=True)])).same_as_whitebox == ("adaptive",)
    assert only(verdict_rows([make(range(5))])).same_as_whitebox == ()
    lone = make(range(5), attacker="transfer", adaptive_equals_whitebox=True)
    assert only(verdict_rows([lone])).same_as_whitebox == ()


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": "tecoa"},
        {"protocol_hash": "other"},
        {"weights_hash": "other"},
        {"prompts_hash": "other"},
        {"defense_config": {"steps": 4}},
        {"ids_hash": "other"},
        {"split": "train"},
        {"norm": "l2"},
        {"eps": 8 / 255},
        {"seed": 1},
    ],
)
def test_what_changes_the_question_is_another_line(make: Make, other: dict[str, object]) -> None:
    lines = verdict_rows([make(range(5)), make(range(3), attack="apgd"), make(range(9), **other)])
    assert sorted(line.worst.counts[0] for line in lines if line.worst) == [3, 9]


def test_batch_sizes_and_devices_all_count_and_a_note_says_so(make: Make) -> None:
    line = only(verdict_rows([make(range(0, 6)), make(range(1, 7), batch_size=64, device="cuda")]))
    assert line.worst is not None
    assert line.worst.counts == (5,)
    assert line.notes == (
        "cells of several batch sizes (8, 64) all count",
        "cells of several devices (cpu, cuda) all count",
    )
    assert line.cost.device == "cuda"


def test_cells_over_other_images_are_combined_on_the_shared_ones_with_a_note(make: Make) -> None:
    skipped = [Skipped(id="9", reason="cut off")]
    line = only(verdict_rows([make(range(10)), make(range(10), ids=range(9), attacker="transfer", skipped=skipped)]))
    assert line.worst is not None
    assert (line.n, line.worst.ns) == (9, (9,))
    assert "different images (9 to 10)" in line.notes[0]
    assert line.notes[1] == "1 unreadable image left out"


def test_cells_without_a_shared_image_are_refused(make: Make) -> None:
    line = only(verdict_rows([make(range(5), ids=range(5)), make(range(5, 9), ids=range(5, 10), attacker="transfer")]))
    assert line.worst is None
    assert line.flags == ("ERROR",)
    assert "share no image" in line.errors[0]


def test_clean_predictions_that_differ_between_cells_are_noted(make: Make) -> None:
    line = only(verdict_rows([make(range(5)), make(range(5), clean=range(8), attacker="transfer")]))
    assert line.clean is not None
    assert line.clean.counts == (8,)
    assert "clean predictions of 2 images differ" in line.notes[0]


def test_a_failed_cell_is_an_error_beside_the_number_of_the_others(make: Make) -> None:
    failed = make(attacker="adaptive", status="error", error="RuntimeError: no\ngradient")
    line = only(verdict_rows([make(range(5)), failed]))
    assert line.worst is not None
    assert line.flags == ("ERROR",)
    assert line.errors == ("pgd steps=10 adaptive: RuntimeError: no gradient",)
    assert "adaptive" not in line.covered


def test_a_line_of_failures_only_has_no_number(make: Make) -> None:
    line = only(verdict_rows([make(status="error", error="boom")]))
    assert (line.clean, line.worst, line.flags) == (None, None, ("ERROR",))


def test_clean_cells_are_a_line_only_where_nothing_else_is(make: Make) -> None:
    clean = make(range(10), attack="none", attack_config={}, eps=0.0, gradient_free=True)
    line = only(verdict_rows([clean]))
    assert line.clean_only
    assert line.clean is not None
    assert line.clean.value == 1.0
    assert only(verdict_rows([clean, make(range(5))])).eps == 4 / 255


def test_a_failed_clean_cell_is_reported_beside_the_attacked_ones(make: Make) -> None:
    failed = make(attack="none", attack_config={}, eps=0.0, status="error", error="boom")
    assert only(verdict_rows([failed, make(range(5))])).errors == ("clean images: boom",)


def test_reasons_attach_to_their_radius_and_pipeline_reasons_to_all(make: Make) -> None:
    zeros = Checks(gradient_values=100, zero_gradients=50)
    cells = [make(range(5), checks=zeros), make(range(5), eps=8 / 255, checks=Checks(batch_dependent=True))]
    small, large = verdict_rows(cells)
    assert [r.kind for r in small.reasons] == ["batch mates", "zero gradients pgd steps=10 whitebox"]
    assert [r.kind for r in large.reasons] == ["batch mates"]


def test_seeds_merge_to_mean_and_spread(make: Make) -> None:
    lines = verdict_rows([make(range(k), seed=seed, stochastic=True) for seed, k in enumerate((4, 5, 6))])
    assert len(lines) == 3
    line = only(over_seeds(lines))
    assert line.worst is not None
    assert line.seeds == (0, 1, 2)
    assert line.worst.value == pytest.approx(0.5)
    assert line.worst.spread == pytest.approx(0.1)
    assert line.worst.interval is None
    assert line.n == 10


def test_merged_seeds_tell_what_only_some_of_them_have(make: Make) -> None:
    zeros = Checks(gradient_values=100, zero_gradients=50)
    cells = [
        make(range(5), seed=0, checks=zeros),
        make(range(5), seed=0, attacker="transfer"),
        make(range(5), seed=1),
        make(seed=2, status="error", error="boom"),
    ]
    line = only(over_seeds(verdict_rows(cells)))
    assert line.reasons[0].text.endswith("(like this in 1 of 3 seeds)")
    assert "transfer was run for 1 of 3 seeds" in line.notes
    assert line.errors == ("seed 2: pgd steps=10 whitebox: boom",)


def test_cost_is_per_image_and_adds_attacks_but_not_repetitions_of_one(make: Make) -> None:
    line = only(
        verdict_rows(
            [
                make(range(5)),
                make(range(5), batch_size=64),
                make(range(5), attacker="transfer"),
            ]
        )
    )
    assert (line.cost.deployed_forwards, line.cost.deployed_backwards) == (3.0, 2.0)
    assert line.cost.deployed_ms == pytest.approx(50.0)
    assert (line.cost.attack_forwards, line.cost.attack_backwards) == (22.0, 20.0)
    assert line.cost.peak_memory_mb == 512.0


def test_the_time_of_the_deployed_pipeline_is_that_of_the_fastest_cell(make: Make) -> None:
    slow = Cost(clean_images=10, clean_forwards=10, clean_seconds=5.0)
    fast = Cost(clean_images=10, clean_forwards=10, clean_seconds=0.1)
    lines = verdict_rows([make(range(5), cost=slow), make(range(5), attacker="transfer", cost=fast)])
    assert only(lines).cost.deployed_ms == pytest.approx(10.0)
    assert only(lines).cost.deployed_forwards == 1.0
    assert only(lines).cost.attack_forwards is None
