"""Target and proxy of a distillation, with one class list, and the model folder of the trained target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.clip.folder import save_folder
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.weights.checkpoint import find_weights, read_weights
from vlmdefend.training.clip.classifier import BatchNormPolicy, TrainedClassifier, choose_trained, statistics
from vlmdefend.training.clip.student import AutocastTeacher, ClipStudent
from vlmdefend.training.loop.folder import PIVOT, TRAINING
from vlmdefend.training.loop.processes import Processes
from vlmdefend.training.loop.weight_averages import Weights
from vlmdefend.training.settings.distill_settings import DistillSettings
from vlmdefend.types import Pipeline


@dataclass
class DistillationModels:
    """Loads the target and the proxy that the settings name; both predict over the same class list.

    Args:
        settings: of the run.
        processes: of the run; they choose the device.

    Raises:
        UserError: weights that cannot be loaded, or that are the same in both models.
    """

    settings: DistillSettings
    processes: Processes

    def __post_init__(self) -> None:
        settings, device = self.settings, self.processes.device
        self.target = load_model(settings.target, weights=settings.weights, device=device)
        self.proxy = load_model(settings.proxy, weights=settings.proxy_weights, device=device)
        self.hashes = {"target_weights": self.target.weights_hash, "proxy_weights": self.proxy.weights_hash}
        self.class_names: Sequence[str] = ()
        if self.target.weights_hash == self.proxy.weights_hash and not settings.force:
            raise UserError(
                f"{settings.target} and {settings.proxy} hold the same weights: a model cannot learn from itself; "
                "give a proxy of another architecture, or --force to run it anyway."
            )

    def student(self) -> ClipStudent:
        """Returns the target as student, with the parameters that train."""
        classifier = self._classifier(self.target, self.settings.batch_norm)
        return ClipStudent(classifier, choose_trained(classifier, self.settings.trains), self.processes)

    def teacher(self) -> AutocastTeacher:
        """Returns the frozen proxy as teacher."""
        return AutocastTeacher(self._classifier(self.proxy), self.processes)

    def deployed(self, model: VisionLanguageModel) -> Pipeline:
        """Returns the pipeline of a model for measurement, with its own logit scale, which attacks depend on."""
        return model.zero_shot(
            self.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            resize_inside=self._resizes(model),
        )

    def read_pivot(self, path: Path) -> Weights:
        """Returns the pivot weights of a file or model folder, by the names of the trained parameters.

        Raises:
            UserError: a weight is missing or of another shape.
        """
        state = read_weights(find_weights(path) if path.is_dir() else path)
        found = {}
        for name, weight in self.student().weights().items():
            value = state.get(name, state.get(name.removeprefix("visual.")))
            if value is None or value.shape != weight.shape:
                how = "missing" if value is None else f"of shape {tuple(value.shape)}, not {tuple(weight.shape)}"
                raise UserError(f"--pivot {path}: {name} is {how}; give the pivot of a run with the same target.")
            found[name] = value.to(weight.device, weight.dtype)
        return found

    def save_target(self, folder: Path, facts: dict[str, Any]) -> None:
        """Writes the target with its present weights and the normalisation that they were trained with."""
        mean, std = statistics(self.target, self.settings.normalization)
        self.target.preprocess_cfg |= {"mean": list(mean), "std": list(std)}
        metadata = {
            "method": "hpt-gpd",
            "made_by": "vlmdefend distill",
            "settings": self.settings.model_dump(mode="json"),
            "target_weights_hash": self.hashes["target_weights"],
            "proxy_weights_hash": self.hashes["proxy_weights"],
            "class_names": list(self.class_names),
        }
        save_folder(self.target, folder, metadata | facts, beside=(TRAINING, PIVOT))

    def _classifier(self, model: VisionLanguageModel, batch_norm: BatchNormPolicy = "frozen") -> TrainedClassifier:
        return TrainedClassifier(
            model,
            self.class_names,
            self.settings.templates,
            normalization=self.settings.normalization,
            logit_scale=self.settings.scale,
            resize_inside=self._resizes(model),
            batch_norm=batch_norm,
        )

    def _resizes(self, model: VisionLanguageModel) -> bool:
        return self.settings.pixel_space == "native" or model.image_size != self.target.image_size
