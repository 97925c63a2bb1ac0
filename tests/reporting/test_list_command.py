import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import typer
from click.testing import Result as Outcome
from rich.cells import cell_len
from typer.testing import CliRunner

from vlmdefend.cli.list_ import list_names
from vlmdefend.errors import UserError

LONG = "counterattacks the image for a few steps, away from where its own features point, and keeps it if they are calm"


def run(*args: str) -> Outcome:
    app = typer.Typer()
    app.command()(list_names)
    return CliRunner().invoke(app, list(args), env={"COLUMNS": "80"})


class FakeRegistry:
    """Names to classes; ``broken`` cannot be imported."""

    prefixes: ClassVar[dict[str, str]] = {"theirs": "their.module"}

    def __init__(self, *classes: type[Any]) -> None:
        self.classes = {c.name: c for c in classes}  # type: ignore[attr-defined]

    def names(self) -> list[str]:
        return [*self.classes, "broken"]

    def get(self, name: str) -> type[Any]:
        if name == "broken":
            raise ImportError("No module named 'torchattacks'")
        return self.classes[name]


def fake(monkeypatch: pytest.MonkeyPatch, module: str, **content: object) -> None:
    made = ModuleType(module)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, module, made)


def described(name: str, **content: object) -> type[Any]:
    return type(name, (), {"name": name, **content})


def test_a_defense_that_cannot_be_loaded_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SimpleNamespace(text="BPDA through the counterattack", samples=1)
    ttc = described(
        "ttc", paradigm="training-free", summary=LONG, citation="Xing et al. 2025", stochastic=True, recipe=recipe
    )
    none = described("none", paradigm="none", summary="the bare model", citation="–", recipe="exact gradient")
    fake(monkeypatch, "vlmdefend.defenses", DEFENSES=FakeRegistry(ttc, none))
    outcome = run("defenses")
    assert outcome.exit_code == 0, outcome.exception
    joined = " ".join(outcome.stdout.split())
    assert max(map(cell_len, outcome.stdout.splitlines())) <= 80
    assert "ttc training-free" in joined
    assert "cannot be loaded: No module named 'torchattacks'" in joined


def test_attacks_show_norms_and_fall_back_to_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    pgd = described("pgd", norms=("linf", "l2"), summary="projected gradient descent", citation="Madry et al. 2018")
    bare = described("mine", __doc__="One of mine [bold].\n\nMore.")
    fake(monkeypatch, "vlmdefend.attacks", ATTACKS=FakeRegistry(pgd, bare))
    shown = run("attacks").stdout
    assert "linf l2" in shown
    assert "theirs:NAME" in shown
    assert "projected gradient descent (Madry et al. 2018)" in shown
    assert "One of mine [bold]." in shown


def test_datasets_models_and_protocols_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    line = SimpleNamespace(name="fashion", summary="clothes", classes=10, where="embedded")
    fake(monkeypatch, "vlmdefend.data.open", listed_datasets=lambda: [line])
    model = SimpleNamespace(name="tiny-vit", summary="ours", where="embedded")
    pair = SimpleNamespace(name="RN50:yfcc15m", summary="theirs", where="hub")
    fake(
        monkeypatch,
        "vlmdefend.models.names",
        listed_models=lambda *, every_pair: [model, pair] if every_pair else [model],
    )
    fake(
        monkeypatch,
        "vlmdefend.evaluation.grid.protocol",
        listed_protocols=lambda: [SimpleNamespace(name="tecoa", summary="native size", citation="Mao et al. 2023")],
    )
    assert "fashion  10       embedded  clothes" in run("datasets").stdout
    assert "tiny-vit  embedded  ours" in run("models").stdout
    assert "RN50:yfcc15m" not in run("models").stdout
    assert "RN50:yfcc15m  hub       theirs" in run("models", "--all").stdout
    assert "tecoa     native size (Mao et al. 2023)" in run("protocol").stdout


def test_methods_say_what_trains_and_what_an_image_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = SimpleNamespace(forward_backwards=4, teacher_forwards=2, once=3)
    low = described("low", summary="few", citation="A 2024", schedule=SimpleNamespace(trains="lora:2:0.25"), cost=cost)
    plain = described("a-pair", summary="two models", citation="B 2026", schedule=None, cost=cost)
    fake(monkeypatch, "vlmdefend.defenses.training_time", OBJECTIVES=FakeRegistry(low, plain))
    shown = " ".join(run("methods").stdout.split())
    paid = "cost: 4 forward+backwards and 2 of a frozen model an image and step, and 3 an image before the first"
    in_words = "trains: LoRA of rank 2 and dropout 0.25 in the image tower's attention, folded into the result"
    assert f"low train few (A 2024) {in_words} {paid}" in shown
    assert f"a-pair distill two models (B 2026) trains: the image tower {paid}" in shown
    assert "cannot be loaded: No module named 'torchattacks'" in shown


