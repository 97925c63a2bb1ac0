"""The ``vlmdefend`` command."""

from __future__ import annotations

import sys

import typer

from vlmdefend import __version__
from vlmdefend.cli.evaluate import evaluate
from vlmdefend.cli.list_ import list_names
from vlmdefend.cli.report import report
from vlmdefend.errors import UserError

app = typer.Typer(
    name="vlmdefend",
    help="How robust is a vision-language model, with this defense, really, and what does the robustness cost?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(evaluate)
app.command()(report)
app.command("list")(list_names)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vlmdefend {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Common options."""


def run() -> None:
    """Entry point: what the user can mend is one sentence and exit code 2; a defect is one line and exit code 1."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"internal error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        sys.exit(1)
