"""The options that ``distill``, ``train`` and ``urda-train`` have in common, and how each is read. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmdefend.errors import UserError
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, Positive, Seed, Share, option
from vlmdefend.types import parse_eps


class RunSettings(BaseModel):
    """One run, every choice made. The names are those of the options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    anyway: ClassVar[frozenset[str]] = frozenset(("out", "device", "threads", "track", "save_every", "root"))
    """What may differ when a run goes on: it changes how it runs, or what is made of it, not what comes out."""

    out: Path

    limit: AtLeastOne | None = None
    held_out: Count
    root: Path | None = None
    skip_bad: bool = False

    eps: str
    alpha: str
    steps: Count

    momentum: Share = 0.9
    weight_decay: NotNegative
    clip: Positive | None = None
    batch_size: AtLeastOne
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    seed: Seed = 0

    save_every: AtLeastOne | None = None
    track: Literal["tensorboard", "trackio", "wandb"] | None = None
    device: str | None = None
    threads: AtLeastOne | None = None

    @property
    def radius(self) -> float:
        """eps as a number."""
        return parse_eps(self.eps)

    @property
    def step_size(self) -> float:
        """alpha as a number: ``eps``, ``0.5eps``, ``eps/2`` or ``1/255``.

        Raises:
            UserError: written otherwise.
        """
        written = self.alpha.replace(" ", "").lower()
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)?\*?eps(?:/(\d+\.?\d*))?", written)
        if match is not None and float(match[2] or 1) > 0:
            return self.radius * float(match[1] or 1) / float(match[2] or 1)
        try:
            return parse_eps(written)
        except UserError:
            raise UserError(f"--alpha {self.alpha}: write eps, eps/2, or a number such as 1/255.") from None

    def decisive(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.anyway}

    def check(self) -> None:
        """What no single option says.

        Raises:
            UserError: --eps or --alpha is no number.
        """
        _ = self.radius, self.step_size


def refusal(error: ValidationError, command: str) -> UserError:
    """What pydantic says of the first option that it does not take, as a sentence with a next step."""
    first = error.errors()[0]
    message, name = first["msg"][0].lower() + first["msg"][1:], option(str(first["loc"][0]))
    return UserError(f"--{name} {first['input']}: {message}; `vlmdefend {command} --help` says what it takes.")


def as_name(text: str) -> str:
    """The name of a model, data set or method as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "model"


def lines_of(file: Path) -> list[str]:
    """Class names from a file, one a line.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--classes {file}: cannot be read; give a UTF-8 text file, one class name per line.") from None
