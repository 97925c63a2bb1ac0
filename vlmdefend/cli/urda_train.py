"""``vlmdefend urda-train``: an adapted teacher, then a robust student by DART or a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete

if TYPE_CHECKING:
    from vlmdefend.training.adaptation.settings import UrdaSettings

WHAT, METHOD, TRAIN, RUN = "Domains and models", "The methods", "How to train", "How to run"
OPTION = typer.Option


def urda_train(
    ctx: typer.Context,
    source: Annotated[
        str,
        OPTION(
            help="Labelled domain: mnist, emoji:google, folder:ROOT/DOMAIN, domain:ROOT/DOMAIN ...",
            autocompletion=complete.datasets,
            rich_help_panel=WHAT,
        ),
    ],
    target: Annotated[
        str,
        OPTION(
            help="Domain without labels; its test split is measured on, never trained on or chosen by.",
            autocompletion=complete.datasets,
            rich_help_panel=WHAT,
        ),
    ],
    method: Annotated[
        str | None,
        OPTION(
            help="Step 1: source-only, dann, cdan, mcc, mdd, dan, jan, mcd, bsp, self-training, shot, zero-shot; "
            "options as mdd:margin=2.  \\[default: mdd, the release's]",
            autocompletion=complete.adaptations,
            rich_help_panel=METHOD,
        ),
    ] = None,
    robustify: Annotated[
        str | None,
        OPTION(
            help="Step 2: dart-urda, at-pl, trades-pl, srouda, dart-dad, rfa, artuda, vat, or none.  "
            "\\[default: dart-urda]",
            autocompletion=complete.adaptations,
            rich_help_panel=METHOD,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        OPTION(
            help="In place of step 1: local-dir:PATH, a CLIP's name (text classes), timm:NAME, timm:NAME@FILE, "
            "timm:local-dir:FOLDER, python:MODULE:FUNCTION.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        OPTION(
            help="tiny-cnn, timm:resnet50, timm:resnet50@FILE, timm:local-dir:FOLDER, or a CLIP whose image tower is "
            "taken. The embedded tiny-vit and tiny-rn saw the embedded sets with their labels: nothing is adapted "
            "there.  \\[default: tiny-cnn on embedded sets, else timm:resnet50]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        OPTION("--pretrained/--random", help="Backbone with its published weights.", rich_help_panel=WHAT),
    ] = None,
    bottleneck: Annotated[
        int | None,
        OPTION(
            help="Width of the features; 0: the backbone's own.  \\[default: 1024; embedded: 128]", rich_help_panel=WHAT
        ),
    ] = None,
    head: Annotated[
        str | None, OPTION(help="linear or two-layer.  \\[default: linear; of mdd: two-layer]", rich_help_panel=WHAT)
    ] = None,
    root: Annotated[Path | None, OPTION(help="Folder of downloaded data sets.", rich_help_panel=WHAT)] = None,
    skip_bad: Annotated[
        bool | None, OPTION("--skip-bad", help="Leave out images that cannot be read.", rich_help_panel=WHAT)
    ] = None,
    limit: Annotated[
        int | None, OPTION(help="Subset of so many training images a domain.", rich_help_panel=WHAT)
    ] = None,
    eval_split: Annotated[
        str | None, OPTION(help="Split that is measured on.  \\[default: test]", rich_help_panel=WHAT)
    ] = None,
    eval_limit: Annotated[
        int | None, OPTION(help="Subset of it.  \\[default: 2000; embedded: all]", rich_help_panel=WHAT)
    ] = None,
    profile: Annotated[
        str | None,
        OPTION(
            help="scaled: ours. released: step 2 as the authors' code (ImageNet start, 20 x 500 steps of 18 images).  "
            "\\[default: scaled]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    init: Annotated[
        str | None,
        OPTION(
            help="The student begins as the teacher, or from the backbone's own weights (imagenet, the code's way).  "
            "\\[default: teacher; released: imagenet]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    reduction: Annotated[
        str | None,
        OPTION(
            help="Of DART's distillations: mean or sum of weight x divergence, or released: mean divergence x summed "
            "weight, which grows with the batch.  \\[default: mean; released: released]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    trade_off: Annotated[
        float | None,
        OPTION(help="Weight of DART's distillations.  \\[default: 1.8; released: 0.1]", rich_help_panel=METHOD),
    ] = None,
    space: Annotated[
        str | None,
        OPTION(
            help="DART's attack moves pixels; released: normalised images clipped to [0, 1], for reproduction only.  "
            "\\[default: pixel]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    ablate: Annotated[
        list[str] | None,
        OPTION(
            help="Leave out a part of DART: defense, prediction, features, entropy-weight (repeat).",
            rich_help_panel=METHOD,
        ),
    ] = None,
    augment: Annotated[
        str | None,
        OPTION(
            help="DART's target images: off, shift, crop, crop-flip.  \\[default: crop-flip; embedded: off]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    eps: Annotated[
        str | None,
        OPTION(help="Radius of the attacks, in training and judging.  \\[default: 0.1]", rich_help_panel=METHOD),
    ] = None,
    alpha: Annotated[
        str | None, OPTION(help="Step size in training.  \\[default: eps/2]", rich_help_panel=METHOD)
    ] = None,
    steps: Annotated[int | None, OPTION(help="Steps in training.  \\[default: 10]", rich_help_panel=METHOD)] = None,
    select: Annotated[
        str | None,
        OPTION(
            help="Epoch that is kept: last; or the best on held-out target images by agreement with the teacher, or by "
            "entropy. None of them reads a target label.  \\[default: last]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    oracle: Annotated[
        bool,
        OPTION("--oracle", help="Choose the epoch by target labels; the report says so.", rich_help_panel=METHOD),
    ] = False,
    held_out: Annotated[
        int | None,
        OPTION(help="Target training images to choose by.  \\[default: 0; to choose: 200]", rich_help_panel=METHOD),
    ] = None,
    epochs_teacher: Annotated[int | None, OPTION(help="\\[default: 20; embedded: 10]", rich_help_panel=TRAIN)] = None,
    epochs_student: Annotated[int | None, OPTION(help="\\[default: 20]", rich_help_panel=TRAIN)] = None,
    iterations_teacher: Annotated[
        int | None,
        OPTION(help="Steps of an epoch.  \\[default: the larger set once; embedded: 100]", rich_help_panel=TRAIN),
    ] = None,
    iterations_student: Annotated[
        int | None, OPTION(help="\\[default: the images once; released: 500; embedded: 40]", rich_help_panel=TRAIN)
    ] = None,
    lr_teacher: Annotated[
        float | None, OPTION(help="Base rate of step 1.  \\[default: 0.004; embedded: 0.02]", rich_help_panel=TRAIN)
    ] = None,
    lr_student: Annotated[
        float | None, OPTION(help="Base rate of step 2.  \\[default: 0.005; embedded: 0.05]", rich_help_panel=TRAIN)
    ] = None,
    backbone_factor: Annotated[
        float | None,
        OPTION(
            help="Of the rate, for the backbone.  \\[default: 0.1 of published weights, else 1]", rich_help_panel=TRAIN
        ),
    ] = None,
    momentum: Annotated[
        float | None, OPTION(help="Of SGD, Nesterov's.  \\[default: 0.9]", rich_help_panel=TRAIN)
    ] = None,
    weight_decay: Annotated[
        float | None, OPTION(help="\\[default: 5e-4; released: 1e-3]", rich_help_panel=TRAIN)
    ] = None,
    clip: Annotated[
        float | None, OPTION(help="Longest norm of a step's gradient.  \\[default: as it is]", rich_help_panel=TRAIN)
    ] = None,
    batch_size: Annotated[
        int | None, OPTION(help="Images of each domain in a step of step 1.  \\[default: 36]", rich_help_panel=TRAIN)
    ] = None,
    batch_size_student: Annotated[
        int | None, OPTION(help="Of step 2.  \\[default: 36; released: 18]", rich_help_panel=TRAIN)
    ] = None,
    batch_norm: Annotated[
        str | None,
        OPTION(
            help="train: batch statistics in the update (never in an attack), one process. frozen.  \\[default: train]",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    precision: Annotated[
        str | None, OPTION(help="float32, bfloat16, float16 of the update.", rich_help_panel=TRAIN)
    ] = None,
    seed: Annotated[int | None, OPTION(help="Of every random draw.  \\[default: 0]", rich_help_panel=TRAIN)] = None,
    out: Annotated[
        Path | None,
        OPTION(help="Result folder; the same command resumes in it.  \\[default: adapted/...]", rich_help_panel=RUN),
    ] = None,
    save_every: Annotated[
        int | None, OPTION(help="Steps between states.  \\[default: five minutes]", rich_help_panel=RUN)
    ] = None,
    track: Annotated[str | None, OPTION(help="tensorboard, trackio or wandb.", rich_help_panel=RUN)] = None,
    device: Annotated[str | None, OPTION(help="cpu, cuda ...", rich_help_panel=RUN)] = None,
    threads: Annotated[int | None, OPTION(help="CPU threads.", rich_help_panel=RUN)] = None,
    plugin: Annotated[list[str] | None, OPTION(help="Python file that registers methods.", rich_help_panel=RUN)] = None,
    dry_run: Annotated[
        bool, OPTION("--dry-run", help="Print choices and cost; train nothing.", rich_help_panel=RUN)
    ] = False,
    debug: Annotated[bool, OPTION("--debug", help="Show tracebacks.", rich_help_panel=RUN)] = False,
) -> None:
    """Adapt a classifier to an unlabelled domain, then make it robust there (DART, Huang et al. 2026).

    Step 1 trains a teacher on labelled source and unlabelled target images, or takes any other model. Step 2 teaches a
    student on target images alone: the teacher's prediction at clean and at adversarial images, and its features.

    [bold]vlmdefend urda-train --source mnist --target uci-digits[/bold] runs anywhere, in minutes.
    """
    from vlmdefend.errors import UserError
    from vlmdefend.registry import load_plugin
    from vlmdefend.training.adaptation.settings import UrdaSettings, make_urda_settings

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    given = {n: ctx.params[n] for n in UrdaSettings.model_fields if ctx.params.get(n) not in (None, [], ())}
    if oracle:
        if select not in (None, "oracle"):
            raise UserError(f"--oracle and --select {select} contradict each other; give one of them.")
        given["select"] = "oracle"
    elif select == "oracle":
        raise UserError("--select oracle reads target labels; if that is meant, write --oracle.")
    _run(make_urda_settings(given), dry_run=dry_run)


def _run(settings: UrdaSettings, *, dry_run: bool) -> None:
    from vlmdefend.cli.progress import show_progress
    from vlmdefend.cli.progress_text import TrainingText
    from vlmdefend.cli.urda_report import print_choices, print_cost, print_result
    from vlmdefend.training.adaptation.urda import RobustAdaptation

    adaptation = RobustAdaptation(settings)
    main = adaptation.processes.is_main
    if main:
        print_choices(adaptation)
    if dry_run:
        print_cost(adaptation)
        return
    try:
        with show_progress(TrainingText(), main=main) as progress:
            found = adaptation.run(progress)
    except KeyboardInterrupt:
        where = adaptation.folder.training
        typer.echo(f"interrupted; what was saved is in {where}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    if main:
        print_result(adaptation, found)
