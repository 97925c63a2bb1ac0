"""Model names: those that exist, the forms that a user may type, and the model that a name stands for."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmdefend.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from vlmdefend.models.clip.build import ModelSource
    from vlmdefend.models.clip.vision_language import VisionLanguageModel

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {
    "tiny-vit": "a toy vision transformer that comes with the package: no download",
    "tiny-rn": "a toy CLIP ResNet that comes with the package: no download",
}
OPENAI = {  # OpenAI's spelling -> open_clip's architecture
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
    "RN50": "RN50",
    "RN101": "RN101",
    "RN50x4": "RN50x4",
    "RN50x16": "RN50x16",
    "RN50x64": "RN50x64",
}
LOCAL, HUB = "local-dir:", "hf-hub:"


class ListedModel(NamedTuple):
    """One line of ``vlmdefend list models``."""

    name: str
    summary: str
    where: str  # "embedded", "hub", "your folder"


def model_names() -> list[str]:
    """Embedded models, OpenAI's names and open_clip's architectures (which want ``:TAG``); imports no torch."""
    return [*EMBEDDED, *OPENAI, *sorted(set(architectures()) - set(OPENAI))]


def listed_models(*, every_pair: bool = False) -> list[ListedModel]:
    """Returns the lines of ``list models``; with ``every_pair`` also each ``ARCH:TAG`` of open_clip (seconds)."""
    lines = [ListedModel(name, summary, "embedded") for name, summary in EMBEDDED.items()]
    lines += [ListedModel(name, "OpenAI's CLIP, its weights and QuickGELU", "hub") for name in OPENAI]
    if every_pair:
        import open_clip

        lines += [
            ListedModel(f"{arch}:{tag}", f"open_clip's {arch} with weights {tag}", "hub")
            for arch, tag in open_clip.list_pretrained()
            if not arch.endswith("-quickgelu")  # the same weights: ARCH:TAG already means the right activation
        ]
    else:
        lines.append(
            ListedModel(
                "ARCH:TAG", f"any weights that open_clip lists for its {len(architectures())} architectures", "hub"
            )
        )
    lines.append(ListedModel("hf-hub:ORG/NAME", "a repository in open_clip's format", "hub"))
    lines.append(
        ListedModel("local-dir:PATH", "a folder in open_clip's format, or a classifier of urda-train", "your folder")
    )
    return lines


@cache
def architectures() -> tuple[str, ...]:
    """Names of open_clip's architectures, read from its file names without importing it."""
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    return tuple(sorted(file.stem for folder in folders or [] for file in Path(folder).glob("model_configs/*.json")))


def load_model(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
) -> VisionLanguageModel:
    """Returns the model that ``name`` stands for, frozen and on its device.

    Args:
        name: ``tiny-vit``, ``tiny-rn``; OpenAI's spelling (``ViT-B/32``: OpenAI's weights, QuickGELU);
            ``ARCH:TAG`` of open_clip; ``hf-hub:ORG/NAME``; ``local-dir:PATH``.
        weights: a local file whose weights are used instead: of the whole model, or of the image tower alone
            (the text tower is then the named model's); or the prompts that an author published, which are added to
            the named model's own weights. With it, ``ARCH`` needs no tag.
        device: default: the GPU if there is one.
        cache_dir: where downloads are kept; default: the hub's cache.

    Raises:
        UnknownName: with the nearest names.
        UserError: weights that cannot be had, are damaged, or do not fit; a folder that is not a model.
    """
    from vlmdefend.models.classifier.folder import load_classifier
    from vlmdefend.models.clip.build import assemble

    folder = _classifier_folder(name.strip())
    if folder is not None:
        if weights is not None:
            raise UserError(
                f"{name} is a classifier with a head, whose weights lie in its folder; leave --weights out."
            )
        classifier: VisionLanguageModel = load_classifier(name.strip(), folder, device)
        return classifier
    blueprint = _blueprint(name.strip(), has_weights=weights is not None, cache_dir=cache_dir)
    return assemble(blueprint, weights=weights, device=device)


def check_name(name: str, *, weights: str | Path | None = None) -> None:
    """Refuses what :func:`load_model` would refuse, as far as that is known without loading or downloading.

    Raises:
        UnknownName: with the nearest names.
        UserError: an architecture without a tag, a folder that is not a model, weights that are no file.
    """
    from vlmdefend.models.weights.checkpoint import check_weights_file, find_weights

    if weights is not None:
        check_weights_file(Path(weights).expanduser())
    folder = _classifier_folder(name.strip())
    if folder is not None:
        from vlmdefend.models.classifier.folder import CLASSIFIER_WEIGHTS, read_classifier_config

        read_classifier_config(folder)
        check_weights_file(folder / CLASSIFIER_WEIGHTS)
    elif not name.strip().startswith(HUB):
        blueprint = _blueprint(name.strip(), has_weights=weights is not None, cache_dir=None)
        if weights is None and blueprint.folder is not None:
            check_weights_file(find_weights(blueprint.folder))


def _classifier_folder(name: str) -> Path | None:
    """Returns the folder, if the name is that of a classifier with a head."""
    from vlmdefend.models.classifier.folder import is_classifier_folder

    folder = Path(name.removeprefix(LOCAL)).expanduser()
    return folder if name.startswith(LOCAL) and is_classifier_folder(folder) else None


def _blueprint(name: str, *, has_weights: bool, cache_dir: str | Path | None) -> ModelSource:
    from vlmdefend.models.clip import build

    if name in EMBEDDED:
        return build.from_folder(name, ASSETS / name)
    if name.startswith(LOCAL):
        return build.from_folder(name, Path(name.removeprefix(LOCAL)).expanduser())
    if name.startswith(HUB):
        return build.from_hub(name, name.removeprefix(HUB), cache_dir)
    written, _, tag = name.partition(":")
    architecture = OPENAI.get(written, written).replace("/", "-")
    if architecture not in architectures():
        raise _unknown(name)
    if not tag and written in OPENAI:
        tag = "openai"
    known = build.tags(architecture)
    if tag and tag.lower().replace("-", "_") not in known:
        raise did_you_mean(f"tag of {architecture}", tag, known, hint="`vlmdefend list models --all` shows every pair.")
    if not tag and not has_weights:
        choice = f"choose one as {architecture}:TAG from {', '.join(known)}, or give" if known else "give"
        raise UserError(f"{name!r} is an architecture without weights; {choice} a local file with --weights FILE.")
    return build.from_open_clip(name, architecture, tag, cache_dir)


def _unknown(name: str) -> UserError:
    if Path(name).expanduser().is_dir():
        return UserError(f"unknown model {name!r}; a folder is written local-dir:{name}.")
    return did_you_mean("model", name, model_names())
