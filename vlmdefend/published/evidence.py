"""The evidence on one defense: ``published/defenses/NAME.yaml``, read and checked. Imports no torch."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vlmdefend.errors import UserError
from vlmdefend.types import Attacker

FOLDER = "defenses"
Label = Literal["paper", "code", "measured", "note"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class PaperClaim(_Strict):
    """A result that a paper reports on the defense. Accuracies are in percent."""

    source: str  # who reports it
    statement: str
    model: str | None = None
    eps: str | None = None
    attacker: Attacker | None = None  # what the attack knew; None: not stated
    robust: tuple[float, ...] = ()  # one value, or the ends of a range
    label: Label = "paper"


class MeasuredRow(_Strict):
    """One verdict of ``vlmdefend evaluate`` on the defense. Accuracies are in percent."""

    model: str
    dataset: str
    n: int
    protocol: str
    norm: str
    eps: str
    attack: str
    clean: float
    transfer: float | None = None  # None: not run, the same attacker as white-box
    whitebox: float | None = None
    adaptive: float | None = None
    worst: float
    low: float  # ends of the Wilson 95 % interval of ``worst``
    high: float
    masked: bool = False  # the white-box number is that of a hidden gradient
    passes: str  # forwards+backwards of the model per image
    source: str  # the command that measured it


class Evidence(_Strict):
    """All that is known of one defense's worth."""

    defense: str
    finding: str = ""  # what it is worth here, in a few words
    papers: tuple[PaperClaim, ...] = ()
    measured: tuple[MeasuredRow, ...] = ()
    notes: tuple[str, ...] = ()  # further measurements: other settings, attacks and radii

    @property
    def masked(self) -> bool:
        """Whether the white-box gradient was found hidden in any measured row."""
        return any(row.masked for row in self.measured)

    def worst(self, model: str = "tiny-rn") -> MeasuredRow | None:
        """The measured row of a model."""
        return next((row for row in self.measured if row.model == model), None)


def defenses_with_evidence() -> list[str]:
    """The names of all defenses that have a file."""
    folder = files(__package__) / FOLDER
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@cache
def evidence_on(defense: str) -> Evidence:
    """Returns the evidence on a defense; one without a file (a plugin's) has none.

    Raises:
        UserError: the file does not fit the schema.
    """
    import yaml
    from pydantic import ValidationError

    file = files(__package__) / FOLDER / f"{defense}.yaml"
    if "/" in defense or not file.is_file():
        return Evidence(defense=defense)
    try:
        return Evidence.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise UserError(f"published/{FOLDER}/{defense}.yaml: does not fit the schema ({error}).") from None
