"""The lesson that the tool exists for: an attacker who knows the defense finds what transfer examples miss."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlmdefend
from vlmdefend.evaluation.diagnostics import Result, sign_test


def robust(results, attacker: str) -> dict[str, bool]:  # type: ignore[no-untyped-def]
    return next({row.id: row.robust for row in rows} for record, rows in results if record.cell.attacker == attacker)


@pytest.mark.parametrize(
    ("model", "defense", "eps"),
    [
        ("tiny-vit", "jpeg", "8/255"),
        ("tiny-vit", "jpeg", "16/255"),
        ("tiny-rn", "jpeg", "4/255"),
        ("tiny-rn", "noise", "4/255"),
    ],
)
def test_transfer_accuracy_is_clearly_above_adaptive(model: str, defense: str, eps: str, tmp_path: Path) -> None:
    """Clearly: by 5 points or more, and by the paired sign test at p < 0.01.

    tiny-vit with noise is not here: transfer examples cross noise as well as adaptive ones do on that model, whose
    8-pixel patches average the noise out (measured: 55.0 % against 53.5 % at sigma 48/255).
    """
    found = vlmdefend.evaluate(
        tmp_path, model=model, defense=defense, eps=eps, limit=160, attacker=["transfer", "adaptive"], threads=1
    )
    assert not found.failures
    transfer, adaptive = robust(found.results, "transfer"), robust(found.results, "adaptive")
    gained = sum(transfer[i] and not adaptive[i] for i in transfer)
    lost = sum(adaptive[i] and not transfer[i] for i in transfer)
    assert gained - lost >= 0.05 * len(transfer)
    assert sign_test(gained, lost) < 0.01


def test_plain_white_box_on_a_cut_gradient_is_flagged(tmp_path: Path) -> None:
    from vlmdefend.evaluation.diagnostics import reasons

    found = vlmdefend.evaluate(tmp_path, defense="jpeg", eps="16/255", limit=60, threads=1)
    said = reasons([Result(*result) for result in found.results])
    assert any("zero" in reason.text for reason in said)
    assert any("transfer" in reason.text for reason in said)
    assert all(reason.word == "MASKED?" for reason in said)


def test_low_pass_is_broken_by_the_plain_white_box(tmp_path: Path) -> None:
    found = vlmdefend.evaluate(tmp_path, defense="low_pass", eps="16/255", limit=100, threads=1)
    by_attacker = {record.cell.attacker: record.robust / record.n for record, _ in found.results}
    assert set(by_attacker) == {"transfer", "whitebox"}  # exact gradients: adaptive adds nothing
    assert by_attacker["whitebox"] < 0.1 < by_attacker["transfer"] - 0.1
