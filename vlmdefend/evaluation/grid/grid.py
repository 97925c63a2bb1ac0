"""What the user asked for, checked: lists that multiply into cells. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vlmdefend.errors import UserError, did_you_mean
from vlmdefend.evaluation.store.records import Attacker
from vlmdefend.types import Norm

ATTACKERS: tuple[Attacker, ...] = ("transfer", "whitebox", "adaptive")


class Grid(BaseModel):
    """One evaluation: every combination of the list-valued fields is a cell. Keys of ``--config`` are these names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: list[str] = ["tiny-vit"]
    defense: list[str] = ["none"]
    dataset: list[str] = ["fashion"]
    attack: list[str] = ["pgd"]
    attacker: list[Attacker] = list(ATTACKERS)
    adversarial: list[str] | None = None  # folders of `vlmdefend attack`, scored instead of attacking
    eps: list[str] | None = None  # None: the protocol's list
    norm: Norm | None = None
    seed: list[int] = [0]
    protocol: str = "unified"
    templates: list[str] | Literal["dataset"] | None = None
    classes: Path | None = None
    split: str = "test"
    limit: int | None = Field(default=None, description="None: the protocol's")
    full: bool = False
    steps: int | None = None
    batch_size: int = 64
    weights: Path | None = None
    root: Path | None = None
    device: str | None = None
    threads: int | None = None
    skip_bad: bool = False

    @field_validator("model", "defense", "dataset", "attack", "attacker", "adversarial", "eps", "seed", mode="before")
    @classmethod
    def _split_commas(cls, value: Any, info: Any) -> Any:
        """``a,b`` and a lone value are lists too; doubles are dropped, the order is kept."""
        if value is None and info.field_name in ("eps", "adversarial"):
            return None
        parts = value if isinstance(value, (list, tuple)) else [value]
        words = [word.strip() for part in parts for word in str(part).split(",") if part is not None and word.strip()]
        if not words:
            raise UserError(f"--{info.field_name} {value!r}: is empty; give at least one, or leave the option out.")
        return list(dict.fromkeys(words))

    @field_validator("templates", mode="before")
    @classmethod
    def _lone_template(cls, value: Any) -> Any:
        """One template is a list of one; a comma in it is the prompt's."""
        return [value] if isinstance(value, str) and value != "dataset" else value

    @field_validator("norm", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        """``L2`` is ``l2``."""
        return value.lower() if isinstance(value, str) else value

    @field_validator("limit", "batch_size", "threads", "steps")
    @classmethod
    def _at_least_one(cls, value: int | None, info: Any) -> int | None:
        if value is not None and value < 1:
            raise UserError(f"--{info.field_name.replace('_', '-')} {value}: must be at least 1; give a larger number.")
        return value

    @classmethod
    def build(cls, config: dict[str, Any], flags: dict[str, Any]) -> Grid:
        """Merge a config file's keys with flags (flags win; None and empty flags were not given).

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
    """The keys of a YAML config file.

    Raises:
        UserError: missing, not YAML, or not a mapping.
    """
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
    if "template" in keys:  # the option's name is as good as the field's
        keys["templates"] = keys.pop("template")
    return keys


def read_class_names(file: Path) -> list[str]:
    """Class names, one per line.

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
