"""Zero-shot: an untrained CLIP serves as the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation.base import Adaptation, Domains, Role
from vlmdefend.defenses.training_time.base import Student, Teacher, Terms
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch


@ADAPTATIONS.register
@dataclass(frozen=True, kw_only=True)
class ZeroShot(Adaptation):
    """The backbone with class names as text; nothing is trained."""

    name: ClassVar[str] = "zero-shot"
    summary: ClassVar[str] = "a vision-language model as it is; nothing trains"
    citation: ClassVar[str] = "Radford et al. 2021"
    role: ClassVar[Role] = "adaptation"
    domains: ClassVar[Domains] = "target"
    trains: ClassVar[bool] = False

    @property
    def phases(self) -> tuple[Adaptation, ...]:
        """Empty: there is no stage."""
        return ()

    def losses(self, student: Student, teacher: Teacher | None, batch: Batch, rng: ImageRng) -> Terms:
        """Raises: there is no stage in which it could be called."""
        raise NotImplementedError("zero-shot trains nothing")
