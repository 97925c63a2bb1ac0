"""Diffusion models of image embeddings given a text, for CLIPure-Diff: the interface, and how one is loaded."""

from __future__ import annotations

import importlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.types import EmbeddingPipeline

BLANK = "a photo of a ."
STEPS = 1000


class TextCondition(NamedTuple):
    """The text embedding that conditions a prior: a text that names no class."""

    features: Tensor  # (D,) unit: the mean text embedding of blank templates, or of classes
    pooled: Tensor | None = None  # (D,) the embedding of BLANK as the tower gives it, not normalised
    states: Tensor | None = None  # (L, W) the tower's state of each token of BLANK
    mask: Tensor | None = None  # (L,) bool: start, words and end


class DiffusionPrior(Protocol):
    """A model of noisy image embeddings, as in DALL-E 2 (Ramesh et al. 2022, section 2.2)."""

    signal: Tensor  # (T,) what is left of the embedding's variance after each step, "alpha bar"
    reads_states: bool  # True if it needs more of the condition than ``features``

    def prepared(self, embeddings: Tensor) -> Tensor:
        """Scales (B, D) image embeddings to those that the prior was trained on."""
        ...

    def noise(self, noisy: Tensor, time: Tensor, condition: TextCondition) -> Tensor:
        """Predicts the noise in (B, D) noisy embeddings at (B,) steps."""
        ...


def denoising_loss(
    prior: DiffusionPrior, embeddings: Tensor, time: Tensor, noise: Tensor, condition: TextCondition
) -> Tensor:
    """Returns (B,) mean squared errors of the predicted noise for (B, D) embeddings.

    Priors that predict the embedding, as DALL-E 2's, have this loss times a constant of the step.
    """
    left = prior.signal.to(embeddings)[time][:, None]
    noisy = left.sqrt() * prior.prepared(embeddings) + (1 - left).sqrt() * noise
    found: Tensor = (prior.noise(noisy, time, condition) - noise).square().mean(dim=1)
    return found


