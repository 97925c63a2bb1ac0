"""Prints the choices, proxy gap, cost and result of ``vlmdefend distill``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from vlmdefend.types import format_eps

if TYPE_CHECKING:
    from vlmdefend.training.clip.distillation_job import DistillationJob, Distilled
    from vlmdefend.training.clip.training_job import Trained
    from vlmdefend.training.loop.results import HitCount, ProxyGap
    from vlmdefend.training.settings.clip_settings import ClipSettings
    from vlmdefend.training.settings.distill_settings import DistillSettings


def held_out_text(count: int, wanted: int) -> str:
    """Returns how many images are held out, and why fewer than given."""
    return f"{count} held out" + (f" (a fifth of the set, which is fewer than {wanted})" if count < wanted else "")


def print_choices(distillation: DistillationJob) -> None:
    """Prints every choice that decides the result, defaults too."""
    settings, scheduled = distillation.settings, distillation.costs()
    held = held_out_text(len(distillation.held_out), settings.held_out)
    lines = [
        ("models", f"{settings.target} learns from {settings.proxy}; the {trained_text(settings)} trains"),
        ("images", f"{settings.dataset} ({settings.split}): {len(distillation.images)} to train on, {held}"),
        ("prompt", " | ".join(settings.templates)),
        (
            "profile",
            f"{settings.profile}: KL {settings.direction}, {settings.reduction} over the batch, logit scale "
            f"{settings.logit_scale}, normalization {settings.normalization}, BatchNorm {settings.batch_norm}",
        ),
        (
            "attack",
            f"PGD-{settings.steps} on the target, L_inf {settings.eps}, alpha {format_eps(settings.step_size)}, last "
            "iterate, float32",
        ),
    ]
    for cost in scheduled:
        rate = settings.lr_a if cost.stage == "a" else settings.lr_b
        how = f"GA, average {settings.ema}" if cost.stage == "a" else f"HPT, {pull_text(settings)}"
        lines.append(
            (
                f"stage {cost.stage}",
                f"{how}; {cost.epochs} epochs of {cost.steps // cost.epochs} steps, rate {rate:g}, warm-up "
                f"{cost.warm_up} steps, then a cosine to 0",
            )
        )
    clip = "no clipping" if settings.clip is None else f"gradient norm at most {settings.clip:g}"
    many = f", {distillation.processes.count} processes" if distillation.processes.count > 1 else ""
    lines.append(
        (
            "update",
            f"{settings.optimizer}, batch {settings.batch_size}{many}, {clip}, {distillation.processes.precision}, "
            f"seed {settings.seed}",
        )
    )
    lines.append(("out", str(settings.out)))
    if distillation.processes.is_main:
        for name, text in lines:
            typer.echo(f"{name:<9}{text}", err=True)
        for warning in schedule_warnings(distillation):
            typer.echo(f"warning: {warning}", err=True)


def schedule_warnings(distillation: DistillationJob) -> list[str]:
    """Returns warnings on a stage that never reaches its rate, or a shortened warm-up."""
    found = []
    for cost in distillation.costs():
        if cost.warm_up >= cost.steps:
            found.append(
                f"stage {cost.stage} has {cost.steps} steps, all of them warm-up: it never reaches its rate; give "
                "--warm-up, or more epochs."
            )
        elif distillation.settings.warm_up is None and cost.warm_up < 1000:
            typer.echo(
                f"{'':<9}stage {cost.stage} is short: the published warm-up of 1000 steps is scaled to {cost.warm_up}",
                err=True,
            )
    return found


def print_cost(distillation: DistillationJob) -> None:
    """Prints what the choices cost (``--dry-run``)."""
    from tabulate import tabulate

    rows = [
        (cost.stage, cost.epochs, cost.steps, f"{cost.forward_backwards:,}", f"{cost.proxy_forwards:,}")
        for cost in distillation.costs()
    ]
    headers = ["stage", "epochs", "steps", "forward+backwards of the target", "forwards of the proxy"]
    typer.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    memory = distillation.memory()
    epochs = sum(cost.epochs for cost in distillation.costs())
    held, few = len(distillation.held_out), min(distillation.settings.gap_images, len(distillation.held_out))
    typer.echo(
        f"\nOf one image each. Measuring held-out images after each epoch adds at most "
        f"{11 * (held + few) * epochs:,} more.\n"
        f"Memory about {memory.total / 1e6:,.0f} MB: weights {memory.weights / 1e6:,.0f}, gradients, momentum and "
        f"copies {memory.training / 1e6:,.0f}, activations of a micro-batch {memory.activations / 1e6:,.0f}.\n"
        "Nothing was trained (--dry-run)."
    )


def print_gap(gap: ProxyGap, eps: str, target: str, proxy: str) -> None:
    """Prints the proxy gap of the vanilla pair, before training."""
    typer.echo(f"\nproxy gap, n = {gap.clean['proxy'].n}, PGD-10 on {target} at {eps}", err=True)
    for name, model in (("target", target), ("proxy", proxy)):
        clean, adversarial = gap.clean[name], gap.adversarial[name]
        typer.echo(
            f"  {name:<7}{model:<12} clean {interval(clean)}   on those images {interval(adversarial)}", err=True
        )


def print_result(distillation: DistillationJob, found: Distilled) -> None:
    """Prints vanilla, pivot and result on the held-out images, and the next command."""
    settings = distillation.settings
    print_held_out(settings.target, settings, found, "open_clip reads")


def print_held_out(model: str, settings: ClipSettings, found: Distilled | Trained, reader: str) -> None:
    """Prints one row per measured model, with intervals."""
    from vlmdefend.reporting.training.trained import held_out_text, verdict_command

    if found.summary:
        typer.echo(f"\n{held_out_text(model, settings.dataset, settings.eps, found.summary)}")
    done = "found done" if found.reused else "written"
    typer.echo(
        f"\n{found.out}: {done}, a model folder that {reader}. These figures are of PGD-10 alone; for a verdict: "
        f"{verdict_command(model, settings.eps, found.out)}"
    )


def interval(count: HitCount) -> str:
    """Formats an accuracy as ``85.2 [81.8, 88.0]``."""
    from vlmdefend.reporting.training.adaptation import interval as of_counts

    return of_counts(count.hits, count.n)


def trained_text(settings: DistillSettings) -> str:
    """Returns what trains, in words."""
    kind, _, count = settings.trains.partition(":")
    return {"image": "image tower", "all": "whole model"}.get(kind, f"last {count} tensors of the image tower")


def pull_text(settings: DistillSettings) -> str:
    """Returns what happens between epochs of stage b, in words."""
    if settings.pull == 1:
        return "no pull"
    first = "every epoch" if settings.pull_first else "every epoch but the first"
    return f"{first} begins at {settings.pull:g} itself + {1 - settings.pull:g} pivot"
