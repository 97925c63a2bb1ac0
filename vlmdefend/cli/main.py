"""The ``vlmdefend`` command."""

from __future__ import annotations

import sys
from typing import Any

import typer

from vlmdefend import __version__
from vlmdefend.cli.attack import attack
from vlmdefend.cli.compare import compare
from vlmdefend.cli.distill import distill
from vlmdefend.cli.evaluate import evaluate
from vlmdefend.cli.list_ import list_names
from vlmdefend.cli.proxy_gap import proxy_gap
from vlmdefend.cli.report import report
from vlmdefend.cli.train import train
from vlmdefend.cli.urda_train import urda_train
from vlmdefend.errors import UserError

app = typer.Typer(
    name="vlmdefend",
    help="How robust is a vision-language model, with this defense, really, and what does the robustness cost?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(evaluate)
app.command()(attack)
app.command()(train)
app.command()(distill)
app.command("proxy-gap")(proxy_gap)
app.command("urda-train")(urda_train)
app.command()(report)
app.command()(compare)
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
    """Entry point: a user's error is one sentence and exit code 2; a defect is one line and exit code 1."""
    try:
        # without a command: the help; not standalone: typer's own errors come here too
        code = app(sys.argv[1:] or ["--help"], prog_name="vlmdefend", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # an unknown option or command: typer's, or click's in older versions
            typer.echo(f"error: {_usage(error)}", err=True)
            sys.exit(2)
        if "--debug" in sys.argv:
            raise
        typer.echo(f"internal error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        sys.exit(1)


def _usage(error: Any) -> str:
    """Turns typer's message on a wrong command line into one sentence with a next step."""
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "vlmdefend"
    return f"{message[:1].lower()}{message[1:]}; `{command} --help` shows what there is."
