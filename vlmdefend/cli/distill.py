"""``vlmdefend distill``: HPT-GPD, robustness from a vanilla proxy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmdefend.cli import complete, training_options
from vlmdefend.cli.training_options import METHOD, OPTION, RUN, TRAIN, WHAT

if TYPE_CHECKING:
    from vlmdefend.training.clip.distill_settings import DistillSettings


def distill(
    ctx: typer.Context,
    proxy: Annotated[
        str,
        OPTION(
            help="Vanilla model to learn from: ViT-B/32, tiny-vit ...",
            autocompletion=complete.models,
            rich_help_panel=WHAT,
        ),
    ],
    target: Annotated[
        str,
        OPTION(help="Model to make robust: RN50, tiny-rn ...", autocompletion=complete.models, rich_help_panel=WHAT),
    ],
    dataset: Annotated[
        str | None,
        OPTION(
            help="What to train on: tiny-imagenet, cifar10, imagenet, folder:PATH, wds:PATH ...  "
            "\\[default: tiny-imagenet; of the embedded models: fashion]",
            autocompletion=complete.datasets,
            rich_help_panel=WHAT,
        ),
    ] = None,
    split: training_options.Split = None,
    limit: training_options.Limit = None,
    held_out: training_options.HeldOut = None,
    classes: training_options.Classes = None,
    templates: training_options.Templates = None,
    weights: Annotated[Path | None, OPTION(help="Local weights file for the target.", rich_help_panel=WHAT)] = None,
    proxy_weights: Annotated[
        Path | None, OPTION(help="Local weights file for the proxy.", rich_help_panel=WHAT)
    ] = None,
    root: training_options.Root = None,
    skip_bad: training_options.SkipBad = False,
    profile: Annotated[
        str | None,
        OPTION(
            help="scaled: ours, any batch size and length. paper: as printed, with cosines and a sum where that cannot "
            "train. code: the authors' last commit. Options below win over it.  \\[default: scaled]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    stage: Annotated[
        str | None,
        OPTION(
            help="a: anchor alone, gives the pivot. b: transfer alone, from --pivot.  \\[default: both]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    pivot: Annotated[
        Path | None, OPTION(help="OUT/pivot of another run, or a weights file.", rich_help_panel=METHOD)
    ] = None,
    direction: Annotated[
        str | None,
        OPTION(
            help="proxy-first: KL(P||T), distillation, the code's. target-first: KL(T||P), the paper's equations.  "
            "\\[default: proxy-first; paper: target-first]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    reduction: Annotated[
        str | None,
        OPTION(
            help="mean over the batch: the rate does not depend on its size. sum: as the code; a rate of r is a mean's "
            "rate of r x batch.  \\[default: mean; paper, code: sum]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    logit_scale: Annotated[
        str | None,
        OPTION(
            help="model: exp(logit_scale), as deployed. 1: plain cosines, the code's first version. It sets the size "
            "of gradients and rates, x 40,000 between the two.  \\[default: model; paper: 1]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    eps: Annotated[
        str | None,
        OPTION(
            help="Radius of the training attack.  \\[default: 1/255; code: 2/255; embedded: 8/255]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    steps: Annotated[int | None, OPTION(help="Its steps.  \\[default: 2; code: 5]", rich_help_panel=METHOD)] = None,
    alpha: Annotated[
        str | None,
        OPTION(
            help="Its step size: eps, eps/2, 1/255. The paper gives none; its ancestor's command has eps.  "
            "\\[default: eps; code: 1/255]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    ema: Annotated[
        float | None,
        OPTION(
            help="Decay of stage a's average over epochs, which is the pivot.  \\[default: 0.9]", rich_help_panel=METHOD
        ),
    ] = None,
    pull: Annotated[
        float | None,
        OPTION(
            help="Share of the weights that stays when an epoch of stage b begins; the rest is the pivot. 1: HPT alone."
            "  \\[default: 0.5]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    pull_first: Annotated[
        bool | None,
        OPTION(
            "--pull-first/--no-pull-first",
            help="Pull before the first epoch too (code); the paper begins from vanilla.  \\[default: no; code: yes]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    trains: Annotated[
        str | None,
        OPTION(
            help="image: the image tower (the code at last; text features are computed once). all: text and scale too "
            "(the paper's notation, the first code). last:K: its last K tensors.  \\[default: image]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    batch_norm: Annotated[
        str | None,
        OPTION(
            help="frozen: statistics stay, so an image's logits do not depend on its batch and averages of weights are "
            "sound. train: batch statistics in the update (never in the attack), one process.  "
            "\\[default: frozen; code: train]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    normalization: Annotated[
        str | None,
        OPTION(
            help="model, clip or imagenet: mean and deviation. Paper and code use ImageNet's, which CLIP was not "
            "trained with; the result is saved with its own.  \\[default: model; paper, code: imagenet]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    pixel_space: Annotated[
        str | None,
        OPTION(
            help="model: perturb at the model's size. native: at the images' own, resized inside (the paper's CIFAR).  "
            "\\[default: model]",
            rich_help_panel=METHOD,
        ),
    ] = None,
    select: Annotated[
        str | None,
        OPTION(
            help="last epoch of stage b, or the best on the held-out images.  \\[default: last]", rich_help_panel=METHOD
        ),
    ] = None,
    epochs_a: Annotated[
        int | None,
        OPTION(help="The paper says 10 in all, not how many each.  \\[default: 5; embedded: 2]", rich_help_panel=TRAIN),
    ] = None,
    epochs_b: Annotated[int | None, OPTION(help="\\[default: 5; embedded: 4]", rich_help_panel=TRAIN)] = None,
    lr_a: Annotated[
        float | None,
        OPTION(help="Base rate of stage a.  \\[default: 5e-5; code: 5e-4; embedded: 3e-3]", rich_help_panel=TRAIN),
    ] = None,
    lr_b: Annotated[
        float | None,
        OPTION(
            help="Base rate of stage b.  \\[default: 5e-4; paper: 5e-2; code: 0.5; embedded: 1e-2]",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    warm_up: Annotated[
        int | None,
        OPTION(
            help="Steps of linear warm-up, then a cosine to 0.  \\[default: 1000, at most a tenth of a stage]",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    clip: Annotated[
        float | None, OPTION(help="Longest gradient norm.  \\[default: 1; paper, code: none]", rich_help_panel=TRAIN)
    ] = None,
    optimizer: Annotated[str | None, OPTION(help="sgd or adamw.  \\[default: sgd]", rich_help_panel=TRAIN)] = None,
    momentum: training_options.Momentum = None,
    weight_decay: Annotated[float | None, OPTION(help="\\[default: 0]", rich_help_panel=TRAIN)] = None,
    batch_size: Annotated[
        int | None, OPTION(help="Images of a step, over all processes.  \\[default: 64]", rich_help_panel=TRAIN)
    ] = None,
    micro_batch: training_options.MicroBatch = None,
    precision: training_options.Precision = None,
    seed: training_options.Seed = None,
    out: Annotated[
        Path | None,
        OPTION(
            help="Model folder to write; the same command resumes.  \\[default: distilled/TARGET-from-PROXY]",
            rich_help_panel=RUN,
        ),
    ] = None,
    gap_images: Annotated[
        int | None,
        OPTION(
            help="Held-out images for the proxy gap, before training and after each epoch.  \\[default: 200]",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_every: training_options.SaveEvery = None,
    track: training_options.Track = None,
    device: training_options.Device = None,
    threads: training_options.Threads = None,
    force: Annotated[
        bool, OPTION("--force", help="Also where proxy and target are the same.", rich_help_panel=RUN)
    ] = False,
    plugin: Annotated[
        list[str] | None, OPTION(help="Python file that registers data sources.", rich_help_panel=RUN)
    ] = None,
    dry_run: training_options.DryRun = False,
    debug: training_options.Debug = False,
) -> None:
    """Make a CLIP robust by learning from a vanilla CLIP of another architecture (HPT-GPD, Fu et al. 2026).

    Adversarial images of the target hardly fool the proxy. Stage a: at a low rate, the target's answers there are
    drawn to the proxy's answers on the clean images; the average over epochs is the pivot. Stage b: from vanilla
    weights, at a high rate, they are drawn to the proxy's answers on the same images, and each epoch begins half-way
    back at the pivot.

    [bold]vlmdefend distill --proxy tiny-vit --target tiny-rn[/bold] runs anywhere, in minutes. Several GPUs: the same
    command under `torchrun --nproc-per-node N -m vlmdefend` or `accelerate launch -m vlmdefend`.
    """
    from vlmdefend.registry import load_plugin
    from vlmdefend.training.clip.distill_settings import DistillSettings, make_distill_settings

    for file in plugin or []:
        load_plugin(file, lambda message: typer.echo(f"warning: {message}", err=True))
    given = {n: ctx.params[n] for n in DistillSettings.model_fields if ctx.params.get(n) not in (None, [], ())}
    _run(make_distill_settings(given), dry_run=dry_run)


def _run(settings: DistillSettings, *, dry_run: bool) -> None:
    from vlmdefend.cli.distill_report import print_choices, print_cost, print_result
    from vlmdefend.cli.progress import show_progress
    from vlmdefend.cli.progress_text import DistillText
    from vlmdefend.training.clip.distill import Distillation

    distillation = Distillation(settings)
    print_choices(distillation)
    if dry_run:
        print_cost(distillation)
        return
    main = distillation.processes.is_main
    try:
        with show_progress(DistillText(settings=settings), main=main) as progress:
            found = distillation.run(progress)
    except KeyboardInterrupt:
        where = distillation.folder.training
        typer.echo(f"interrupted; what was saved is in {where}, the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    if main:
        print_result(distillation, found)
