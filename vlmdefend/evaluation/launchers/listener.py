"""Who hears how a run goes. Torch-free, so that the command line can subclass it cheaply."""

from __future__ import annotations

from typing import NamedTuple

from vlmdefend.evaluation.store.records import Cell, Record


class Failure(NamedTuple):
    """A cell (or all cells of a model) that could not be computed."""

    what: str
    message: str
    users: bool  # the user's to mend (exit code 2), else a defect (exit code 1)


class Listener:
    """Listens to nothing; override what is of interest."""

    def begin(self, cell: Cell) -> None:
        """A cell starts."""

    def advance(self, cell: Cell, images: int) -> None:
        """``images`` more of the cell are decided."""

    def end(self, record: Record, *, reused: bool) -> None:
        """A cell has its record; ``reused``: it was found done."""

    def fail(self, failure: Failure, images: int, cells: int = 1) -> None:
        """Cells, of so many images together, have none."""

    def note(self, message: str) -> None:
        """Something the user should know."""
