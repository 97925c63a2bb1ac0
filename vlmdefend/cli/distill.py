"""``vlmdefend distill``: HPT-GPD, robustness from a vanilla proxy."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmdefend.cli.options.common import RUN, Debug, TrainDryRun, load_plugins, resumable
from vlmdefend.cli.options.parameters import options_of
from vlmdefend.training.settings.distill_settings import DistillSettings, make_distill_settings


@options_of(DistillSettings)
def distill(
    given: dict[str, Any],
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers data sources.", rich_help_panel=RUN)
    ] = None,
    dry_run: TrainDryRun = False,
    debug: Debug = False,
) -> None:
    """Make a CLIP robust by learning from a vanilla CLIP of another architecture (HPT-GPD, Fu et al. 2026).

    Adversarial images of the target hardly fool the proxy. Stage a: at a low rate, the target's answers there are
    drawn to the proxy's answers on the clean images; the average over epochs is the pivot. Stage b: from vanilla
    weights, at a high rate, they are drawn to the proxy's answers on the same images, and each epoch begins half-way
    back at the pivot.

    [bold]vlmdefend distill --proxy tiny-vit --target tiny-rn[/bold] runs anywhere, in minutes. Several GPUs: the same
    command under `torchrun --nproc-per-node N -m vlmdefend` or `accelerate launch -m vlmdefend`.
    """
    load_plugins(plugin)
    run_distillation(make_distill_settings(given), dry_run=dry_run)


def run_distillation(settings: DistillSettings, *, dry_run: bool) -> None:
    """Prints the choices, then the cost (``dry_run``) or trains and prints the result."""
    from vlmdefend.cli.output.distill_report import print_choices, print_cost, print_result
    from vlmdefend.cli.output.progress import show_progress
    from vlmdefend.cli.output.progress_text import DistillText
    from vlmdefend.training.clip.distillation_job import DistillationJob

    job = DistillationJob(settings)
    print_choices(job)
    if dry_run:
        print_cost(job)
        return
    main = job.processes.is_main
    with resumable(job.folder.training, "saved"), show_progress(DistillText(settings=settings), main=main) as progress:
        found = job.run(progress)
    if main:
        print_result(job, found)
