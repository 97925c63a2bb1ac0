"""Parts that several commands share: the options of every long run, plugins, interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

RUN = "How to run"
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=RUN)]
TrainDryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print choices and cost; train nothing.", rich_help_panel=RUN)
]


def load_plugins(files: list[str] | None) -> None:
    """Imports the files of ``--plugin``; prints a warning for each that cannot be imported."""
    from vlmdefend.registry import load_plugin

    for file in files or []:
        load_plugin(str(file), lambda message: typer.echo(f"warning: {message}", err=True))


@contextmanager
def resumable(folder: Path, what: Literal["saved", "done"]) -> Iterator[None]:
    """Ends the command with exit code 130 on Ctrl-C, and prints where finished work is kept."""
    try:
        yield
    except KeyboardInterrupt:
        sentence = {"done": f"what is done is kept in {folder}", "saved": f"what was saved is in {folder}"}[what]
        typer.echo(f"interrupted; {sentence}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
