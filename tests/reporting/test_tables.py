import io
import json
import re
from collections.abc import Callable

import pandas
import pytest
from rich.cells import cell_len
from rich.console import Console

from vlmdefend.errors import UserError
from vlmdefend.evaluation.statistics.diagnostics import Result
from vlmdefend.reporting import print_verdict, render, verdict_rows
from vlmdefend.reporting.tables.frame import frame, parquet
from vlmdefend.reporting.tables.groups import verdict_tables
from vlmdefend.reporting.tables.latex import escape as latex_escape
from vlmdefend.reporting.tables.markdown import escape as markdown_escape

Make = Callable[..., Result]
NASTY = "a|b_c[red]&100%$#{x}~^\\<i>*"


def test_the_terminal_table_is_the_documented_one(grid: list[Result]) -> None:
    text = render(verdict_rows(grid), "terminal")
    joined = " ".join(text.split())
    assert "tiny-vit on fashion (test, n = 100) · pgd steps=10 linf · protocol unified · seed 0" in joined
    rows = [line.split() for line in text.splitlines()]
    assert ["none", "4/255", "90.0", "=", "30.0", "=", "30.0", "[21.9,", "39.6]"] in rows
    assert ["ttc", "4/255", "88.0", "50.0", "60.0", "40.0", "40.0", "[30.9,", "49.8]", "MASKED?"] in rows
    assert ["jpeg", "4/255", "89.0", "40.0", "35.0", "-", "35.0", "[26.4,", "44.7]", "ERROR"] in rows
    assert "MASKED? ttc 4/255: transfer 50.0 % is below whitebox 60.0 %: the white-box gradient is masked" in joined
    assert "ERROR jpeg 4/255: pgd steps=10 adaptive: ValueError: the surrogate returned no gradient" in joined
    assert ["ttc", "training-free", "3+2", "50", "33+30", "1500", "512"] in rows


@pytest.mark.parametrize("width", [80, 100, 200])
def test_terminal_fits_and_never_breaks_a_number(make: Make, width: int) -> None:
    name = "a_defense_with_a_very_long_name_indeed"
    cells = [make(range(100), ids=range(100), defense=name, attacker=a) for a in ("transfer", "whitebox", "adaptive")]
    cells += [make(range(99), ids=range(100), defense="none", eps=eps) for eps in (16 / 255, 0.03141)]
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        print_verdict(cells, console)
    lines = capture.get().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert any("100.0    100.0    100.0    100.0 100.0 [96.3, 100.0]" in line for line in lines)
    assert "…" not in capture.get()


def test_a_narrow_terminal_cuts_nothing(grid: list[Result]) -> None:
    console = Console(file=io.StringIO(), width=40)
    with console.capture() as capture:
        print_verdict(grid, console)
    assert "40.0 [30.9, 49.8] MASKED?" in capture.get()
    assert "…" not in capture.get()


def test_without_a_terminal_there_are_no_escape_codes(grid: list[Result]) -> None:
    stream = io.StringIO()
    print_verdict(grid, Console(file=stream, width=80))
    assert "\x1b" not in stream.getvalue()
    assert all(line == line.rstrip() for line in render(verdict_rows(grid)).splitlines())


def test_protocols_are_never_in_one_table(make: Make) -> None:
    groups = verdict_tables(verdict_rows([make(range(5)), make(range(5), protocol="tecoa")]))
    assert [group.title.split(" · ")[2] for group in groups] == ["protocol tecoa", "protocol unified"]


def test_different_options_behind_one_name_are_distinguished(make: Make) -> None:
    cells = [
        make(range(5), defense_config={"steps": 2, "tau": 0.2}),
        make(range(5), defense_config={"steps": 4, "tau": 0.2}),
        make(range(5), weights_hash="abcdef123", ids_hash="fedcba987"),
    ]
    text = " ".join(render(verdict_rows(cells)).split())
    assert "ttc steps=2" in text
    assert "ttc steps=4" in text
    assert "tiny-vit#abcdef on fashion (test, n = 10, images #fedcba)" in text


def test_radii_with_other_attacks_and_seeds_are_listed_below(make: Make) -> None:
    cells = [
        make(range(5), defense="none"),
        make(range(5), attack="apgd", attack_config={}, seed=0),
        make(range(4), attack="apgd", attack_config={}, seed=1),
    ]
    text = render(verdict_rows(cells))
    assert "linf, attacks below" in text
    assert "note none 4/255: attacks pgd steps=10" in text
    assert "note ttc 4/255: attacks apgd" in text
    assert "note ttc 4/255: seeds 0, 1" in text
    assert "45.0 ± 7.1" in text


