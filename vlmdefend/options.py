"""How a field of a settings model is offered on the command line: help text, panel, flags, completion.

A settings model (pydantic) declares an option once: the field has the name, the type and the default, and an
:class:`Option` in its annotation has what only the command line needs; ``vlmdefend.cli.options.parameters`` reads both.
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """The command-line side of a settings field.

    Args:
        help: the help text, with the default in words where a profile or a method decides it.
        panel: the heading of ``--help`` under which the option is listed.
        flags: as they are typed, ``("--model", "-m")``; empty: the field's name.
        complete: the name of a function in ``vlmdefend.cli.options.complete``; empty: no completion.
        required: whether the command cannot run without it.
        cells: each value of the list is a cell of a grid; a command that takes one cell takes one value.
        single: the help text of such a command, where it differs.
        grid_only: such a command does not have the option.
    """

    help: str
    panel: str
    flags: tuple[str, ...] = ()
    complete: str = ""
    required: bool = False
    cells: bool = False
    single: str = ""
    grid_only: bool = False
