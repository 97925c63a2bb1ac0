"""Renders verdict rows in a chosen format as a string, or prints them on a console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.evaluation.store.records import ImageRow, Record
from vlmdefend.reporting.tables.groups import verdict_tables
from vlmdefend.reporting.verdicts.row import VerdictRow
from vlmdefend.reporting.verdicts.verdict import verdict_rows

if TYPE_CHECKING:
    from rich.console import Console


FORMATS = ("terminal", "markdown", "latex", "csv", "parquet")


def render(lines: Sequence[VerdictRow], format: str = "terminal") -> str:
    """Returns verdict rows (one per seed, as from :func:`verdict_rows`) as text of a format.

    Terminal, Markdown and LaTeX merge seeds to mean and spread; CSV keeps one row per seed. Parquet is not text: see
    :func:`vlmdefend.reporting.tables.frame.parquet`.

    Raises:
        UserError: an unknown format, or Parquet.
    """
    if format not in FORMATS:
        raise did_you_mean("format", format, list(FORMATS))
    if format == "parquet":
        raise UserError("a Parquet file is not text: give --out FILE.")
    if format == "csv":
        from vlmdefend.reporting.tables.frame import csv

        return csv(lines)
    groups = verdict_tables(lines)
    if format == "markdown":
        from vlmdefend.reporting.tables.markdown import markdown

        return markdown(groups)
    if format == "latex":
        from vlmdefend.reporting.tables.latex import latex

        return latex(groups)
    from vlmdefend.reporting.tables.terminal import text

    return text(groups)


def print_verdict(cells: Iterable[tuple[Record, Sequence[ImageRow]]], console: Console | None = None) -> None:
    """Prints the verdict on these cells: tables, reasons to doubt them, costs."""
    from rich.console import Console

    from vlmdefend.reporting.tables.terminal import print_groups

    print_groups(verdict_tables(verdict_rows(cells)), console or Console())
