from typing import Any

import pytest

from vlmdefend.evaluation.statistics.diagnostics import Reason, Result, attack_label, reasons
from vlmdefend.evaluation.statistics.paired import clearly_lower, robust_under_all, sign_test
from vlmdefend.evaluation.store.records import Cell, Checks, Cost, ImageRow, Record

CELL: dict[str, Any] = {
    "protocol": "unified",
    "protocol_hash": "p",
    "model": "tiny-vit",
    "weights_hash": "w",
    "defense": "ttc",
    "defense_config": {},
    "dataset": "fashion",
    "split": "test",
    "ids_hash": "i",
    "n": 100,
    "prompts_hash": "t",
    "attack": "pgd",
    "attack_config": {"steps": 10},
    "attacker": "whitebox",
    "norm": "linf",
    "eps": 4 / 255,
    "seed": 0,
    "batch_size": 8,
    "shard_size": 16,
    "device": "cpu",
}


def result(robust: range | None = None, *, checks: Checks | None = None, n: int = 100, **fields: Any) -> Result:
    """A cell of n clean-correct images, of which those numbered in ``robust`` survive."""
    alive = range(n) if robust is None else robust
    record_fields = {k: fields.pop(k) for k in ("stochastic", "gradient_free", "status", "cost") if k in fields}
    cell = Cell(**{**CELL, **fields})
    rows = [
        ImageRow(
            id=str(i),
            label=0,
            clean_prediction=0,
            clean_margin=-1.0,
            adversarial_prediction=0 if i in alive else 1,
            adversarial_margin=-0.5 if i in alive else 0.5,
            distance=cell.eps,
            steps=10,
        )
        for i in range(n)
    ]
    values: dict[str, Any] = {"status": "done", **record_fields}
    record = Record(
        key=cell.key, cell=cell, n=n, clean_correct=n, robust=len(alive), checks=checks or Checks(), **values
    )
    return Result(record, rows)


def only(found: list[Reason]) -> Reason:
    assert len(found) == 1, found
    return found[0]


def test_a_pipeline_without_masked_gradients_gives_no_reason() -> None:
    assert (
        reasons(
            [
                result(attack="none", attack_config={}, eps=0.0, gradient_free=True),
                result(range(60), attacker="transfer"),
                result(range(20)),
                result(range(18), attacker="adaptive"),
                result(range(40), attack="square", attack_config={"queries": 500}, gradient_free=True),
                result(range(50), eps=1 / 255),
            ]
        )
        == []
    )


def test_zero_gradients_above_one_percent_are_a_reason_at_that_cell() -> None:
    reason = only(reasons([result(checks=Checks(gradient_values=1000, zero_gradients=11))]))
    assert reason.word == "MASKED?"
    assert (reason.eps, reason.attackers) == (4 / 255, ("whitebox",))
    assert reason.text == "1.1 % of the pixel gradients of pgd steps=10 whitebox are zero or not finite"


@pytest.mark.parametrize("zero", [0, 10])
def test_zero_gradients_up_to_one_percent_are_none(zero: int) -> None:
    assert reasons([result(checks=Checks(gradient_values=1000, zero_gradients=zero))]) == []


def test_zero_gradients_of_a_gradient_free_attack_are_none() -> None:
    assert reasons([result(gradient_free=True, checks=Checks(gradient_values=10, zero_gradients=10))]) == []


def square(robust: range, **fields: Any) -> Result:
    return result(robust, **{"attack": "square", "attack_config": {"queries": 500}, "gradient_free": True, **fields})


def test_a_gradient_free_attack_that_wins_is_a_reason_at_that_attacker_and_eps() -> None:
    reason = only(reasons([result(range(45)), square(range(30)), result(range(60), eps=1 / 255)]))
    assert (reason.eps, reason.attackers) == (4 / 255, ("whitebox",))
    assert "square queries=500" in reason.text
    assert "30.0 %" in reason.text
    assert "45.0 %" in reason.text


def test_a_gradient_free_attack_is_held_against_all_gradient_attacks_together() -> None:
    # pgd with 100 steps leaves 25, fewer than square's 30: nothing is masked
    assert reasons([result(range(45)), result(range(25), attack_config={"steps": 100}), square(range(30))]) == []


def test_a_gradient_free_attack_of_the_white_box_is_held_against_the_adaptive_gradient_too() -> None:
    found = reasons([result(range(30)), result(range(45), attacker="adaptive"), square(range(30))])
    assert only(found).attackers == ("adaptive",)


def test_autoattack_far_below_pgd_is_a_reason_and_ten_points_are_none() -> None:
    pgd, near, far = result(range(60)), *(result(range(n), attack="autoattack", attack_config={}) for n in (50, 49))
    assert reasons([pgd, near]) == []
    (reason,) = reasons([pgd, far])
    assert reason.text.startswith("autoattack leaves 49.0 %, more than 10 points below the 60.0 % of pgd whitebox")
    assert (reason.word, reason.attackers) == ("MASKED?", ("whitebox",))
    assert reasons([result(range(60), attack="fgsm"), far]) == []
    assert reasons([result(range(60), attacker="adaptive"), far]) == []


def test_transfer_below_white_box_is_a_reason_with_the_numbers() -> None:
    reason = only(reasons([result(range(12), attacker="transfer"), result(range(45))]))
    assert reason.text == "transfer 12.0 % is below whitebox 45.0 %: the white-box gradient is masked"
    assert (reason.eps, reason.attackers) == (4 / 255, ("whitebox",))


def test_transfer_below_adaptive_is_a_reason_at_the_adaptive_attacker() -> None:
    reason = only(reasons([result(range(12), attacker="transfer"), result(range(45), attacker="adaptive")]))
    assert reason.attackers == ("adaptive",)


