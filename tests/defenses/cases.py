"""The cases of the contract: every defense as it comes, and with settings under which it acts on embedded models."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense


class Case(NamedTuple):
    """A defense with its options, around an embedded model."""

    text: str
    model: str = "tiny-rn"

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]

    def create(self) -> Defense:
        return DEFENSES.create(self.text)


NAMES = DEFENSES.names()
# Defaults are made for real CLIPs: on the embedded models these hardly fire, or move less than a contract tolerates,
# and the contract would hold without the defense, or without the part of it that acts.
ACTING = (
    Case("csr:threshold=1"),
    Case("mac:threshold=0.1"),
    Case("ttp:threshold=1"),
    Case("tpt:lr=0.1"),
    Case("c_tpt:lr=0.1"),
    Case("r_tpt:lr=0.1"),
    Case("tapt:lr=0.1"),
    Case("tapt:lr=0.1", "tiny-vit"),
)
CASES = (*map(Case, NAMES), *ACTING)
every = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.text}-{case.model}")
