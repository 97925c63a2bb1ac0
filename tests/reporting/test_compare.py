import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.evaluation.store.records import Checks
from vlmdefend.reporting.compare.compare import Comparison, NotComparable, PairedCounts, compare, needed
from vlmdefend.reporting.compare.comparison_table import as_text

Make = Callable[..., Result]
Write = Callable[[Path, Iterable[Result]], Path]


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlmdefend", "compare", *map(str, args)], capture_output=True, text=True, check=False
    )


def one(comparisons: list[Comparison]) -> Comparison:
    assert len(comparisons) == 1
    return comparisons[0]


def test_losses_and_gains_are_counted_image_by_image(make: Make) -> None:
    found = one(compare([make([0, 1, 2, 3])], [make([2, 3, 4], weights_hash="new")]))
    worst = found.worst
    assert worst == PairedCounts(n=10, before=4, after=3, lost=2, won=1, p=1.0)  # 2 of 3: P = 4/8, twice (Holm) = 1
    assert found.clean == PairedCounts(n=10, before=10, after=10, lost=0, won=0, p=1.0)


def test_the_smallest_p_of_two_is_doubled_and_the_other_not_smaller(make: Make) -> None:
    # clean: 6 lost, none won: 1/64; worst: 7 lost (6 of them already when clean), none won: 1/128
    found = one(compare([make(range(10))], [make(range(6, 9), clean=range(6, 10), weights_hash="new")]))
    assert found.worst is not None
    assert found.worst.p == pytest.approx(2 / 128)
    assert found.clean.p == pytest.approx(2 / 128)  # 1 x 1/64 is the same here, and never below the one before
    three = compare(
        [make(range(10)), make(range(10), defense="jpeg")],
        [make(range(6, 9), clean=range(6, 10)), make(range(10), defense="jpeg")],
    )
    paired = {c.setting.defense: c for c in three}["ttc"].worst
    assert paired is not None
    assert paired.p == pytest.approx(4 / 128)  # four measures


def test_a_fall_within_the_tolerance_or_within_chance_is_none(make: Make) -> None:
    before, after = make(range(10)), make(range(4, 10), weights_hash="new")
    lost = one(compare([before], [after]))
    assert lost.worst is not None
    assert lost.worst.p == pytest.approx(2 / 16)
    assert lost.regressions(0.0, 0.2) == ["worst"]
    assert lost.regressions(0.0, 0.05) == []
    assert lost.regressions(0.4, 0.2) == []
    assert lost.regressions(0.39, 0.2) == ["worst"]
    exact = one(compare([make(range(100), ids=range(100))], [make(range(29, 100), ids=range(100))]))
    assert exact.regressions(29 / 100, 0.05) == []


def test_worst_is_over_all_attackers_of_a_side(make: Make) -> None:
    def side(name: str, white: list[int], adaptive: list[int]) -> list[Result]:
        return [
            make(white, weights_hash=name, attacker="whitebox"),
            make(adaptive, weights_hash=name, attacker="adaptive"),
        ]

    found = one(compare(side("old", [0, 1, 2], [1, 2, 3]), side("new", [0, 1, 2], [2, 3, 4])))
    assert found.worst is not None
    assert (found.worst.before, found.worst.after, found.worst.lost) == (2, 1, 1)


def test_one_model_on_each_side_may_be_called_differently(make: Make) -> None:
    found = one(compare([make([0], model="tiny-vit")], [make([0], model="local-dir:new")]))
    assert found.models == ("tiny-vit", "local-dir:new")
    with pytest.raises(NotComparable, match="the nearest differs in model"):
        compare([make([0]), make([0], model="tiny-rn")], [make([0]), make([0], model="other")])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"defense": "jpeg"}, "the nearest differs in defense"),
        ({"prompts_hash": "x"}, "the nearest differs in prompts_hash"),
        ({"protocol_hash": "x"}, "the nearest differs in protocol_hash"),
        ({"ids_hash": "x"}, "the nearest differs in ids_hash"),
        ({"images_hash": "x"}, "the nearest differs in images_hash"),
        ({"seed": 1}, "the nearest differs in seed"),
        ({"attack_config": {"steps": 100}}, "only the .* was attacked by pgd steps=1"),
        ({"attacker": "adaptive"}, "only the .* was attacked by pgd steps=10"),
        ({"status": "error", "error": "no memory"}, "failed .no memory.; run it again"),
        ({"ids": range(20, 30)}, "different images .10 and 10, 0 in both."),
        ({"ids": range(5)}, "different images .10 and 5, 5 in both."),
    ],
)
def test_what_was_made_differently_is_not_compared(make: Make, other: dict[str, object], says: str) -> None:
    with pytest.raises(NotComparable, match=says):
        compare([make([0])], [make([0], **other)])


