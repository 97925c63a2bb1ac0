"""The frozen teacher of step 2: an adapted classifier, a CLIP, a timm model, or any Python callable."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.attacks.view import chunks
from vlmdefend.errors import UserError
from vlmdefend.models.classifier.backbones import TIMM
from vlmdefend.models.classifier.classifier import ClassifierModel, HeadPipeline
from vlmdefend.models.classifier.timm_network import TimmNetwork, load_timm
from vlmdefend.models.clip.vision_language import VisionLanguageModel
from vlmdefend.models.names import load_model
from vlmdefend.rng import ImageRng
from vlmdefend.training.adaptation.data import image_id
from vlmdefend.training.loop.data import TrainingImages
from vlmdefend.types import Batch, Outputs

WIDTH = 64
PYTHON = "python:"


class FrozenTeacher:
    """A frozen model; satisfies :class:`~vlmdefend.defenses.adaptation.base.BatchTeacher`.

    Args:
        name: for messages.
        outputs: (B, 3, S, S) in [0, 1] -> outputs.
        weights_hash: changes with the weights; None: unknown, as of a callable.
        model: the loaded model, where there is one.
    """

    def __init__(
        self,
        name: str,
        outputs: Callable[[Tensor], Outputs],
        weights_hash: Callable[[], str] | None = None,
        model: VisionLanguageModel | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.assumed = ""  # what could not be checked about it, in words
        self._outputs, self._hash = outputs, weights_hash
        self._seen: dict[str, tuple[Tensor, Tensor | None]] = {}

    @property
    def weights_hash(self) -> str:
        """Returns a hash of its present weights; empty where they cannot be reached."""
        return "" if self._hash is None else self._hash()

    def __call__(self, images: Tensor) -> Outputs:
        """Predicts without gradient, in float32."""
        with torch.no_grad():
            found = self._outputs(images)
        return Outputs(found.logits.float(), None if found.features is None else found.features.float())

    def of(self, batch: Batch) -> Outputs:
        """Returns the outputs at images of the set, from the cache where there is one."""
        names = [image_id(name) for name in batch.ids]
        if not self._seen or any(name not in self._seen for name in names):
            return self(batch.images)
        rows = [self._seen[name] for name in names]
        features = [row[1] for row in rows if row[1] is not None]
        logits = torch.stack([row[0] for row in rows])
        return Outputs(logits, torch.stack(features) if len(features) == len(rows) else None)

    def cache_outputs(self, images: TrainingImages, device: torch.device) -> None:
        """Keep the outputs at every image, in batches of the set's order: a resumed run gets the same bits."""
        for part in chunks(len(images), WIDTH):
            batch = images.batch(part.tolist())
            found = self(batch.images.to(device))
            for i, name in enumerate(batch.ids):
                self._seen[name] = found.logits[i], None if found.features is None else found.features[i]


def as_teacher(model: ClassifierModel, class_names: Sequence[str], name: str = "") -> FrozenTeacher:
    """Returns a classifier with a head as a teacher."""
    pipeline: HeadPipeline = model.zero_shot(class_names, (), resize_inside=True)
    return FrozenTeacher(name or model.name, pipeline, lambda: model.weights_hash, model)


def load_teacher(
    name: str, class_names: Sequence[str], templates: Sequence[str], device: torch.device
) -> FrozenTeacher:
    """Loads the teacher that ``name`` stands for.

    Args:
        name: ``local-dir:PATH`` of a classifier or a CLIP; any other CLIP's name (its classes are then text);
            ``timm:NAME``, ``timm:NAME@FILE`` or ``timm:local-dir:FOLDER`` with these classes; or
            ``python:MODULE:FUNCTION``, called with the class names, which returns a callable from (B, 3, H, W) pixels
            in [0, 1] to logits, or to (logits, features).
        class_names: in the order of the logits.
        templates: prompts of a CLIP.
        device: where it lives.

    Raises:
        UserError: no such model or function, or another number of classes.
    """
    if name.startswith(PYTHON):
        return FrozenTeacher(name, _from_python(name, class_names))
    if name.startswith(TIMM):
        return _timm_classifier(name, class_names, device)
    model = load_model(name, device=device)
    if isinstance(model, ClassifierModel):
        return as_teacher(model, class_names)
    pipeline = model.zero_shot(class_names, templates, resize_inside=True)
    return FrozenTeacher(name, lambda images: pipeline(images, None), lambda: model.weights_hash, model)


