"""The common base of `train` and `distill`: training images, a held-out part, and accuracy on that part."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Generic, TypeVar

from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.training.clip.held_out import accuracies
from vlmdefend.training.job import JobResult, TrainingJob
from vlmdefend.training.loop.data import TrainingImages, hold_out
from vlmdefend.training.loop.results import Accuracies
from vlmdefend.training.settings.clip_settings import ClipSettings
from vlmdefend.training.settings.run_settings import lines_of
from vlmdefend.types import Batch, Pipeline

Settings = TypeVar("Settings", bound=ClipSettings)
Result = TypeVar("Result", bound=JobResult)


class ClipJob(TrainingJob[Settings, Result], Generic[Settings, Result]):
    """A job that trains a CLIP on one data set and measures it on held-out images of the set."""

    def check_inputs(self) -> None:
        """Refuses BatchNorm in training mode if the batch is split over processes or micro-batches."""
        if self.settings.batch_norm == "train" and (self.processes.count > 1 or self.settings.micro_batch):
            raise UserError(
                "--batch-norm train needs the whole batch in one forward: run one process without --micro-batch, or "
                "give --batch-norm frozen."
            )

    def open_images(self, model: VisionLanguageModel) -> None:
        """Opens the data set, splits off the held-out images, and sets the transform to the model's image size."""
        settings = self.settings
        classes = None if settings.classes is None else lines_of(settings.classes)
        found = load_dataset(
            settings.dataset, settings.split, limit=settings.limit, root=settings.root, classes=classes
        )
        self.images, self.held_out = hold_out(found, min(settings.held_out, len(found) // 5), settings.seed)
        size = None if settings.pixel_space == "native" else model.image_size
        self.transform = PixelTransform(size, model.interpolation)

    @cached_property
    def training_images(self) -> TrainingImages:
        """The images that are trained on, decoded when a batch needs them."""
        return TrainingImages(self.images, self.transform, skip_bad=self.settings.skip_bad)

    @cached_property
    def held_out_batch(self) -> Batch | None:
        """The held-out images as one batch; None: nothing is held out."""
        if not len(self.held_out):
            return None
        reader = TrainingImages(self.held_out, self.transform, skip_bad=self.settings.skip_bad)
        return reader.batch(range(len(self.held_out)))

    def held_out_accuracies(self, pipeline: Pipeline) -> Accuracies:
        """Returns clean and PGD-10 accuracy of a pipeline on the held-out images, which must not be empty."""
        assert self.held_out_batch is not None
        return accuracies(pipeline, self.held_out_batch, self.settings.radius, self.settings.seed, self.processes)

    def image_facts(self) -> dict[str, Any]:
        """Returns hashes of the ids of the training and held-out images, for :meth:`facts`."""
        return {"training_images": self.images.ids_hash, "held_out_images": self.held_out.ids_hash}