@pytest.mark.parametrize(
    "other", [{"weights_hash": "old"}, {"code_hash": "old"}, {"batch_size": 4}, {"device": "cuda"}]
)
def test_a_side_that_holds_two_generations_is_not_compared(make: Make, other: dict[str, object]) -> None:
    """Worst is over all that stands in a folder: an old bad run would hide that a good one became as bad."""
    side = [make(range(8)), make(range(2), **other)]
    for pair in (side, [make(range(2))]), ([make(range(2))], side):
        with pytest.raises(NotComparable, match="holds an attack twice"):
            compare(*pair)


def test_clean_accuracy_is_one_question_at_all_radii(make: Make) -> None:
    """A correction for one more hypothesis per radius would hide it."""

    def side(right: range) -> list[Result]:
        attacked = [make((), right, range(100), eps=eps / 255) for eps in (1, 2, 4, 8, 16)]
        return [make((), right, range(100), eps=0.0, attack="none", attack_config={}), *attacked]

    found = compare(side(range(100)), side(range(7, 100)))
    assert len(found) == 6
    assert [c.clean.p for c in found] == pytest.approx(
        [6 / 128] * 6
    )  # one question of clean accuracy, five of robustness
    assert all(c.regressions(0.0, 0.05) == ["clean"] for c in found)
    assert needed(found, 0.0, 0.05) == 7


def test_settings_that_only_the_second_side_has_are_no_obstacle(make: Make) -> None:
    found = one(compare([make([0])], [make([0]), make([0], defense="jpeg")]))
    assert found.setting.defense == "ttc"


def test_a_gain_by_a_masked_gradient_is_doubtful_and_an_old_doubt_is_not_new(make: Make) -> None:
    def masked(robust: range) -> Result:
        return make(robust, checks=Checks(gradient_values=100, zero_gradients=100))

    found = one(compare([make(range(2))], [masked(range(9))]))
    assert any(doubt.startswith("MASKED? 100.0 %") for doubt in found.doubts)
    assert one(compare([masked(range(2))], [masked(range(9))])).doubts == ()


def test_the_exit_code_is_the_gate(tmp_path: Path, make: Make, write: Write) -> None:
    old = write(tmp_path / "old", [make(range(10))])
    new = write(tmp_path / "new", [make([], weights_hash="new")])
    other = write(tmp_path / "other", [make(range(10), defense="jpeg")])
    assert command(old, old).returncode == 0
    fell = command(old, new)
    assert fell.returncode == 1
    assert "REGRESSION ttc 4/255: worst 100.0 → 0.0 %, 10 images lost and 0 won of 10, p = 0.002" in " ".join(
        fell.stdout.split()
    )
    assert max(map(len, fell.stdout.splitlines())) <= 80
    assert command(old, new, "--tolerance", "100").returncode == 0
    assert "1 comparison: 1 of 1 failed; 6 images lost of 10, and none won, would count as a fall." in fell.stderr
    few = write(tmp_path / "few", [make(range(4), ids=range(4))])
    none = write(tmp_path / "none", [make([], ids=range(4), weights_hash="new")])
    blind = command(few, none)
    assert (blind.returncode, "4 images cannot show a fall" in blind.stderr) == (3, True)
    apart = command(old, other)
    assert (apart.returncode, apart.stdout) == (3, "")
    assert apart.stderr.startswith("error: ttc 4/255 on fashion: the second set of records has no counterpart")
    assert "Traceback" not in apart.stderr
    for wrong in ([tmp_path / "no"], [new, "--alpha", "0"], [new, "--tolerance", "101"], [new, "--alpha", "nan"]):
        refused = command(old, *wrong)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


def test_a_half_done_run_is_refused(tmp_path: Path, make: Make, write: Write) -> None:
    old = write(tmp_path / "old", [make(range(10))])
    half = write(tmp_path / "half", [make(range(10))])
    (half / "cells" / "begun").mkdir()
    (half / "cells" / "begun" / "partial.jsonl").touch()
    refused = command(old, half)
    assert refused.returncode == 2
    assert "1 cell is half done" in refused.stderr


def test_json_and_markdown_say_the_same(tmp_path: Path, make: Make, write: Write) -> None:
    old = write(tmp_path / "old", [make(range(10), model="a|b")])
    new = write(tmp_path / "new", [make([], model="c")])
    assert command(old, new, "-f", "json", "--out", tmp_path / "gate.json").returncode == 1
    (row,) = json.loads((tmp_path / "gate.json").read_text())
    assert (row["verdict"], row["regressions"], row["worst"]["lost"]) == ("REGRESSION", ["worst"], 10)
    assert row["model"] == ["a|b", "c"]
    page = command(old, new, "-f", "markdown").stdout
    assert page.startswith("### a\\|b → c on fashion")
    assert "| 100.0 → 100.0 | 0/0   | 100.0 → 0.0 | 10/0" in page


def test_tables_of_other_images_are_distinguished(make: Make) -> None:
    side = [make(range(10)), make(range(20), ids=range(20), ids_hash="j")]
    titles = [line for line in as_text(compare(side, side), 0.0, 0.05).splitlines() if line.startswith("tiny-vit on")]
    assert ["n = 10" in titles[0], "#i " in titles[0], "n = 20" in titles[1], "#j " in titles[1]] == [True] * 4
