"""Names for shell completion, without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def _starting(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last of several comma-separated names."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names() if name.startswith(last)]

    return complete


def _attacks() -> list[str]:
    from vlmdefend.attacks import ATTACKS

    return ATTACKS.names()


def _defenses() -> list[str]:
    from vlmdefend.defenses import DEFENSES

    return DEFENSES.names()


def _datasets() -> list[str]:
    from vlmdefend.data.open import listed_datasets

    return [line.name for line in listed_datasets()]


def _models() -> list[str]:
    from vlmdefend.models.names import model_names

    return model_names()


def _objectives() -> list[str]:
    from vlmdefend.defenses.training_time import OBJECTIVES

    return [name for name in OBJECTIVES.names() if name != "hpt-gpd"]


def _adaptations() -> list[str]:
    from vlmdefend.defenses.adaptation import ADAPTATIONS

    return ADAPTATIONS.names()


attacks = _starting(_attacks)
defenses = _starting(_defenses)
datasets = _starting(_datasets)
models = _starting(_models)
adaptations = _starting(_adaptations)
objectives = _starting(_objectives)