def test_adaptations_say_their_step_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = SimpleNamespace(forward_backwards=1, teacher_forwards=0, once=0)
    dann = described("dann", role="adaptation", summary="aligned", citation="Ganin et al. 2016", cost=cost)
    fake(monkeypatch, "vlmdefend.defenses.adaptation", ADAPTATIONS=FakeRegistry(dann))
    shown = " ".join(run("adaptations").stdout.split())
    assert "dann adaptation aligned (Ganin et al. 2016) cost: 1 forward+backwards an image and step" in shown


def test_json_is_a_list_of_objects_with_every_part_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SimpleNamespace(text="BPDA through it", samples=1)
    ttc = described(
        "ttc", paradigm="test-time adaptation", summary=LONG, citation="Xing 2025", stochastic=True, recipe=recipe
    )
    none = described("none", paradigm="none", summary="the bare model", citation="–", recipe="exact gradient")
    fake(monkeypatch, "vlmdefend.defenses", DEFENSES=FakeRegistry(ttc, none))
    listed = json.loads(run("defenses", "--json").stdout)
    for entry in listed:  # measured, and so not of these fakes
        for key in ("evidence", "worst_here", "gradient"):
            entry.pop(key, None)
    assert listed == [
        {"name": "none", "paradigm": "none", "summary": "the bare model", "adaptive_attack": "exact gradient"},
        {"name": "broken", "summary": "cannot be loaded: No module named 'torchattacks'"},
        {
            "name": "ttc",
            "paradigm": "test-time adaptation",
            "summary": LONG,
            "citation": "Xing 2025",
            "note": "random",
            "adaptive_attack": "BPDA through it",
        },
    ]


def test_an_unknown_kind_is_refused_with_the_nearest_name() -> None:
    for args, expected in ((["defences"], "did you mean 'defenses'?"), ([], "models|datasets|attacks")):
        outcome = run(*args)
        assert isinstance(outcome.exception, UserError)
        assert expected in str(outcome.exception)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("attacks", "pgd"),
        ("defenses", "none"),
        ("methods", "tecoa"),
        ("adaptations", "dart-urda"),
        ("datasets", "fashion"),
        ("models", "tiny-vit"),
        ("protocols", "unified"),
    ],
)
def test_the_real_lists_fit_80_columns(kind: str, expected: str) -> None:
    outcome = run(kind)
    assert outcome.exit_code == 0, outcome.exception
    assert expected in {line.partition(" ")[0] for line in outcome.stdout.splitlines()}
    assert max(map(cell_len, outcome.stdout.splitlines())) <= 80
    assert "cannot be loaded" not in outcome.stdout
    told = json.loads(run(kind, "--json").stdout)
    names = [one["name"] for one in told]
    assert expected in names
    assert len(set(names)) == len(names)
    assert all(one["summary"] for one in told)


def test_a_paradigm_lists_its_defenses_and_says_what_makes_each_a_member() -> None:
    listed = {name: json.loads(run("--paradigm", name, "--json").stdout) for name in ("test-time", "training-free")}
    assert {entry["paradigm"] for entry in listed["test-time"]} == {"test-time adaptation"}
    assert {entry["paradigm"] for entry in listed["training-free"]} == {"training-free"}
    verified = {
        entry["name"]
        for entries in listed.values()
        for entry in entries
        if entry["membership"] == "verified: the survey 2601.12443 has it"
    }
    assert verified == {"ttc", "cola"}
    assert all("evidence" in entry for entry in listed["training-free"])
    assert json.loads(run("Defense", "--paradigm", "test-time", "--json").stdout) == listed["test-time"]
    trained = {entry["name"] for entry in json.loads(run("--paradigm", "training-time", "--json").stdout)}
    assert {"tecoa", "hpt-gpd", "apt"} <= trained


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--paradigm", "trainingfree"), "did you mean 'training-free'"),
        (("models", "--paradigm", "test-time"), "models have none"),
        (("methods", "--paradigm", "test-time"), "it goes with defenses"),
    ],
)
def test_a_paradigm_that_is_none_is_refused(asked: tuple[str, ...], says: str) -> None:
    outcome = run(*asked)
    assert isinstance(outcome.exception, UserError)
    assert says in str(outcome.exception)
