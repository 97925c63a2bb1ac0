"""The command itself: help, version, and errors of the command line."""

from __future__ import annotations

import pytest
import typer

from tests.cli.conftest import Cli, one_sentence
from vlmdefend import __version__
from vlmdefend.cli import main


def test_without_a_command_the_help_is_shown(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert all(command in outcome.out for command in ("evaluate", "report", "list"))


def test_the_version_is_printed(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, f"vlmdefend {__version__}\n")


def test_help_shows_every_option_of_evaluate(cli: Cli) -> None:
    outcome = cli("evaluate", "--help")
    assert outcome.code == 0
    assert all(option in outcome.out for option in ("--model", "--attack", "--eps", "--config", "--dry-run"))


def test_an_unknown_option_of_the_command_itself_is_one_sentence(cli: Cli) -> None:
    outcome = cli("--nothing")
    assert outcome.code == 2
    assert "`vlmdefend --help` shows what there is." in one_sentence(outcome)


def test_a_missing_value_is_one_sentence(cli: Cli) -> None:
    outcome = cli("evaluate", "--eps")
    assert outcome.code == 2
    assert "--eps" in one_sentence(outcome)


def boom() -> None:
    raise ZeroDivisionError("a defect")


def quit_early() -> None:
    raise typer.Exit(7)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(boom)
    app.command("quit")(quit_early)
    monkeypatch.setattr(main, "app", app)
    return app


@pytest.mark.usefixtures("app")
def test_a_defect_is_one_line_and_exit_code_1(cli: Cli) -> None:
    outcome = cli("boom")
    assert outcome.code == 1
    assert outcome.err == "internal error: ZeroDivisionError: a defect (--debug shows where)\n"


@pytest.mark.usefixtures("app")
def test_the_exit_code_of_a_command_is_the_exit_code_of_the_process(cli: Cli) -> None:
    assert cli("quit").code == 7
