"""Parts that `attack` and `evaluate` share: the config file, and the grid of file and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmdefend.cli.options.common import RUN, load_plugins
from vlmdefend.evaluation.grid.grid import Grid, read_config

Config = Annotated[Path | None, typer.Option(help="YAML file with these options; flags win.", rich_help_panel=RUN)]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="Python file that registers attacks, defenses or data sources.", rich_help_panel=RUN),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the cells and their cost; compute nothing.", rich_help_panel=RUN)
]


def read_file(config: Path | None) -> dict[str, Any]:
    """Returns the keys of ``--config``; none without it."""
    return {} if config is None else read_config(config)


def make_grid(given: dict[str, Any], settings: dict[str, Any], plugins: list[str] | None) -> Grid:
    """Loads the plugins of flags or file, then returns the grid of both; flags win.

    Args:
        given: the options on the command line.
        settings: the keys of the file, without those that are no field of a grid; ``plugin`` is taken out.
        plugins: the files of ``--plugin``.
    """
    from_file = settings.pop("plugin", None) or []
    load_plugins(plugins or (from_file if isinstance(from_file, list) else [from_file]))
    if given.get("templates") == ["dataset"]:
        given["templates"] = "dataset"
    return Grid.build(settings, given)
