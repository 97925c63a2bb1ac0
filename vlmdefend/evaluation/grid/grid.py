"""The options of an evaluation, checked: lists that multiply into cells. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.options import Option
from vlmdefend.types import Attacker, Norm

ATTACKERS: tuple[Attacker, ...] = ("transfer", "whitebox", "adaptive")

WHAT, HOW, RUN = "Models and images", "How to attack", "How to run"


class Grid(BaseModel):
    """Options of one evaluation (the keys of ``--config``): every combination of the list-valued fields is a cell."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: Annotated[
        list[str],
        Option(
            "tiny-vit, ViT-B/32, ARCH:TAG, hf-hub:..., local-dir:PATH.  \\[default: tiny-vit]",
            WHAT,
            flags=("--model", "-m"),
            complete="models",
            cells=True,
        ),
    ] = ["tiny-vit"]
    defense: Annotated[
        list[str],
        Option(
            "none, jpeg, noise:sigma=0.03, ttc+jpeg ...  \\[default: none]",
            WHAT,
            flags=("--defense", "-d"),
            complete="defenses",
            cells=True,
        ),
    ] = ["none"]
    dataset: Annotated[
        list[str],
        Option(
            "fashion, emoji:sketch, cifar10, folder:PATH, wds:PATH ...  \\[default: fashion]",
            WHAT,
            complete="datasets",
            cells=True,
        ),
    ] = ["fashion"]
    attack: Annotated[
        list[str],
        Option(
            "pgd, fgsm, none, pgd:steps=100:loss=dlr ...  \\[default: pgd]",
            HOW,
            flags=("--attack", "-a"),
            complete="attacks",
            cells=True,
            single="pgd, fgsm, pgd:steps=100:loss=dlr ...  \\[default: pgd]",
        ),
    ] = ["pgd"]
    attacker: Annotated[
        list[Attacker],
        Option(
            "transfer, whitebox, adaptive.  \\[default: all three]",
            HOW,
            cells=True,
            single="transfer, whitebox, adaptive.  \\[default: adaptive]",
        ),
    ] = list(ATTACKERS)
    adversarial: Annotated[
        list[str] | None,
        Option("Folders of `vlmdefend attack`: score these images, attack nothing.", HOW, grid_only=True),
    ] = None
    eps: Annotated[
        list[str] | None,
        Option(
            "Radius, 4/255 or 0.03.  \\[default: the protocol's list]", HOW, cells=True, single="Radius, 4/255 or 0.03."
        ),
    ] = None
    norm: Annotated[Norm | None, Option("linf or l2.  \\[default: the protocol's]", HOW)] = None
    seed: Annotated[list[int], Option("One or several.  \\[default: 0]", HOW, cells=True, single="\\[default: 0]")] = [
        0
    ]
    protocol: Annotated[str, Option("Named set of choices.  \\[default: unified]", HOW)] = "unified"
    templates: Annotated[
        list[str] | Literal["dataset"] | None,
        Option(
            "Prompt with {c} for the class (repeat to ensemble), or 'dataset' for the set's own list.",
            WHAT,
            flags=("--template",),
        ),
    ] = None
    classes: Annotated[Path | None, Option("File of class names, one per line.", WHAT)] = None
    split: Annotated[str, Option("Split of the data set.  \\[default: test]", WHAT)] = "test"
    limit: Annotated[
        int | None, Option("Class-balanced, seeded subset of so many images.  \\[default: 1000]", WHAT)
    ] = Field(default=None, description="None: the protocol's")
    full: Annotated[bool, Option("All images of the split.", WHAT)] = False
    steps: Annotated[int | None, Option("Steps of an attack that takes steps.", HOW)] = None
    batch_size: Annotated[int, Option("Images in the model at once.  \\[default: 64]", RUN)] = 64
    weights: Annotated[Path | None, Option("Local weights file for the model.", WHAT)] = None
    root: Annotated[Path | None, Option("Folder of downloaded data sets.", WHAT)] = None
    device: Annotated[str | None, Option("cpu, cuda, cuda:1.  \\[default: the GPU if any]", RUN)] = None
    threads: Annotated[int | None, Option("CPU threads.  \\[default: torch's]", RUN)] = None
    skip_bad: Annotated[bool, Option("Record and skip images that cannot be read.", WHAT)] = False

    @field_validator("model", "defense", "dataset", "attack", "attacker", "adversarial", "eps", "seed", mode="before")
    @classmethod
    def _split_commas(cls, value: Any, info: Any) -> Any:
        """Splits ``a,b`` into a list, makes a single value a list, and drops duplicates."""
        if value is None and info.field_name in ("eps", "adversarial"):
            return None
        parts = value if isinstance(value, (list, tuple)) else [value]
        words = [word.strip() for part in parts for word in str(part).split(",") if part is not None and word.strip()]
        if not words:
            raise UserError(f"--{info.field_name} {value!r}: is empty; give at least one, or leave the option out.")
        return list(dict.fromkeys(words))

    @field_validator("templates", mode="before")
    @classmethod
    def _single_template(cls, value: Any) -> Any:
        """Makes a single template a list; commas in it belong to the prompt."""
        return [value] if isinstance(value, str) and value != "dataset" else value

    @field_validator("norm", mode="before")
    @classmethod
    def _lowercase(cls, value: Any) -> Any:
        """Reads ``L2`` as ``l2``."""
        return value.lower() if isinstance(value, str) else value

    @field_validator("limit", "batch_size", "threads", "steps")
    @classmethod
    def _at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{info.field_name.replace('_', '-')} {value}: must be at least 1; give a larger number.")
        return value

    @classmethod
    def build(cls, config: dict[str, Any], flags: dict[str, Any]) -> Grid:
        """Returns the grid of a config file's keys and of flags, which override them; None or empty: not given.

        Raises:
            UserError: an unknown key or a value of the wrong type, in one sentence.
        """
        for kind, keys in (("config key", config), ("option", flags)):
            for key in keys:
                if key not in cls.model_fields:
                    hint = "the keys are the options of `vlmdefend evaluate --help`."
                    raise did_you_mean(kind, key, list(cls.model_fields), hint=hint)
        if config.get("limit") is not None and config.get("full"):
            raise UserError("the config file has both limit and full: true; keep one of them.")
        if flags.get("limit") is not None and flags.get("full"):
            raise UserError("--limit and --full contradict each other; give one of them.")
        if flags.get("limit") is not None or flags.get("full"):
            config = {key: value for key, value in config.items() if key not in ("limit", "full")}
        given = {k: v for k, v in flags.items() if v is not None and v is not False and v != [] and v != ()}
        try:
            return cls(**{**config, **given})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-").replace("templates", "template")
            message = first["msg"][0].lower() + first["msg"][1:]
            raise UserError(
                f"--{name} {first['input']!r}: {message}; `vlmdefend evaluate --help` says what it takes."
            ) from None


def read_config(file: Path) -> dict[str, Any]:
    """Returns the keys of a YAML config file.

    Raises:
        UserError: missing, not YAML, or not a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: cannot be read ({error.strerror}); give a YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"--config {file}: is not valid YAML{line}; write one `option: value` per line.") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"--config {file}: holds {found}; write one `option: value` per line.")
    keys = {str(key).replace("-", "_"): value for key, value in content.items()}
    if "template" in keys:  # the option --template fills the field templates
        keys["templates"] = keys.pop("template")
    return keys


def read_class_names(file: Path) -> list[str]:
    """Reads class names, one per line.

    Raises:
        UserError: missing or empty.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--classes {file}: cannot be read ({error.strerror}); give a text file of names.") from None
    except UnicodeDecodeError:
        raise UserError(f"--classes {file}: is not UTF-8 text; write one class name per line.") from None
    if not names:
        raise UserError(f"--classes {file}: is empty; write one class name per line.")
    return names
