"""A loaded vision-language model: the open_clip module, its tokenizer and its preprocessing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vlmdefend.data.prompts import templates_for
from vlmdefend.errors import UserError
from vlmdefend.models.clip.contiguous import use_contiguous_attention
from vlmdefend.models.prompts.context import ContextReader
from vlmdefend.models.prompts.learned_prompts import PROMPTS_KEY, LearnedPrompts, attach
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.models.zero_shot.text_side import TextSide

Normalization = Literal["model", "clip", "imagenet"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROMPTS_AT_ONCE = 256


class VisionLanguageModel:
    """A model by name, frozen: evaluation mode, float32, no parameter requires a gradient.

    Args:
        name: what records and tables call it.
        clip: an open_clip model with a preprocessing configuration; changed in place as described above.
        tokenizer: list of texts -> (N, L) int64.
        model_cfg: open_clip's ``model_cfg``, from which the architecture can be built again.
        device: where it lives from now on; None leaves it where it is.

    Raises:
        UserError: the model's images are not square.
    """

    def __init__(
        self,
        name: str,
        clip: Any,
        tokenizer: Callable[[list[str]], Tensor],
        model_cfg: dict[str, Any],
        device: str | torch.device | None = None,
    ) -> None:
        self.name = name
        self.clip: Any = clip.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        use_contiguous_attention(self.clip)
        self.tokenizer = tokenizer
        self.model_cfg = model_cfg
        self.preprocess_cfg: dict[str, Any] = dict(self.clip.visual.preprocess_cfg)
        self.image_size = _side(name, self.preprocess_cfg["size"])
        self.mean: tuple[float, ...] = tuple(self.preprocess_cfg["mean"])
        self.std: tuple[float, ...] = tuple(self.preprocess_cfg["std"])
        bilinear = self.preprocess_cfg["interpolation"] == "bilinear"
        self.interpolation: Literal["bicubic", "bilinear"] = "bilinear" if bilinear else "bicubic"
        self._hash: tuple[object, str] | None = None
        self._texts: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[object, Tensor]] = {}
        self._readers: dict[tuple[str, ...], ContextReader] = {}

    def __repr__(self) -> str:
        return f"VisionLanguageModel({self.name!r}, image_size={self.image_size}, device={str(self.device)!r})"

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        device: torch.device = self.clip.logit_scale.device
        return device

    @property
    def weights_hash(self) -> str:
        """16 hex digits over names, types, shapes and bytes of all weights; recomputed after they changed."""
        state = self.clip.state_dict()
        version = _version(state.values())
        if self._hash is None or self._hash[0] != version:
            self._hash = version, _hash(state)
        return self._hash[1]

    @property
    def prompts(self) -> LearnedPrompts | None:
        """The learned prompts; None if the model has none."""
        return getattr(self.clip, "prompts", None)

    @property
    def context(self) -> Tensor | None:
        """The (M, W), or (C, M, W) per class, learned vectors that replace the user's templates; None if there are
        none.
        """
        return None if self.prompts is None else self.prompts.context

    @property
    def learned_prompt(self) -> str:
        """A description of the learned context, ``16 learned vectors``; empty if templates are read."""
        if self.context is None:
            return ""
        return f"{self.context.shape[-2]} learned vectors{' of each class' if self.context.dim() == 3 else ''}"

    def add_prompts(self, prompts: LearnedPrompts, source: str = "these prompts") -> None:
        """Makes learned prompts part of the model.

        Raises:
            UserError: it has some, or they do not fit; names the ``source``.
        """
        attach(self.clip, prompts, source)
        self.model_cfg = {**self.model_cfg, PROMPTS_KEY: prompts.config}
        self._texts.clear()

    def reader(self, class_names: Sequence[str]) -> ContextReader:
        """Returns class features as a function of the context, for a model that has one.

        Raises:
            UserError: contexts of other classes, or a prompt that the text tower cannot read.
        """
        key, prompts = tuple(class_names), self.prompts
        assert prompts is not None
        prompts.check_classes(key)
        if key not in self._readers:
            self._readers[key] = ContextReader(self.clip, self.tokenizer, key, prompts.template, prompts.length)
        return self._readers[key]

    def text_features(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Returns (C, D) unit float32 rows, averaged over the templates as open_clip does.

        Each prompt is encoded and normalised; a class is the normalised mean over templates, which hold ``{c}``
        where the class name goes. Computed once per (classes, templates), and again only if the weights outside
        the image tower changed. Of a model with a learned context, the context takes the place of all templates.

        Raises:
            UserError: no classes, no templates, or a template without ``{c}``; contexts that were learned for other
                classes.
        """
        _check_prompts(class_names, templates)
        key = tuple(class_names), tuple(templates)
        version = _version(v for k, v in self.clip.state_dict().items() if not k.startswith("visual."))
        if key not in self._texts or self._texts[key][0] != version:
            self._texts[key] = version, self._encode(*key)
        return self._texts[key][1]

    def blank_text_features(self) -> Tensor:
        """Returns the (D,) unit mean embedding of OpenAI's 80 templates without a class ("a photo of a .").

        Of a model with a learned context: of the context with nothing after it.
        """
        return self.text_features(("",), templates_for("imagenet"))[0]

    def zero_shot(
        self,
        class_names: Sequence[str],
        templates: Sequence[str],
        *,
        normalization: Normalization = "model",
        resize_inside: bool = False,
    ) -> ZeroShotClassifier:
        """Returns a zero-shot classifier; ``normalization`` is the model's own, or the one of a paper's protocol."""
        mean, std = {
            "model": (self.mean, self.std),
            "clip": (CLIP_MEAN, CLIP_STD),
            "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
        }[normalization]
        return ZeroShotClassifier(
            self.clip,
            self.text_features(class_names, templates),
            mean=mean,
            std=std,
            image_size=self.image_size,
            resize_inside=resize_inside,
            blank=self.blank_text_features,
            text_side=lambda classifier: self._text_side(classifier, class_names, templates),
        )

    def _text_side(
        self, classifier: ZeroShotClassifier, class_names: Sequence[str], templates: Sequence[str]
    ) -> TextSide:
        if self.prompts is None or self.context is None:
            return TextSide(classifier, self.tokenizer, class_names, templates)
        if self.context.dim() == 3:
            raise UserError(
                f"{self.name}: attacks on the prompts and defenses that tune them change one prompt for all classes, "
                "and this model has learned one for each; use others, or a model with a context for all classes."
            )
        return TextSide(classifier, self.tokenizer, class_names, (self.prompts.template,), self.context)

    @staticmethod
    def prompts_hash(class_names: Sequence[str], templates: Sequence[str]) -> str:
        """16 hex digits over class names and templates, in order."""
        text = json.dumps([list(class_names), list(templates)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _encode(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        import open_clip

        if self.context is not None:
            with torch.no_grad():
                return self.reader(class_names)(self.context)
        columns: Tensor = open_clip.build_zero_shot_classifier(
            self.clip,
            self.tokenizer,
            class_names,
            [lambda c, t=template: t.replace("{c}", c) for template in templates],
            num_classes_per_batch=max(1, PROMPTS_AT_ONCE // len(templates)),
            device=self.device,
        )
        return columns.T.contiguous()


def _check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    if not class_names:
        raise UserError("the class list is empty; zero-shot classification needs at least one class name.")
    if not templates:
        raise UserError("no prompt template was given; write one with {c} for the class, such as 'a photo of a {c}.'.")
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"prompt template {template!r} has no {{c}}; write {{c}} where the class name goes.")


def _side(name: str, size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{name} takes {size} images; only models with square images are supported.")
    return int(sides.pop())


def _version(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Returns a value that changes when a tensor is written in place or replaced (not through ``.data``)."""
    return tuple((t.data_ptr(), t._version) for t in tensors)


def _hash(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
