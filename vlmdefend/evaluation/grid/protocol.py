"""Protocols: the settings that two comparable numbers share, as data (``protocols/*.yaml``). Imports no torch."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from vlmdefend.errors import did_you_mean
from vlmdefend.types import Norm


class Protocol(BaseModel):
    """Preprocessing, prompts, threat model and subset of an evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    citation: str
    pixel_space: Literal["model", "native"]  # native: perturb at the image's own size, resize inside the model
    normalization: Literal["model", "clip", "imagenet"]
    templates: tuple[str, ...] | Literal["dataset"]  # "dataset": each set's own published list
    norm: Norm
    eps: tuple[str, ...]
    eps_embedded: tuple[str, ...] | None = None
    limit: int

    @property
    def hash(self) -> str:
        """A hash of the fields that can change a result; eps and limit are recorded separately."""
        fields = self.model_dump_json(include={"name", "pixel_space", "normalization", "templates"})
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def with_templates(self, templates: tuple[str, ...] | Literal["dataset"]) -> Protocol:
        """Returns the protocol with other prompts and ``+templates`` added to its name."""
        return self.model_copy(update={"name": f"{self.name}+templates", "templates": templates})


@cache
def listed_protocols() -> tuple[Protocol, ...]:
    """Returns all protocols, sorted by name."""
    folder = files("vlmdefend.evaluation.grid") / "protocols"
    texts = [entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return tuple(sorted((Protocol.model_validate(yaml.safe_load(text)) for text in texts), key=lambda p: p.name))


def get_protocol(name: str) -> Protocol:
    """Returns the protocol called ``name``.

    Raises:
        UnknownName: with the names that exist.
    """
    known = {protocol.name: protocol for protocol in listed_protocols()}
    if name not in known:
        raise did_you_mean("protocol", name, list(known))
    return known[name]
