"""Prints the choices, cost and result of ``vlmdefend urda-train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from vlmdefend.training.adaptation.job import AdaptationJob, Adapted

SEEN = {"tiny-vit", "tiny-rn"}


def print_choices(adaptation: AdaptationJob) -> None:
    """Prints every choice that decides the result, defaults too."""
    settings, robust = adaptation.settings, adaptation.robust
    step_1 = "not needed"
    if settings.teacher is not None:
        step_1 = f"the teacher is {settings.teacher}"
    elif adaptation.wants_teacher:
        step_1 = f"{adaptation.method!r}"
    lines = [
        ("source", f"{settings.source}: {len(adaptation.sets.source)} labelled images"),
        (
            "target",
            f"{settings.target}: {len(adaptation.sets.target)} images without labels"
            + (f", {len(adaptation.sets.held_out)} held out to choose by" if settings.held_out else "")
            + f"; measured on {len(adaptation.sets.tested)} of its split {settings.eval_split}",
        ),
        ("network", network_text(adaptation)),
        ("step 1", step_1 + (f"; {_stage(adaptation, first=True)}" if adaptation.trains_teacher else "")),
        ("step 2", "left out" if robust is None else f"{robust!r}; {_stage(adaptation, first=False)}"),
        ("start", f"of the student: {settings.init}"),
        ("update", update_text(adaptation)),
        ("chosen", selection_text(settings.select)),
        ("out", str(settings.out)),
    ]
    for name, text in lines:
        typer.echo(f"{name:<9}{text}", err=True)
    for warning in warnings_of(adaptation):
        typer.echo(f"warning: {warning}", err=True)


def network_text(adaptation: AdaptationJob) -> str:
    """Returns backbone, bottleneck and head in words."""
    settings = adaptation.settings
    weights = "published weights" if settings.pretrained and settings.backbone != "tiny-cnn" else "random weights"
    return f"{settings.backbone} ({weights}), bottleneck {settings.bottleneck}, {settings.head} head"


def update_text(adaptation: AdaptationJob) -> str:
    """Returns optimizer and precision in words."""
    settings = adaptation.settings
    return (
        f"SGD, Nesterov momentum {settings.momentum:g}, weight decay {settings.weight_decay:g}, rate x "
        f"(1 + 0.001 k)^-0.75, BatchNorm {settings.batch_norm}, {adaptation.processes.precision}, seed {settings.seed}"
    )


def selection_text(select: str) -> str:
    """Returns how an epoch is chosen, in words."""
    return {
        "last": "the last epoch; no target label is read",
        "agreement": "the epoch that agrees best with the teacher, attacked then clean; no target label is read",
        "entropy": "the epoch that is sure of most images; no target label is read",
        "oracle": "ORACLE: the epoch that is best by the labels of held-out target images",
    }[select]


def warnings_of(adaptation: AdaptationJob) -> list[str]:
    """Returns warnings on choices under which the numbers are misleading."""
    settings, found = adaptation.settings, []
    if settings.backbone in SEEN or settings.teacher in SEEN:
        name = settings.backbone if settings.backbone in SEEN else settings.teacher
        found.append(
            f"{name} was trained on the training images of all embedded sets with their class names: on these sets "
            "nothing is left to adapt, and the numbers say nothing of adaptation."
        )
    if adaptation.robust is not None and adaptation.robust.name == "rfa" and settings.teacher is None:
        found.append(
            "rfa takes its robustness from a robust teacher, and that of step 1 is none; make one with --robustify vat "
            "and give its folder as --teacher local-dir:FOLDER."
        )
    if adaptation.given is not None and adaptation.given.assumed:
        found.append(adaptation.given.assumed)
    if settings.select == "oracle":
        found.append("--oracle: the epoch is chosen by target labels, so this is no unsupervised adaptation.")
    if settings.space == "released":
        found.append("--space released: most of each image moves by more than eps; for reproduction only.")
    return found


def print_cost(adaptation: AdaptationJob) -> None:
    """Prints steps and passes of each stage (``--dry-run``)."""
    from tabulate import tabulate

    rows = [
        (cost.stage, cost.epochs, cost.steps, f"{cost.forward_backwards:,}", f"{cost.proxy_forwards:,}")
        for cost in adaptation.costs()
    ]
    headers = ["stage", "epochs", "steps", "forward+backwards", "forwards of the teacher"]
    typer.echo(tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True))
    typer.echo("\nOf one image each; at most, for the teacher looks once at an image that is not augmented.")
    typer.echo("Nothing was trained (--dry-run).")


def print_result(adaptation: AdaptationJob, found: Adapted) -> None:
    """Prints the table, the bound, and the next command."""
    from vlmdefend.reporting.training.adaptation import result_text

    settings = adaptation.settings
    typer.echo(f"\n{result_text(settings.model_dump(mode='json'), found.spec(), found.out)}")
    done = "found done" if found.reused else "written"
    what = "" if found.written else f"; the teacher is {settings.teacher or settings.backbone}, nothing was trained"
    typer.echo(f"\n{found.out}: {done}{what}.")


def _stage(adaptation: AdaptationJob, *, first: bool) -> str:
    settings = adaptation.settings
    epochs, rate, size = (
        (settings.epochs_teacher, settings.lr_teacher, settings.batch_size)
        if first
        else (settings.epochs_student, settings.lr_student, settings.batch_size_student)
    )
    return f"{epochs} epochs, rate {rate:g}, batch {size}"
