"""What comes out of a run of ``train``: the result and its mixtures with the vanilla weights, measured and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.training.clip.adapters import folded
from vlmdefend.training.clip.classifier import statistics
from vlmdefend.training.loop.folder import TRAINING, RunFolder
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.settings.train_settings import TrainSettings


@dataclass(frozen=True)
class ResultWriter:
    """A trained model beside what it was.

    Args:
        settings: of the run.
        processes: the main one writes.
        folder: where to.
        model: trained, with whatever adapters and prompts it was trained with.
        original: the same model as it was; it takes on the weights that are measured and written.
        origin: what the result was made of, for its folder.
    """

    settings: TrainSettings
    processes: Processes
    folder: RunFolder
    model: VisionLanguageModel
    original: VisionLanguageModel
    origin: dict[str, Any]

    @property
    def shares(self) -> dict[str, float]:
        """By name, the share of the trained weights: ``vanilla``, ``result``, then the mixtures."""
        return {"vanilla": 0.0, "result": 1.0} | {f"mix-{share:g}": share for share in self.settings.mix}

    def write(
        self, judge: Callable[[VisionLanguageModel], Accuracies] | None, done: frozenset[str], *, steps: int
    ) -> dict[str, Any]:
        """Measure and write what is not ``done`` yet: the result, then each mixture, in a folder inside of it."""
        clip = self.original.clip
        vanilla = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        trained = folded(self.model.clip, vanilla)
        made: dict[str, Any] = {}
        for name, share in self.shares.items():
            if name in done or (name == "vanilla" and judge is None):
                continue
            clip.load_state_dict({key: _between(vanilla[key], trained[key], share) for key in vanilla})
            if name != "vanilla" and self.settings.objective.learns and self.model.prompts is not None:
                self.original.add_prompts(self.model.prompts.deployed())  # there is no mixture after it
            made[name] = [] if judge is None else [list(counts) for counts in judge(self.original)]
            if self.processes.is_main and name != "vanilla":
                folder = self.folder.out if name == "result" else self.folder.out / name
                self._save(folder, {"part": name, "steps": steps, "mix": share, "held_out": dict(made)})
            self.processes.wait()
        return made

    def _save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the model that was, with its present weights, and the normalisation that they were trained with."""
        mean, std = statistics(self.original, self.settings.normalization)
        self.original.preprocess_cfg |= {"mean": list(mean), "std": list(std)}
        metadata = {
            "method": self.settings.method,
            "made_by": "vlmdefend train",
            "settings": self.settings.model_dump(mode="json"),
        }
        save_folder(self.original, folder, metadata | self.origin | facts, beside=(TRAINING,))


def _between(vanilla: Tensor, trained: Tensor, share: float) -> Tensor:
    """``(1 - share) vanilla + share trained`` (Wortsman et al. 2022, WiSE-FT); either end to the last bit."""
    if share in (0.0, 1.0) or not vanilla.is_floating_point():
        return trained if share else vanilla
    return vanilla.lerp(trained, share)
