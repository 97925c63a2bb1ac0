"""``vlmdefend train``: the training-time defenses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete, training_options
from vlmdefend.cli.training_options import METHOD, OPTION, RUN, TRAIN, WHAT

if TYPE_CHECKING:
    from vlmdefend.training.clip.train_settings import TrainSettings


def train(
    ctx: typer.Context,
    method: Annotated[
        str,
        OPTION(
            "--method",
            "-m",
            help="tecoa, fare, pmg-aft, tga-zsr, sim-clip, agft, adv-lora; apt, fap, advpt learn prompts; baselines "
            "at, trades; with options: at:images=clean. What each is: `vlmdefend list methods`.",
            autocompletion=complete.objectives,
            rich_help_panel=METHOD,
        ),
    ],
    model: Annotated[
        str,
        OPTION(
            help="Model to make robust: ViT-B/32, tiny-vit ...", autocompletion=complete.models, rich_help_panel=WHAT
        ),
    ],
    dataset: Annotated[
        str | None,
        OPTION(
            help="What to train on.  \\[default: the method's; of the embedded models: fashion]",
            autocompletion=complete.datasets,
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: training_options.Split = None,
    limit: training_options.Limit = None,
    held_out: training_options.HeldOut = None,
    classes: training_options.Classes = None,
    templates: training_options.Templates = None,
    weights: Annotated[Path | None, OPTION(help="Local weights file for the model.", rich_help_panel=WHAT)] = None,
    root: training_options.Root = None,
    skip_bad: training_options.SkipBad = False,
    profile: Annotated[
        str | None,
        OPTION(
            help="paper: as published. scaled: the same, with warm-up at most a tenth of the run and gradients no "
            "longer than 1; the embedded models have rates of their own.  \\[default: scaled]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    eps: Annotated[
        str | None,
        OPTION(
            help="Radius of the training attack.  \\[default: the method's; embedded: 8/255]", rich_help_panel=METHOD
        ),
    ] = None,
    steps: Annotated[int | None, OPTION(help="Its steps.  \\[default: the method's]", rich_help_panel=METHOD)] = None,
    alpha: Annotated[
        str | None,
        OPTION(
            help="Its step size: eps, eps/4, 1/255.  \\[default: the method's share of eps]", rich_help_panel=METHOD
        ),
    ] = None,
    trains: Annotated[
        str | None,
        OPTION(
            help="image: the image tower. all: text and scale too. last:K: its last K tensors. lora:R: rank R in its "
            "attention; lora-all:R: in the text tower's too; lora:R:P: with dropout P. prompt:N: a border of N pixels "
            "(ViT). These are folded into plain weights at the end. context:M, class-context:M, deep:M: learned "
            "prompts of apt, advpt, fap.  \\[default: the method's, see `vlmdefend list methods`]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    augment: Annotated[
        str | None,
        OPTION(
            help="crop-flip: every image as another random crop, flipped or not, in each epoch. none.  \\[default: "
            "none; --profile paper: as published]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    mix: Annotated[
        list[float] | None,
        OPTION(
            help="Also write OUT/mix-A: (1-A) x vanilla + A x trained weights (WiSE-FT); repeat for several. May be "
            "given to a finished run.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    logit_scale: Annotated[
        str | None, OPTION(help="model, or a number to train with.  \\[default: the method's]", rich_help_panel=METHOD)
    ] = None,
    normalization: Annotated[
        str | None,
        OPTION(help="model, clip or imagenet: mean and deviation.  \\[default: model]", rich_help_panel=METHOD),
    ] = None,
    pixel_space: Annotated[
        str | None,
        OPTION(
            help="model: perturb at the model's size. native: at the images' own, resized inside.  \\[default: model]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    batch_norm: Annotated[
        str | None,
        OPTION(
            help="frozen: statistics stay. train: batch statistics in the update, never in the attack; one process.  "
            "\\[default: frozen]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    select: Annotated[
        str | None,
        OPTION(help="last epoch, or the best on the held-out images.  \\[default: last]", rich_help_panel=METHOD),
    ] = None,
    epochs: Annotated[int | None, OPTION(help="\\[default: the method's; embedded: 2]", rich_help_panel=TRAIN)] = None,
    lr: Annotated[
        float | None,
        OPTION(help="Base rate.  \\[default: the method's; of a visual prompt: 40]", rich_help_panel=TRAIN),
    ] = None,
    warm_up: Annotated[
        int | None, OPTION(help="Steps of linear warm-up, then a cosine to 0.", rich_help_panel=TRAIN)
    ] = None,
    clip: Annotated[
        float | None, OPTION(help="Longest gradient norm.  \\[default: 1; paper: none]", rich_help_panel=TRAIN)
    ] = None,
    optimizer: Annotated[
        str | None, OPTION(help="sgd or adamw.  \\[default: the method's]", rich_help_panel=TRAIN)
    ] = None,
    momentum: training_options.Momentum = None,
    weight_decay: Annotated[float | None, OPTION(help="\\[default: the method's]", rich_help_panel=TRAIN)] = None,
    batch_size: Annotated[
        int | None,
        OPTION(
            help="Images of a step, over all processes.  \\[default: the method's; embedded: 64]", rich_help_panel=TRAIN
        ),
    ] = None,
    micro_batch: training_options.MicroBatch = None,
    precision: training_options.Precision = None,
    seed: training_options.Seed = None,
    out: Annotated[
        Path | None,
        OPTION(
            help="Model folder to write; the same command resumes.  \\[default: trained/MODEL-METHOD]",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_every: training_options.SaveEvery = None,
    track: training_options.Track = None,
    device: training_options.Device = None,
    threads: training_options.Threads = None,
    plugin: Annotated[
        list[str] | None, OPTION(help="Python file that registers data sources or methods.", rich_help_panel=RUN)
    ] = None,
    dry_run: training_options.DryRun = False,
    debug: training_options.Debug = False,
) -> None:
    """Make a CLIP robust by training: TeCoA, FARE, PMG-AFT, TGA-ZSR and others, one loop for all.

    [bold]vlmdefend train --method tecoa --model tiny-vit[/bold] runs anywhere, in minutes. The result is a model
    folder: `evaluate --model local-dir:OUT`, with any defense around it. Several GPUs: the same command under
    `torchrun --nproc-per-node N -m vlmdefend` or `accelerate launch -m vlmdefend`.
    """
    from vlmdefend.registry import load_plugin
    from vlmdefend.training.clip.train_settings import TrainSettings, make_train_settings

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    given = {n: ctx.params[n] for n in TrainSettings.model_fields if ctx.params.get(n) not in (None, [], ())}
    _run(make_train_settings(given), dry_run=dry_run)


def _run(settings: TrainSettings, *, dry_run: bool) -> None:
    from vlmdefend.cli.progress import show_progress
    from vlmdefend.cli.progress_text import TrainingText
    from vlmdefend.cli.train_report import print_choices, print_cost, print_result
    from vlmdefend.training.clip.train import Training

    training = Training(settings)
    print_choices(training)
    if dry_run:
        print_cost(training)
        return
    main = training.processes.is_main
    try:
        with show_progress(TrainingText(), main=main) as progress:
            found = training.run(progress)
    except KeyboardInterrupt:
        where = training.folder.training
        typer.echo(f"interrupted; what was saved is in {where}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    if main:
        print_result(training, found)