def cosine_signal() -> Tensor:
    """Returns (1000,): the cosine schedule (Nichol & Dhariwal 2021, equation 17) of DALL-E 2-like priors."""
    place = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    curve = ((place + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - (1 - curve[1:] / curve[:-1]).clamp_max(0.999)).cumprod(dim=0).float()


class Gaussian:
    """A prior of normal embeddings around the text's, with unit variance: no weights, the exact noise.

    On embeddings of length sqrt(D), as in DALL-E 2, x = mu + standard normal; E[n | noisy] in closed form.
    """

    reads_states = False

    def __init__(self) -> None:
        self.signal = cosine_signal()

    def prepared(self, embeddings: Tensor) -> Tensor:
        """Returns unit vectors times sqrt(D)."""
        return F.normalize(embeddings, dim=1) * math.sqrt(embeddings.shape[1])

    def noise(self, noisy: Tensor, time: Tensor, condition: TextCondition) -> Tensor:
        """Returns the exact expected noise."""
        left = self.signal.to(noisy)[time][:, None]
        return (1 - left).sqrt() * (noisy - left.sqrt() * math.sqrt(noisy.shape[1]) * condition.features)


class PriorTransformer:
    """A prior in diffusers' format (Karlo's for CLIP ViT-L/14, Kandinsky's), which predicts the embedding itself.

    Args:
        network: ``diffusers.PriorTransformer``, frozen.
    """

    def __init__(self, network: Any) -> None:
        self.network, self.signal = network, cosine_signal()
        self.reads_states = network.encoder_hidden_states_proj is not None

    def prepared(self, embeddings: Tensor) -> Tensor:
        """Normalises by the mean and deviation that come with the weights.

        Raises:
            UserError: a prior for embeddings of another size.
        """
        size = self.network.config.embedding_dim
        if embeddings.shape[1] != size:
            raise UserError(
                f"clipure_diff: the prior is for embeddings of {size} numbers, the model gives {embeddings.shape[1]}; "
                "use the prior that was trained for this model."
            )
        scaled: Tensor = (embeddings - self.network.clip_mean) / self.network.clip_std
        return scaled

    def noise(self, noisy: Tensor, time: Tensor, condition: TextCondition) -> Tensor:
        """Returns the noise that the predicted embedding implies."""
        text = condition.features if condition.pooled is None else condition.pooled
        each: dict[str, Tensor] = {"proj_embedding": text.expand(len(noisy), -1)}
        if self.reads_states and condition.states is not None and condition.mask is not None:
            each["encoder_hidden_states"] = condition.states.expand(len(noisy), -1, -1)
            each["attention_mask"] = condition.mask.expand(len(noisy), -1)
        image = self.network(noisy, time, **each).predicted_image_embedding
        left = self.signal.to(noisy)[time][:, None]
        found: Tensor = (noisy - left.sqrt() * image) / (1 - left).sqrt()
        return found


@lru_cache(maxsize=2)  # weights of gigabytes, which every surrogate shares
def load_prior(text: str, device: torch.device) -> DiffusionPrior:
    """Loads ``gaussian``, ``python:MODULE:FUNCTION`` (called with the device), or a folder that diffusers wrote.

    Raises:
        UserError: what is missing, and what to do next.
    """
    if text == "gaussian":
        return Gaussian()
    if text.startswith("python:"):
        return _from_python(text, device)
    folder = Path(text).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(
            f"clipure_diff: prior={text} is neither gaussian, python:MODULE:FUNCTION, nor a folder that diffusers' "
            "PriorTransformer wrote (it has no config.json); give one of them."
        )
    try:
        from diffusers import PriorTransformer as Network
    except ImportError:
        raise UserError(f"clipure_diff: prior={text} is read by diffusers; pip install diffusers.") from None
    try:
        network = Network.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(
            f"clipure_diff: prior={text} cannot be read ({reason}); it takes a folder with config.json and "
            "diffusion_pytorch_model.safetensors."
        ) from error
    return PriorTransformer(network.to(device=device, dtype=torch.float32).eval().requires_grad_(False))


def condition_of(model: EmbeddingPipeline, *, states: bool, classes: bool = False) -> TextCondition:
    """Returns the embedding of the text that names no class, from the model's own text tower.

    Args:
        states: also token by token.
        classes: its embedding is the mean of the classes' in place of the blank templates'.

    Raises:
        UserError: the model has no text tower, and it is needed.
    """
    text = F.normalize(model.text_features.mean(dim=0), dim=0) if classes else model.blank_features
    if text is None:
        raise UserError(
            "defense clipure_diff needs the text embedding of blank templates, which this model does not give; use "
            "anchor=classes, or a classifier built by VisionLanguageModel.zero_shot."
        )
    if not states:
        return TextCondition(text)
    side = getattr(model, "text_side", None)
    if side is None:
        raise UserError(
            "clipure_diff: this prior reads the text token by token, and the model's tower is out of reach."
        )
    tokens, pooled, known = side.states([BLANK])
    mask = torch.arange(tokens.shape[1], device=tokens.device) <= side.ends_of(tokens)[0]
    return TextCondition(text, None if classes else pooled[0], known[0], mask)


def _from_python(text: str, device: torch.device) -> DiffusionPrior:
    _, _, place = text.partition(":")
    module, _, function = place.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)(device)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(
            f"clipure_diff: prior={text}: {type(error).__name__}: {error}; give a module that Python can import and a "
            "function of it that takes the device and returns the prior."
        ) from error
    missing = [name for name in ("signal", "reads_states", "prepared", "noise") if not hasattr(made, name)]
    if missing:
        raise UserError(f"clipure_diff: prior={text} returned {type(made).__name__}, which has no {missing[0]}.")
    return cast(DiffusionPrior, made)
