"""Prints the choices, cost and result of ``vlmdefend train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vlmdefend.cli.output.distill_report import held_out_text, print_held_out

if TYPE_CHECKING:
    from vlmdefend.training.clip.training_job import DefenseTrainingJob, Trained


def print_choices(training: DefenseTrainingJob) -> None:
    """Prints every choice that decides the result, defaults too."""
    if not training.processes.is_main:
        return
    settings, cost = training.settings, training.cost()
    clip = "no clipping" if settings.clip is None else f"gradient norm at most {settings.clip:g}"
    many = f", {training.processes.count} processes" if training.processes.count > 1 else ""
    held = held_out_text(len(training.held_out), settings.held_out)
    parameters = sum(p.numel() for p in training.student.parameters.values())
    seen = "" if settings.augment == "none" else f", augmented by {settings.augment}"
    lines = [
        ("method", f"{settings.objective!r}"),
        ("model", f"{settings.model}; trains: {trained_part(settings.trains)}, {parameters:,} parameters"),
        ("images", f"{settings.dataset} ({settings.split}): {len(training.images)} to train on{seen}, {held}"),
        ("prompt", " | ".join(settings.templates)),
        (
            "profile",
            f"{settings.profile}: logit scale {settings.logit_scale}, normalization {settings.normalization}, "
            f"BatchNorm {settings.batch_norm}",
        ),
        ("attack", settings.objective.attack),
        (
            "train",
            f"{cost.epochs} epochs of {cost.steps // cost.epochs} steps, rate {settings.lr:g}, warm-up {cost.warm_up} "
            "steps, then a cosine to 0",
        ),
        (
            "update",
            f"{settings.optimizer}, batch {settings.batch_size}{many}, weight decay {settings.weight_decay:g}, {clip}, "
            f"{training.processes.precision}, seed {settings.seed}",
        ),
        ("out", str(settings.out)),
    ]
    for name, text in lines:
        typer.echo(f"{name:<9}{text}", err=True)
    if cost.warm_up >= cost.steps:
        typer.echo(
            f"warning: the run has {cost.steps} steps, all of them warm-up: it never reaches its rate; give --warm-up, "
            "or more epochs.",
            err=True,
        )


def print_cost(training: DefenseTrainingJob) -> None:
    """Prints what the choices cost (``--dry-run``)."""
    cost, memory, held = training.cost(), training.memory(), len(training.held_out)
    typer.echo(
        f"{cost.steps:,} steps; of one image each, {cost.forward_backwards:,} forward+backwards and "
        f"{cost.proxy_forwards:,} forwards of the vanilla model. Measuring {held} held-out images after each epoch "
        f"adds at most {11 * held * cost.epochs:,} more.\n"
        f"Memory about {memory.total / 1e6:,.0f} MB: weights {memory.weights / 1e6:,.0f}, gradients, momentum and "
        f"copies {memory.training / 1e6:,.0f}, activations of a micro-batch {memory.activations / 1e6:,.0f}.\n"
        "Nothing was trained (--dry-run)."
    )


def print_result(training: DefenseTrainingJob, found: Trained) -> None:
    """Prints vanilla, result and mixtures on the held-out images, and the next command."""
    settings = training.settings
    reader = "evaluate reads, plain open_clip does not" if settings.objective.learns else "open_clip reads"
    print_held_out(settings.model, settings, found, reader)


def trained_part(trains: str) -> str:
    """Returns the value of ``--trains`` in words."""
    kind, _, count = trains.partition(":")
    lora = " and dropout ".join(count.split(":"))
    return {
        "image": "the image tower",
        "all": "the whole model",
        "last": f"the last {count} tensors of the image tower",
        "lora": f"LoRA of rank {lora} in the image tower's attention, folded into the result",
        "lora-all": f"LoRA of rank {lora} in both towers' attention, folded into the result",
        "context": f"a learned context of {count} vectors in every prompt",
        "class-context": f"a learned context of {count} vectors for each class",
        "deep": f"{count} learned tokens in the blocks of both towers",
        "prompt": f"a visual prompt, {count} pixels around the image, folded into the result",
    }.get(kind, trains)
