"""``vlmdefend train``: the training-time defenses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmdefend.cli.options import complete
from vlmdefend.cli.options.common import RUN, Debug, TrainDryRun, load_plugins, resumable
from vlmdefend.cli.options.parameters import options_of
from vlmdefend.registry import parse_spec
from vlmdefend.training.settings.hpt_gpd_options import HPT_GPD, distill_options
from vlmdefend.training.settings.run_settings import WHAT
from vlmdefend.training.settings.train_settings import TrainSettings, make_train_settings


@options_of(TrainSettings)
def train(
    given: dict[str, Any],
    proxy: Annotated[
        str | None,
        typer.Option(
            help="Vanilla model to learn from, of --method hpt-gpd alone.",
            autocompletion=complete.models,
            rich_help_panel=WHAT,
        ),
    ] = None,
    proxy_weights: Annotated[
        Path | None, typer.Option(help="Local weights file for the proxy.", rich_help_panel=WHAT)
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers data sources or methods.", rich_help_panel=RUN)
    ] = None,
    dry_run: TrainDryRun = False,
    debug: Debug = False,
) -> None:
    """Make a CLIP robust by training: TeCoA, FARE, PMG-AFT, TGA-ZSR and others, one loop for all.

    [bold]vlmdefend train --method tecoa --model tiny-vit[/bold] runs anywhere, in minutes. The result is a model
    folder: `evaluate --model local-dir:OUT`, with any defense around it. Several GPUs: the same command under
    `torchrun --nproc-per-node N -m vlmdefend` or `accelerate launch -m vlmdefend`.
    """
    from vlmdefend.errors import UserError

    load_plugins(plugin)
    method = parse_spec(given["method"])[0]
    if method.strip().lower().replace("_", "-") == HPT_GPD:
        from vlmdefend.cli.distill import run_distillation
        from vlmdefend.training.settings.distill_settings import make_distill_settings

        settings = make_distill_settings(distill_options(given, proxy, proxy_weights))
        run_distillation(settings, dry_run=dry_run)
        return
    for flag, value in (("--proxy", proxy), ("--proxy-weights", proxy_weights)):
        if value is not None:
            raise UserError(f"{flag} {value}: method {method} learns from no second model; leave it out.")
    _run(make_train_settings(given), dry_run=dry_run)


def _run(settings: TrainSettings, *, dry_run: bool) -> None:
    """Prints the choices, then the cost (``dry_run``) or trains and prints the result."""
    from vlmdefend.cli.output.progress import show_progress
    from vlmdefend.cli.output.progress_text import TrainingText
    from vlmdefend.cli.output.train_report import print_choices, print_cost, print_result
    from vlmdefend.training.clip.training_job import DefenseTrainingJob

    job = DefenseTrainingJob(settings)
    print_choices(job)
    if dry_run:
        print_cost(job)
        return
    main = job.processes.is_main
    with resumable(job.folder.training, "saved"), show_progress(TrainingText(), main=main) as progress:
        found = job.run(progress)
    if main:
        print_result(job, found)