def test_the_best_is_bold_in_latex_once_per_radius_and_never_a_doubtful_one(make: Make, grid: list[Result]) -> None:
    pattern = r"^([^&\n]*) & ([^&\n]*) &.*\\textbf\{([^}]*)\}"
    bold = re.findall(pattern, render(verdict_rows(grid), "latex"), re.MULTILINE)
    # jpeg is higher but not covered by the adaptive attacker, ttc is masked
    assert bold == [("none", "1/255", "50.0 [40.4, 59.6]"), ("none", "4/255", "30.0 [21.9, 39.6]")]
    assert "textbf" not in render(verdict_rows([make(range(5))]), "latex")


def test_a_defense_that_met_fewer_attacks_is_not_the_best(make: Make) -> None:
    met = [make(range(5), defense="jpeg", attack=a, adaptive_equals_whitebox=True) for a in ("pgd", "fgsm")]
    spared = make(range(9), defense="ttc", attack="fgsm", adaptive_equals_whitebox=True)
    (group,) = verdict_tables(verdict_rows([*met, spared]))
    assert [group.is_best(line) for line in group.lines] == [True, False]
    (group,) = verdict_tables(verdict_rows([met[1], spared]))
    assert [group.is_best(line) for line in group.lines] == [False, True]


@pytest.mark.parametrize("format", ["terminal", "markdown", "latex", "csv"])
def test_names_from_data_are_printed_as_they_are(make: Make, format: str) -> None:
    lines = verdict_rows([make(range(5), defense="none"), make(range(5), defense=NASTY, model=f"m{NASTY}\x1b[31m\n")])
    text = render(lines, format)
    if format == "terminal":
        assert NASTY in text.replace("\n", "")
        assert "\x1b" not in text
    elif format == "markdown":
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.split(r"(?<!\\)\|", line)) for line in tables} == {13}
        assert markdown_escape(NASTY) in text
        assert not re.search(r"(?<!\\)<", text)
    elif format == "latex":
        assert latex_escape(NASTY) in text
        body = re.sub(r"\\[&%$#_{}]", "", re.sub(r"^%.*", "", text))
        assert all("#" not in line and "_" not in line for line in body.splitlines())
        assert body.count("{") == body.count("}")
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") for line in rows} == {8}
    else:
        assert set(pandas.read_csv(io.StringIO(text))["defense"]) == {"none", NASTY}


def test_markdown_reads_back_as_a_table(grid: list[Result]) -> None:
    text = render(verdict_rows(grid), "markdown")
    table = "\n".join(line for line in text.splitlines() if line.startswith("| "))
    read = pandas.read_csv(io.StringIO(table), sep="|", skipinitialspace=True)
    assert len(read) == 6
    assert [c.strip() for c in read.columns[1:6]] == ["defense", "paradigm", "eps", "clean", "transfer"]


def test_csv_and_parquet_hold_the_same_one_row_per_line(make: Make, grid: list[Result]) -> None:
    lines = verdict_rows([*grid, make(range(5), seed=1), make(range(3), dataset="mnist", status="error", error="x")])
    expected = frame(lines)
    assert len(expected) == len(lines) == 8
    stored = pandas.read_parquet(io.BytesIO(parquet(lines)))
    pandas.testing.assert_frame_equal(stored, expected, check_dtype=False)
    csv = io.StringIO(render(lines, "csv"))
    text = pandas.read_csv(csv, dtype=expected.dtypes.to_dict(), keep_default_na=False, na_values=[""])
    for column in expected:
        same = expected[column].replace("", None) if expected[column].dtype == "string" else expected[column]
        pandas.testing.assert_series_equal(text[column], same)


def test_csv_holds_shares_of_one_with_intervals_and_costs(grid: list[Result]) -> None:
    data = pandas.read_csv(io.StringIO(render(verdict_rows(grid), "csv"))).set_index(["defense", "eps"])
    ttc, none = data.loc[("ttc", 4 / 255)], data.loc[("none", 4 / 255)]
    assert ttc["worst"] == 0.4
    assert ttc["worst_low"] == pytest.approx(0.3094, abs=1e-4)
    assert (ttc["worst_count"], ttc["n"]) == (40, 100)
    assert ttc["flags"] == "MASKED?"
    assert "below whitebox" in json.loads(ttc["reasons"])[0]
    assert none["adaptive"] == none["whitebox"] == 0.3
    assert none["same_as_whitebox"] == "transfer adaptive"
    assert (ttc["deployed_forwards"], ttc["attack_backwards"], ttc["peak_memory_mb"]) == (3.0, 30.0, 512.0)


def test_parquet_without_pyarrow_says_how_to_get_it(grid: list[Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=re.escape("pip install 'vlmdefend[report]'")):
        parquet(verdict_rows(grid))


def test_an_unknown_format_is_refused_with_the_nearest_name(grid: list[Result]) -> None:
    with pytest.raises(UserError, match="did you mean 'markdown'"):
        render(verdict_rows(grid), "markdwon")
