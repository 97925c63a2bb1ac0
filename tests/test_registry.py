"""Names to classes: files, entry points and plugins; what is written after a name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from vlmdefend import registry as registry_module
from vlmdefend.attacks import ATTACKS
from vlmdefend.data import SOURCES
from vlmdefend.defenses import DEFENSES
from vlmdefend.errors import UnknownName, UserError, did_you_mean
from vlmdefend.registry import Registry, check_options, load_plugin, parse_spec

EMPTY_ROOM = "vlmdefend.evaluation.grid.protocols"  # a package without Python files


@dataclass(frozen=True, kw_only=True)
class Widget:
    name: ClassVar[str] = "big-widget"
    size: int = 1
    ratio: float = 0.5
    mode: Literal["soft", "hard"] = "soft"
    target: Literal["any"] | int | None = None
    deep: bool = False


@pytest.fixture
def widgets(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: ())
    return Registry("widget", (EMPTY_ROOM,))


def named(name: str, module: str) -> type[Any]:
    return type("Named", (), {"name": name, "__module__": module})


# names


@pytest.mark.parametrize("registry", [ATTACKS, DEFENSES, SOURCES], ids=lambda r: r.kind)
def test_every_file_of_a_room_is_a_method_of_its_name(registry: Registry[Any]) -> None:
    assert registry.names()
    for name in registry.names():
        assert registry.get(name).name == name  # type: ignore[attr-defined]


def test_a_dash_an_underscore_and_capitals_are_one_name(widgets: Registry[Any]) -> None:
    widgets.register(Widget)
    assert {widgets.get(name) for name in ("big-widget", "big_widget", " Big-Widget ")} == {Widget}


def test_an_unknown_name_is_met_with_the_nearest_names(widgets: Registry[Any]) -> None:
    widgets.register(Widget)
    with pytest.raises(UnknownName, match=r"unknown widget 'big-wigdet'; did you mean 'big-widget'\?"):
        widgets.get("big-wigdet")


def test_a_name_far_from_all_is_met_with_a_short_list_or_the_command_that_shows_a_long_one() -> None:
    assert str(did_you_mean("widget", "zzz", ["b", "a"])) == "unknown widget 'zzz'; known: a, b."
    many = [f"name{i}" for i in range(30)]
    assert str(did_you_mean("widget", "zzz", many)).endswith("`vlmdefend list widgets` shows all 30.")


def test_listing_names_imports_no_method(widgets: Registry[Any], tmp_path: Path, monkeypatch: Any) -> None:
    package = tmp_path / "some_room"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "two_words.py").write_text("raise RuntimeError('imported')")
    (package / "_private.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert Registry[Any]("widget", ("some_room",)).names() == ["two-words"]
    assert Registry[Any]("widget", ("some_room",), separator="_").names() == ["two_words"]


def test_a_method_that_needs_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: ())
    package = tmp_path / "poor_room"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needy.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"widget 'needy' cannot be loaded \(.*No module named 'a_package_nobody_has'"):
        Registry[Any]("widget", ("poor_room",)).get("needy")


# registration


def test_a_name_cannot_be_defined_in_two_places(widgets: Registry[Any]) -> None:
    widgets.register(named("one", "first"))
    with pytest.raises(UserError, match="'one' is defined twice, in first and second; rename one"):
        widgets.register(named("one", "second"))


def test_a_module_may_be_loaded_again(widgets: Registry[Any]) -> None:
    widgets.register(named("one", "first"))
    again = widgets.register(named("one", "first"))
    assert widgets.get("one") is again


@pytest.mark.parametrize("name", ["pgd", "PGD"])
def test_a_built_in_name_cannot_be_taken_even_before_its_file_is_imported(name: str) -> None:
    fresh = Registry[Any]("attack", ("vlmdefend.attacks.gradient",), group="vlmdefend.attacks")
    with pytest.raises(UserError, match=r"is defined twice, in vlmdefend.attacks.gradient.pgd and mine"):
        fresh.register(named(name, "mine"))


def test_a_package_adds_a_method_through_an_entry_point(tmp_path: Path, monkeypatch: Any) -> None:
    registry = Registry[Any]("widget", (EMPTY_ROOM,))
    (tmp_path / "their_package.py").write_text(
        "import sys\nclass Theirs:\n    name = 'their-widget'\n"
        "sys.modules['widget_registry_of_this_test'].registry.register(Theirs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "widget_registry_of_this_test", type("Holder", (), {"registry": registry}))
    points = (EntryPoint("their-widget", "their_package:Theirs", EMPTY_ROOM),)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == EMPTY_ROOM else ())
    assert registry.names() == ["their-widget"]
    assert "their_package" not in sys.modules, "listing imports nothing"
    assert registry.get("their_widget").__name__ == "Theirs"
    assert [cls.__name__ for cls in registry] == ["Theirs"]


def test_an_entry_point_does_not_replace_a_built_in(monkeypatch: Any) -> None:
    points = (EntryPoint("pgd", "their_package:Pgd", "vlmdefend.attacks"),)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    fresh = Registry[Any]("attack", ("vlmdefend.attacks.gradient",), group="vlmdefend.attacks")
    assert fresh._files()["pgd"] == "vlmdefend.attacks.gradient.pgd"


# what is written after a name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgd", ("pgd", {})),
        ("pgd:steps=3", ("pgd", {"steps": "3"})),
        ("pgd:steps=3:loss=dlr", ("pgd", {"steps": "3", "loss": "dlr"})),
        ("pgd:random-start=no", ("pgd", {"random_start": "no"})),
        ("torchattacks:CW", ("torchattacks:CW", {})),
        ("torchattacks:CW:c=1", ("torchattacks:CW", {"c": "1"})),
        ("a: b = c=d ", ("a", {"b": "c=d"})),
        ("", ("", {})),
    ],
)
def test_a_written_method_splits_into_name_and_options(text: str, expected: tuple[str, dict[str, str]]) -> None:
    assert parse_spec(text) == expected


def test_an_option_written_twice_is_refused() -> None:
    with pytest.raises(UserError, match="gives random_start twice; keep one"):
        parse_spec("pgd:random-start=no:random_start=yes")


def test_options_turn_into_the_types_of_the_class(widgets: Registry[Any]) -> None:
    widgets.register(Widget)
    built = widgets.create("big_widget:size=3:ratio=1e-2:mode=hard:target=7:deep=yes")
    assert built == Widget(size=3, ratio=0.01, mode="hard", target=7, deep=True)
    assert widgets.create("big-widget:target=none").target is None
    assert widgets.create("big-widget:target=any").target == "any"
    assert widgets.create("big-widget:size=3", size=4).size == 4


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("size=ten", "big-widget:size='ten': input should be a valid integer"),
        ("size=1.5", "size='1.5'"),
        ("size=", "size=''"),
        ("ratio=inf", "ratio='inf': input should be a finite number"),
        ("mode=medium", "'soft' or 'hard'"),
        ("deep=perhaps", "deep='perhaps': input should be a valid boolean"),
        ("sizes=3", "unknown option of widget big-widget 'sizes'; did you mean 'size'?"),
    ],
)
def test_a_wrong_option_names_the_option_and_what_it_takes(written: str, expected: str, widgets: Registry[Any]) -> None:
    widgets.register(Widget)
    with pytest.raises(UserError) as raised:
        widgets.create(f"big-widget:{written}")
    assert expected in str(raised.value)


def test_a_class_without_options_says_so() -> None:
    with pytest.raises(UserError, match="known: none"):
        check_options("widget", named("plain", "here"), {"size": "3"})


def test_an_option_without_a_value_has_another_error_than_an_unknown_name(widgets: Registry[Any]) -> None:
    widgets.register(Widget)
    with pytest.raises(UserError, match="option 'size' has no value; write big-widget:size=VALUE"):
        widgets.create("big-widget:size")
    with pytest.raises(UnknownName):
        widgets.create("other:size")


# plugin files


def test_a_plugin_file_is_imported_once_given_and_a_missing_one_refused(tmp_path: Path) -> None:
    warnings: list[str] = []
    (tmp_path / "good.py").write_text("VALUE = 1")
    load_plugin(str(tmp_path / "good.py"), warnings.append)
    assert not warnings
    assert any(getattr(m, "VALUE", None) == 1 for n, m in sys.modules.items() if n.startswith("vlmdefend_plugin_good"))
    with pytest.raises(UserError, match="no such file; give the path of a Python file"):
        load_plugin(str(tmp_path / "missing.py"), warnings.append)
    with pytest.raises(UserError, match="not a Python file"):
        load_plugin(str(put(tmp_path / "notes.txt")), warnings.append)


def test_a_plugin_that_fails_leaves_nothing_behind_and_takes_nothing_away(tmp_path: Path, monkeypatch: Any) -> None:
    """What it registered before it failed is forgotten; a method that it was the first to import is not."""
    monkeypatch.setattr(registry_module, "entry_points", lambda group: ())
    room = tmp_path / "quiet_room"
    room.mkdir()
    (room / "__init__.py").write_text(
        "from vlmdefend.registry import Registry\nROOM = Registry('widget', (__name__,))\n"
    )
    thing = "from quiet_room import ROOM\n@ROOM.register\nclass Thing:\n    name = 'NAME'\n"
    (room / "thing.py").write_text(thing.replace("NAME", "thing"))
    (tmp_path / "mine.py").write_text("import quiet_room.thing\n" + thing.replace("NAME", "mine") + "raise ValueError")
    monkeypatch.syspath_prepend(tmp_path)
    warnings: list[str] = []
    load_plugin(str(tmp_path / "mine.py"), warnings.append)
    assert len(warnings) == 1
    registry = sys.modules["quiet_room"].ROOM
    assert registry.names() == ["thing"]
    assert registry.get("thing").name == "thing"
    (tmp_path / "mine.py").write_text(thing.replace("NAME", "mine"))
    load_plugin(str(tmp_path / "mine.py"), warnings.append)
    assert registry.names() == ["mine", "thing"], "mended, it loads"


def put(file: Path) -> Path:
    file.write_text("words")
    return file


def test_options_are_listed_however_many_there_are() -> None:
    many = [f"name{i}" for i in range(30)]
    sentence = str(did_you_mean("option of widget big", "zzz", many))
    assert all(name in sentence for name in many)
    assert "vlmdefend list" not in sentence, "there is no such list"
