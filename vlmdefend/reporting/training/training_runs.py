"""Reads settings and measurements in a folder of ``distill``, ``train`` or ``urda-train``, and formats them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlmdefend.errors import UserError
from vlmdefend.reporting.training.adaptation import result_text
from vlmdefend.reporting.training.trained import held_out_text, measured, verdict_command

SETTINGS, SUMMARY = Path("training", "settings.json"), Path("training", "summary.json")
NOT_WHOLE = "is not whole; run the same command that made the folder again."
Command = Literal["distill", "train", "urda-train"]
TELLTALE: dict[str, Command] = {"robustify": "urda-train", "proxy": "distill", "method": "train"}


class TrainingRun(NamedTuple):
    """A finished training run: its folder, command, settings and summary."""

    folder: Path
    command: Command
    settings: dict[str, Any]
    summary: dict[str, Any]


def training_run(folder: Path) -> TrainingRun | None:
    """Returns the training run that wrote ``folder``; None if no training command wrote it.

    Raises:
        UserError: the run is not finished, or its files are damaged.
    """
    if not (folder / SETTINGS).is_file():
        return None
    settings = _read(folder / SETTINGS)
    command = next((command for option, command in TELLTALE.items() if option in settings), None)
    if command is None:
        return None
    summary = _read(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    if not summary.get("finished"):
        raise UserError(f"{folder}: is not finished; run the same `vlmdefend {command}` command again.")
    return TrainingRun(folder, command, settings, summary)


def training_text(run: TrainingRun) -> str:
    """Returns the text that the command printed at its end.

    Raises:
        UserError: the files do not hold what the command writes.
    """
    try:
        return _text(run)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"{run.folder / SETTINGS.parent}: {NOT_WHOLE}") from None


def _text(run: TrainingRun) -> str:
    folder, command, settings, summary = run
    if command == "urda-train":
        return f"{folder}\n\n{result_text(settings, summary, folder)}\n"
    model = settings["target"] if command == "distill" else settings["model"]
    how = f"learned from {settings['proxy']}" if command == "distill" else settings["method"]
    table = held_out_text(model, settings["dataset"], settings["eps"], measured(summary))
    return (
        f"{folder}: {model}, {how}\n\n{table or 'No image was held out, so nothing was measured.'}\n\n"
        "PGD-10 alone is no verdict. AutoAttack gives one:\n"
        f"  {verdict_command(model, settings['eps'], folder)}\n"
    )


def _read(file: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: {NOT_WHOLE}") from None
    return found
