"""Every command keeps its options: names, flags, defaults and panels are those of the stored list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from vlmdefend.cli.main import app

STORED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("help.json").read_text(encoding="utf-8"))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def described(parameter: Any) -> dict[str, Any]:
    """The parameter as it is stored in help.json."""
    default = parameter.default
    return {
        "flags": [*parameter.opts, *parameter.secondary_opts],
        "default": None if default in (None, False, [], ()) else str(default),
        "panel": getattr(parameter, "rich_help_panel", None),
        "multiple": bool(getattr(parameter, "multiple", False)),
        "required": parameter.required,
        "help": getattr(parameter, "help", None),
    }


def test_the_commands_are_those_of_the_stored_list() -> None:
    assert list(COMMANDS) == list(STORED)


@pytest.mark.parametrize("command", STORED)
def test_options_are_those_of_the_stored_list(command: str) -> None:
    """A deliberate change of an option is a change of help.json in the same commit."""
    found = {parameter.name: described(parameter) for parameter in COMMANDS[command].params}
    assert found == STORED[command]


def test_every_option_but_few_says_what_it_is() -> None:
    for command, options in STORED.items():
        for name, option in options.items():
            assert option["help"], (command, name)
