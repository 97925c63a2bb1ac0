"""Prompt templates per data set: those CLIP published, with ``{c}`` for the class name.

Sources: the prompt lists of the CLIP paper (Radford et al. 2021) and, where CLIP has none, CLIP_benchmark's.
"""

from __future__ import annotations

import importlib

DEFAULT = ("a photo of a {c}.",)

IMAGENET_FAMILY = frozenset(("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "tiny-imagenet"))
"""Sets that take OpenAI's 80 ImageNet templates."""

_CIFAR = tuple(
    text.format(article=article, c="{c}")
    for article in ("a", "the")
    for text in (
        "a photo of {article} {c}.",
        "a blurry photo of {article} {c}.",
        "a black and white photo of {article} {c}.",
        "a low contrast photo of {article} {c}.",
        "a high contrast photo of {article} {c}.",
        "a bad photo of {article} {c}.",
        "a good photo of {article} {c}.",
        "a photo of {article} small {c}.",
        "a photo of {article} big {c}.",
    )
)

_TEXTURES = tuple(
    f"a photo of {article} {{c}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
)

_DIGIT = ('a photo of the number: "{c}".',)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "stl10": (
        "a photo of a {c}.",
        "a photo of the {c}.",
    ),
    "sun397": (
        "a photo of a {c}.",
        "a photo of the {c}.",
    ),
    "food101": ("a photo of {c}, a type of food.",),
    "oxford-pets": ("a photo of a {c}, a type of pet.",),
    "flowers102": ("a photo of a {c}, a type of flower.",),
    "dtd": _TEXTURES,
    "eurosat": (
        "a centered satellite photo of {c}.",
        "a centered satellite photo of a {c}.",
        "a centered satellite photo of the {c}.",
    ),
    "fgvc-aircraft": (
        "a photo of a {c}, a type of aircraft.",
        "a photo of the {c}, a type of aircraft.",
    ),
    "caltech101": (
        "a photo of a {c}.",
        "a painting of a {c}.",
        "a plastic {c}.",
        "a sculpture of a {c}.",
        "a sketch of a {c}.",
        "a tattoo of a {c}.",
        "a toy {c}.",
        "a rendition of a {c}.",
        "a embroidered {c}.",
        "a cartoon {c}.",
        "a {c} in a video game.",
        "a plushie {c}.",
        "a origami {c}.",
        "art of a {c}.",
        "graffiti of a {c}.",
        "a drawing of a {c}.",
        "a doodle of a {c}.",
        "a photo of the {c}.",
        "a painting of the {c}.",
        "the plastic {c}.",
        "a sculpture of the {c}.",
        "a sketch of the {c}.",
        "a tattoo of the {c}.",
        "the toy {c}.",
        "a rendition of the {c}.",
        "the embroidered {c}.",
        "the cartoon {c}.",
        "the {c} in a video game.",
        "the plushie {c}.",
        "the origami {c}.",
        "art of the {c}.",
        "graffiti of the {c}.",
        "a drawing of the {c}.",
        "a doodle of the {c}.",
    ),
    "stanford-cars": (
        "a photo of a {c}.",
        "a photo of the {c}.",
        "a photo of my {c}.",
        "i love my {c}!",
        "a photo of my dirty {c}.",
        "a photo of my clean {c}.",
        "a photo of my new {c}.",
        "a photo of my old {c}.",
    ),
    "pcam": ("this is a photo of {c}",),
    "country211": (
        "a photo i took in {c}.",
        "a photo i took while visiting {c}.",
        "a photo from my home country of {c}.",
        "a photo from my visit to {c}.",
        "a photo showing the country of {c}.",
    ),
    "gtsrb": (
        'a zoomed in photo of a "{c}" traffic sign.',
        'a centered photo of a "{c}" traffic sign.',
        'a close up photo of a "{c}" traffic sign.',
    ),
    "svhn": (
        "a photo of the number {c} written on a sign",
        "an outdoor house number {c}",
        "the number {c} in the center of the image",
    ),
    "mnist-full": _DIGIT,
    "mnist": _DIGIT,
    "uci-digits": _DIGIT,
}


def templates_for(name: str) -> tuple[str, ...]:
    """Returns the published templates of the set called ``name``, or the plain ``a photo of a {c}.``."""
    if name in IMAGENET_FAMILY:
        written = importlib.import_module("open_clip.zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{c}") for template in written)
    return TEMPLATES.get(name, DEFAULT)