def test_transfer_is_compared_on_the_attacks_that_both_ran() -> None:
    # square beats both gradients, but as the same attack it leaves the same images for both attackers
    cells = [
        result(range(45), attacker="transfer"),
        square(range(45), attacker="transfer"),
        result(range(45)),
    ]
    assert reasons(cells) == []


def test_a_difference_within_the_paired_noise_is_no_reason() -> None:
    # 4 images more: p = 1/16; 5 images more: p = 1/32
    assert reasons([result(range(40), attacker="transfer"), result(range(44))]) == []
    assert len(reasons([result(range(40), attacker="transfer"), result(range(45))])) == 1


def test_a_difference_below_one_point_is_no_reason_however_sure() -> None:
    low, high = ({str(i): i >= lost for i in range(2000)} for lost in (19, 0))
    assert sign_test(19, 0) < 1e-5
    assert not clearly_lower(low, high)
    assert clearly_lower({**low, "1999": False}, high)


def test_images_won_and_lost_cancel() -> None:
    # 10 more here, 8 more there: a net of 2 points, p = 0.41
    assert reasons([result(range(8, 50), attacker="transfer"), result(range(40))]) == []
    assert reasons([result(range(8, 48), attacker="transfer"), result(range(0, 60))]) != []


def test_accuracy_that_rises_with_eps_is_a_reason_at_the_larger_eps() -> None:
    reason = only(reasons([result(range(50), eps=8 / 255), result(range(30), eps=1 / 255)]))
    assert (reason.eps, reason.attackers) == (8 / 255, ("whitebox",))
    assert reason.text.startswith("pgd steps=10 whitebox leaves 50.0 % at 8/255 but 30.0 % at 1/255")


def test_each_larger_eps_is_held_against_the_smaller_eps_that_left_fewest() -> None:
    found = reasons([result(range(50), eps=8 / 255), result(range(30), eps=1 / 255), result(range(40), eps=2 / 255)])
    assert [r.eps for r in found] == [2 / 255, 8 / 255]
    assert all("30.0 % at 1/255" in r.text for r in found)


def test_another_attack_or_attacker_at_a_smaller_eps_is_no_rising() -> None:
    stronger = result(range(30), eps=1 / 255, attack_config={"steps": 100})
    other = result(range(30), eps=1 / 255, attacker="transfer")
    assert reasons([result(range(50), eps=8 / 255), stronger, other]) == []


def test_survivors_that_no_step_moved_are_a_reason() -> None:
    reason = only(reasons([result(range(40), checks=Checks(attacked_survivors=40, loss_not_rising=21))]))
    assert reason.text == "pgd steps=10 whitebox did not raise the margin of 21 of the 40 images that survived it"
    assert reason.eps == 4 / 255


@pytest.mark.parametrize(
    ("checks", "fields"),
    [
        (Checks(attacked_survivors=40, loss_not_rising=20), {}),  # half, not more
        (Checks(attacked_survivors=40, loss_not_rising=40), {"eps": 0.0}),  # nothing could move
        (Checks(attacked_survivors=0, loss_not_rising=0), {}),
        (Checks(attacked_survivors=40, loss_not_rising=40), {"attacker": "transfer"}),  # climbed another loss
        (Checks(attacked_survivors=1, loss_not_rising=1), {"n": 1000}),  # less than a point
    ],
)
def test_survivors_that_moved_or_could_not_are_none(checks: Checks, fields: dict[str, Any]) -> None:
    assert reasons([result(range(1), checks=checks, **fields)]) == []


def test_two_forwards_that_differ_concern_the_whole_pipeline_unless_it_says_it_is_random() -> None:
    checks = Checks(forwards_differ=True)
    reason = only(reasons([result(checks=checks), result(checks=checks, eps=8 / 255)]))
    assert (reason.eps, reason.attackers) == (None, ())
    assert "two forwards" in reason.text
    assert reasons([result(checks=checks, stochastic=True)]) == []


def test_predictions_that_change_with_batch_mates_are_a_reason_even_on_a_clean_cell() -> None:
    cell = result(checks=Checks(batch_dependent=True), attack="none", attack_config={}, eps=0.0)
    assert "batch" in only(reasons([cell])).text


def test_images_outside_the_budget_are_another_word() -> None:
    reason = only(reasons([result(checks=Checks(outside_budget=3), cost=Cost(attack_images=90))]))
    assert (reason.word, reason.eps) == ("BUDGET!", 4 / 255)
    assert "on 3 of 90 images" in reason.text


def test_failed_cells_are_passed_over() -> None:
    failed = Result(result(attacker="transfer", status="error").record, ())
    assert reasons([failed, result(range(45))]) == []


def test_robust_under_all_is_the_and_over_shared_images() -> None:
    both = robust_under_all([result(range(0, 60)), result(range(40, 100)), result(range(100), n=50)])
    assert len(both) == 50
    assert [i for i, alive in both.items() if alive] == [str(i) for i in range(40, 50)]
    assert robust_under_all([]) == {}


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 1 / 32), (4, 1, 6 / 32), (0, 3, 1.0), (10, 8, 0.407264709)]
)
def test_sign_test_equals_the_binomial_tail(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(p)


def test_an_attack_is_named_by_how_hard_it_tries() -> None:
    one = result(attack_config={"loss": "ce", "restarts": 1, "steps": 10, "queries": None}).record.cell
    assert attack_label(one) == "pgd steps=10"
    assert attack_label(result(attack_config={"steps": 10, "restarts": 5}).record.cell) == "pgd steps=10 restarts=5"
