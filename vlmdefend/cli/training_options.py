"""Options that `distill` and `train` share, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, METHOD, TRAIN, RUN = "Models and images", "The method", "How to train", "How to run"
OPTION = typer.Option

Split = Annotated[str | None, OPTION(help="Its split; never a test split.  \\[default: train]", rich_help_panel=WHAT)]
Limit = Annotated[int | None, OPTION(help="Class-balanced subset of so many images.", rich_help_panel=WHAT)]
HeldOut = Annotated[
    int | None,
    OPTION(
        help="Training images held out to measure on and choose by; at most a fifth.  \\[default: 500]",
        rich_help_panel=WHAT,
    ),
]
Classes = Annotated[Path | None, OPTION(help="File of class names, one per line.", rich_help_panel=WHAT)]
Templates = Annotated[
    list[str] | None,
    OPTION("--template", help="Prompt with {c} for the class; repeat to ensemble.", rich_help_panel=WHAT),
]
Root = Annotated[Path | None, OPTION(help="Folder of downloaded data sets.", rich_help_panel=WHAT)]
SkipBad = Annotated[bool, OPTION("--skip-bad", help="Leave out images that cannot be read.", rich_help_panel=WHAT)]
Momentum = Annotated[float | None, OPTION(help="Of SGD.  \\[default: 0.9]", rich_help_panel=TRAIN)]
MicroBatch = Annotated[
    int | None,
    OPTION(
        help="Images at once in a process; halved when memory runs out.  \\[default: its share]",
        rich_help_panel=TRAIN,
    ),
]
Precision = Annotated[
    str | None,
    OPTION(
        help="float32, bfloat16 or float16 of the update; the attack is always float32.  "
        "\\[default: accelerate's, else float32]",
        rich_help_panel=TRAIN,
    ),
]
Seed = Annotated[int | None, OPTION(help="\\[default: 0]", rich_help_panel=TRAIN)]
SaveEvery = Annotated[
    int | None,
    OPTION(help="Steps between saved states.  \\[default: each epoch, and five minutes]", rich_help_panel=RUN),
]
Track = Annotated[
    str | None, OPTION(help="tensorboard, trackio or wandb, beside the log in OUT/training.", rich_help_panel=RUN)
]
Device = Annotated[str | None, OPTION(help="cpu, cuda, cuda:1.  \\[default: the GPU if any]", rich_help_panel=RUN)]
Threads = Annotated[int | None, OPTION(help="CPU threads.  \\[default: torch's]", rich_help_panel=RUN)]
DryRun = Annotated[bool, OPTION("--dry-run", help="Print choices and cost; train nothing.", rich_help_panel=RUN)]
Debug = Annotated[bool, OPTION("--debug", help="Show tracebacks.", rich_help_panel=RUN)]
