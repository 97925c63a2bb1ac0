"""``vlmdefend urda-train``: an adapted teacher, then a robust student by DART or a baseline."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vlmdefend.cli.options.common import RUN, Debug, TrainDryRun, load_plugins, resumable
from vlmdefend.cli.options.parameters import options_of
from vlmdefend.training.settings.adaptation_settings import UrdaSettings, make_urda_settings
from vlmdefend.training.settings.run_settings import METHOD


@options_of(UrdaSettings)
def urda_train(
    given: dict[str, Any],
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Choose the epoch by target labels; the report says so.",
            rich_help_panel=UrdaSettings.panels[METHOD],
        ),
    ] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers methods.", rich_help_panel=RUN)
    ] = None,
    dry_run: TrainDryRun = False,
    debug: Debug = False,
) -> None:
    """Adapt a classifier to an unlabelled domain, then make it robust there (DART, Huang et al. 2026).

    Step 1 trains a teacher on labelled source and unlabelled target images, or takes any other model. Step 2 teaches a
    student on target images alone: the teacher's prediction at clean and at adversarial images, and its features.

    [bold]vlmdefend urda-train --source mnist --target uci-digits[/bold] runs anywhere, in minutes.
    """
    from vlmdefend.errors import UserError

    load_plugins(plugin)
    select = given.get("select")
    if oracle:
        if select not in (None, "oracle"):
            raise UserError(f"--oracle and --select {select} contradict each other; give one of them.")
        given["select"] = "oracle"
    elif select == "oracle":
        raise UserError("--select oracle reads target labels; if that is meant, write --oracle.")
    _run(make_urda_settings(given), dry_run=dry_run)


def _run(settings: UrdaSettings, *, dry_run: bool) -> None:
    """Prints the choices, then the cost (``dry_run``) or trains and prints the result."""
    from vlmdefend.cli.output.progress import show_progress
    from vlmdefend.cli.output.progress_text import TrainingText
    from vlmdefend.cli.output.urda_report import print_choices, print_cost, print_result
    from vlmdefend.training.adaptation.job import AdaptationJob

    job = AdaptationJob(settings)
    main = job.processes.is_main
    if main:
        print_choices(job)
    if dry_run:
        print_cost(job)
        return
    with resumable(job.folder.training, "saved"), show_progress(TrainingText(), main=main) as progress:
        found = job.run(progress)
    if main:
        print_result(job, found)
