"""The progress interface of every long command: evaluation of a grid, crafting of a set, training. Imports no torch."""

from __future__ import annotations

from typing import Any, NamedTuple


class Failure(NamedTuple):
    """A cell, or all cells of a model, that could not be computed."""

    what: str
    message: str
    users: bool  # True: the user can mend it (exit code 2); False: a defect (exit code 1)


class Progress:
    """Receives the events of a run. Every method does nothing; a subclass overrides those that it shows.

    A unit of work is a cell (:class:`~vlmdefend.evaluation.store.records.Cell`) with its images, or a training stage
    (its name) with its steps.
    """

    def begin(self, unit: Any, total: int, done: int = 0) -> None:
        """A unit of ``total`` images or steps starts; ``done`` of them were finished by an earlier run."""

    def advance(self, unit: Any, count: int = 1) -> None:
        """``count`` more images of the cell are decided; or one step is done, whose logged values ``unit`` holds."""

    def end(self, result: Any, *, reused: bool = False) -> None:
        """A cell has its record (``reused``: an earlier run computed it), or an epoch has its ``EpochResult``."""

    def fail(self, failure: Failure, total: int, cells: int = 1) -> None:
        """``cells`` cells with ``total`` images together cannot be computed."""

    def measured(self, result: Any) -> None:
        """A measurement before training is done: the ``ProxyGap``."""

    def note(self, message: str) -> None:
        """The run has a message for the user."""
