"""Options that `attack` and `evaluate` share, each in one place, and the grid that they come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmdefend.cli import complete

if TYPE_CHECKING:
    from vlmdefend.evaluation.grid.grid import Grid

WHAT, HOW, RUN = "Models and images", "How to attack", "How to run"
OPTION = typer.Option

# `evaluate` takes several, `attack` one
MODEL = OPTION(
    "--model",
    "-m",
    help="tiny-vit, ViT-B/32, ARCH:TAG, hf-hub:..., local-dir:PATH.  \\[default: tiny-vit]",
    autocompletion=complete.models,
    rich_help_panel=WHAT,
)
DEFENSE = OPTION(
    "--defense",
    "-d",
    help="none, jpeg, noise:sigma=0.03, ttc+jpeg ...  \\[default: none]",
    autocompletion=complete.defenses,
    rich_help_panel=WHAT,
)
DATASET = OPTION(
    "--dataset",
    help="fashion, emoji:sketch, cifar10, folder:PATH, wds:PATH ...  \\[default: fashion]",
    autocompletion=complete.datasets,
    rich_help_panel=WHAT,
)

Split = Annotated[str | None, OPTION(help="Split of the data set.  \\[default: test]", rich_help_panel=WHAT)]
Limit = Annotated[
    int | None,
    OPTION(help="Class-balanced, seeded subset of so many images.  \\[default: 1000]", rich_help_panel=WHAT),
]
Full = Annotated[bool, OPTION("--full", help="All images of the split.", rich_help_panel=WHAT)]
Classes = Annotated[Path | None, OPTION(help="File of class names, one per line.", rich_help_panel=WHAT)]
Templates = Annotated[
    list[str] | None,
    OPTION(
        "--template",
        help="Prompt with {c} for the class (repeat to ensemble), or 'dataset' for the set's own list.",
        rich_help_panel=WHAT,
    ),
]
Weights = Annotated[Path | None, OPTION(help="Local weights file for the model.", rich_help_panel=WHAT)]
Root = Annotated[Path | None, OPTION(help="Folder of downloaded data sets.", rich_help_panel=WHAT)]
SkipBad = Annotated[
    bool, OPTION("--skip-bad", help="Record and skip images that cannot be read.", rich_help_panel=WHAT)
]
Norm = Annotated[str | None, OPTION(help="linf or l2.  \\[default: the protocol's]", rich_help_panel=HOW)]
Steps = Annotated[int | None, OPTION(help="Steps of an attack that takes steps.", rich_help_panel=HOW)]
Protocol = Annotated[str | None, OPTION(help="Named set of choices.  \\[default: unified]", rich_help_panel=HOW)]
Config = Annotated[Path | None, OPTION(help="YAML file with these options; flags win.", rich_help_panel=RUN)]
BatchSize = Annotated[int | None, OPTION(help="Images in the model at once.  \\[default: 64]", rich_help_panel=RUN)]
Device = Annotated[str | None, OPTION(help="cpu, cuda, cuda:1.  \\[default: the GPU if any]", rich_help_panel=RUN)]
Threads = Annotated[int | None, OPTION(help="CPU threads.  \\[default: torch's]", rich_help_panel=RUN)]
Plugin = Annotated[
    list[str] | None,
    OPTION(help="Python file that registers attacks, defenses or data sources.", rich_help_panel=RUN),
]
DryRun = Annotated[
    bool, OPTION("--dry-run", help="Print the cells and their cost; compute nothing.", rich_help_panel=RUN)
]
Debug = Annotated[bool, OPTION("--debug", help="Show tracebacks.", rich_help_panel=RUN)]


def read_file(config: Path | None) -> dict[str, Any]:
    """The keys of ``--config``; none without it."""
    from vlmdefend.evaluation.grid.grid import read_config

    return {} if config is None else read_config(config)


def make_grid(flags: dict[str, Any], settings: dict[str, Any]) -> Grid:
    """The plugins of flags or file loaded, then the grid of both; flags win.

    Args:
        flags: every parameter of the command.
        settings: the keys of the file, without those that are no field of a grid and no ``plugin``.
    """
    from vlmdefend.evaluation.grid.grid import Grid
    from vlmdefend.registry import load_plugin

    from_file = settings.pop("plugin", None) or []
    for file in flags["plugin"] or (from_file if isinstance(from_file, list) else [from_file]):
        load_plugin(str(file), lambda message: typer.echo(f"warning: {message}", err=True))
    given = {name: flags[name] for name in Grid.model_fields if name in flags}
    if given["templates"] == ["dataset"]:
        given["templates"] = "dataset"
    return Grid.build(settings, given)
