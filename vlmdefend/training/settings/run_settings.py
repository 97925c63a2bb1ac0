"""Options that all training commands share, and how each is read. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vlmdefend.errors import UserError
from vlmdefend.options import Option
from vlmdefend.training.settings.option_types import AtLeastOne, Count, NotNegative, Positive, Seed, Share, option
from vlmdefend.types import parse_eps

WHAT, METHOD, TRAIN, RUN = "Models and images", "The method", "How to train", "How to run"


class RunSettings(BaseModel):
    """Options of one training run; the names are those of the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    anyway: ClassVar[frozenset[str]] = frozenset(("out", "device", "threads", "track", "save_every", "root"))
    """What may differ when a run goes on: it changes how it runs, or what is made of it, not what comes out."""

    out: Annotated[
        Path, Option("Model folder to write; the same command resumes.  \\[default: trained/MODEL-METHOD]", RUN)
    ]

    limit: Annotated[AtLeastOne | None, Option("Class-balanced subset of so many images.", WHAT)] = None
    held_out: Annotated[
        Count, Option("Training images held out to measure on and choose by; at most a fifth.  \\[default: 500]", WHAT)
    ]
    root: Annotated[Path | None, Option("Folder of downloaded data sets.", WHAT)] = None
    skip_bad: Annotated[bool, Option("Leave out images that cannot be read.", WHAT)] = False

    eps: Annotated[str, Option("Radius of the training attack.  \\[default: the method's; embedded: 8/255]", METHOD)]
    alpha: Annotated[str, Option("Its step size: eps, eps/4, 1/255.  \\[default: the method's share of eps]", METHOD)]
    steps: Annotated[Count, Option("Its steps.  \\[default: the method's]", METHOD)]

    momentum: Annotated[Share, Option("Of SGD.  \\[default: 0.9]", TRAIN)] = 0.9
    weight_decay: Annotated[NotNegative, Option("\\[default: the method's]", TRAIN)]
    clip: Annotated[Positive | None, Option("Longest gradient norm.  \\[default: 1; paper: none]", TRAIN)] = None
    batch_size: Annotated[
        AtLeastOne, Option("Images of a step, over all processes.  \\[default: the method's; embedded: 64]", TRAIN)
    ]
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        Option(
            "float32, bfloat16 or float16 of the update; the attack is always float32.  \\[default: accelerate's, "
            "else float32]",
            TRAIN,
        ),
    ] = None
    seed: Annotated[Seed, Option("\\[default: 0]", TRAIN)] = 0

    save_every: Annotated[
        AtLeastOne | None, Option("Steps between saved states.  \\[default: each epoch, and five minutes]", RUN)
    ] = None
    track: Annotated[
        Literal["tensorboard", "trackio", "wandb"] | None,
        Option("tensorboard, trackio or wandb, beside the log in OUT/training.", RUN),
    ] = None
    device: Annotated[str | None, Option("cpu, cuda, cuda:1.  \\[default: the GPU if any]", RUN)] = None
    threads: Annotated[AtLeastOne | None, Option("CPU threads.  \\[default: torch's]", RUN)] = None

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
        """Returns the settings that must be the same for a run to be resumed."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.anyway}

    def check(self) -> None:
        """Checks what involves several options.

        Raises:
            UserError: --eps or --alpha is no number.
        """
        _ = self.radius, self.step_size


def refusal(error: ValidationError, command: str) -> UserError:
    """Turns pydantic's first error into a sentence with a next step."""
    first = error.errors()[0]
    message, name = first["msg"][0].lower() + first["msg"][1:], option(str(first["loc"][0]))
    return UserError(f"--{name} {first['input']}: {message}; `vlmdefend {command} --help` says what it takes.")


def as_name(text: str) -> str:
    """Returns the name of a model, data set or method as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.") or "model"


def lines_of(file: Path) -> list[str]:
    """Reads class names, one per line.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--classes {file}: cannot be read; give a UTF-8 text file, one class name per line.") from None
