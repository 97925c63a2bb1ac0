"""Measures and writes the result of ``train`` and its mixtures with the vanilla weights."""

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
    """Measures and writes a trained model and its mixtures with the model before training.

    Args:
        settings: of the run.
        processes: the main one writes.
        folder: of the run.
        model: the trained model, with its adapters and prompts.
        original: the same model before training; the weights to measure and write are loaded into it.
        origin: hashes of the model and images that the result was trained from, for its metadata.
    """

    settings: TrainSettings
    processes: Processes
    folder: RunFolder
    model: VisionLanguageModel
    original: VisionLanguageModel
    origin: dict[str, Any]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the trained weights by name: ``vanilla`` (0), ``result`` (1), then the mixtures."""
        return {"vanilla": 0.0, "result": 1.0} | {f"mix-{share:g}": share for share in self.settings.mix}

    def write(
        self, measure: Callable[[VisionLanguageModel], Accuracies] | None, done: frozenset[str], *, steps: int
    ) -> dict[str, Any]:
        """Measures and writes the result, and each mixture in a folder inside of it.

        Args:
            measure: accuracies of a model on the held-out images; None: nothing is held out.
            done: names that an earlier run wrote, which are skipped.
            steps: of the training, for the metadata.

        Returns:
            Accuracies by name, as JSON, of what was written; an empty list where nothing is held out.
        """
        clip = self.original.clip
        vanilla = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
        trained = folded(self.model.clip, vanilla)
        made: dict[str, Any] = {}
        for name, share in self.shares.items():
            if name in done or (name == "vanilla" and measure is None):
                continue
            clip.load_state_dict({key: _mixture(vanilla[key], trained[key], share) for key in vanilla})
            if name != "vanilla" and self.settings.objective.learns and self.model.prompts is not None:
                self.original.add_prompts(self.model.prompts.deployed())  # methods that learn prompts have no mixtures
            made[name] = [] if measure is None else [list(counts) for counts in measure(self.original)]
            if self.processes.is_main and name != "vanilla":
                folder = self.folder.out if name == "result" else self.folder.out / name
                self._save(folder, {"part": name, "steps": steps, "mix": share, "held_out": dict(made)})
            self.processes.wait()
        return made

    def _save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes ``original`` with its present weights and the normalisation that they were trained with."""
        mean, std = statistics(self.original, self.settings.normalization)
        self.original.preprocess_cfg |= {"mean": list(mean), "std": list(std)}
        metadata = {
            "method": self.settings.method,
            "made_by": "vlmdefend train",
            "settings": self.settings.model_dump(mode="json"),
        }
        save_folder(self.original, folder, metadata | self.origin | facts, beside=(TRAINING,))


def _mixture(vanilla: Tensor, trained: Tensor, share: float) -> Tensor:
    """Returns ``(1 - share) vanilla + share trained`` (Wortsman et al. 2022, WiSE-FT), exact to the bit at 0 and 1."""
    if share in (0.0, 1.0) or not vanilla.is_floating_point():
        return trained if share else vanilla
    return vanilla.lerp(trained, share)