def _timm_classifier(name: str, class_names: Sequence[str], device: torch.device) -> FrozenTeacher:
    found = load_timm(name.removeprefix(TIMM), pretrained=True, head=True)
    network = found.network.requires_grad_(False).to(device)
    order, size = _order(name, found, class_names), found.image_size
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (found.mean, found.std))

    def outputs(images: Tensor) -> Outputs:
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=size < images.shape[-1])
        maps = network.forward_features((images - mean) / std)
        return Outputs(network.forward_head(maps)[:, order], network.forward_head(maps, pre_logits=True))

    teacher = FrozenTeacher(name, outputs, lambda: _hash(network.state_dict()))
    if not found.class_names:
        teacher.assumed = (
            f"{name} does not name its classes; its {len(order)} logits are taken in the order of the source's, "
            f"{', '.join(class_names[:3])} ..."
        )
    return teacher


def _order(name: str, found: TimmNetwork, class_names: Sequence[str]) -> list[int]:
    """Returns the index of the network's logit for each class of the data."""
    own, count = found.class_names, int(found.network.num_classes)
    advice = f"adapt it first: --backbone {name}."
    if count != len(class_names):
        raise UserError(f"--teacher {name}: has {count} classes where the data have {len(class_names)}; {advice}")
    if not own:
        return list(range(count))
    if sorted(own) != sorted(class_names):
        apart = sorted(set(own) ^ set(class_names))[0]
        raise UserError(
            f"--teacher {name}: was trained for {', '.join(own[:3])} ..., and {apart!r} is among its classes or the "
            f"data's only; {advice}"
        )
    return [own.index(class_name) for class_name in class_names]


def _from_python(name: str, class_names: Sequence[str]) -> Callable[[Tensor], Outputs]:
    module, colon, function = name.removeprefix(PYTHON).rpartition(":")
    try:
        made = getattr(importlib.import_module(module), function)(tuple(class_names)) if colon else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"--teacher {name}: cannot be imported ({error}); write python:MODULE:FUNCTION.") from None
    except TypeError as error:
        raise UserError(f"--teacher {name}: does not take the class names ({error}); give it that argument.") from None
    if not callable(made):
        raise UserError(
            f"--teacher {name}: write python:MODULE:FUNCTION, a function that takes the class names and returns a "
            "callable from images to logits."
        )

    def outputs(images: Tensor) -> Outputs:
        found: Any = made(images)
        answer = (
            found if isinstance(found, Outputs) else Outputs(*found) if isinstance(found, tuple) else Outputs(found)
        )
        if answer.logits.shape != (len(images), len(class_names)):
            raise UserError(
                f"--teacher {name}: returned {tuple(answer.logits.shape)} for {len(images)} images of "
                f"{len(class_names)} classes; return ({len(images)}, {len(class_names)}) logits."
            )
        return answer

    return outputs


def _hash(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def predictions(teacher: FrozenTeacher, batch: Batch) -> Tensor:
    """Returns (B,) classes that the teacher predicts for the images of a batch."""
    parts = [teacher(batch.images[part]).logits.argmax(dim=1) for part in chunks(len(batch.ids), WIDTH)]
    return torch.cat(parts)


class TeacherPipeline:
    """A teacher as a :class:`vlmdefend.types.Pipeline`, with gradients to the pixels."""

    stochastic: bool = False

    def __init__(self, teacher: FrozenTeacher, classes: int) -> None:
        self.teacher, self.num_classes = teacher, classes

    def __call__(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
        """Pixels in [0, 1] to outputs."""
        return self.teacher._outputs(images)
