"""Captions of a training batch: which texts it has, and which image each belongs to."""

from __future__ import annotations

import random

import torch
from open_clip import CLIP, SimpleTokenizer
from torch import Tensor, nn

from benchmarks.assets.pixels import ImageSet

# Prompts that people use for every set: the models must not fail on them for want of having seen the words.
COMMON_TEMPLATES = ["a photo of a {c}.", "This is a photo of a {c}", "a picture of a {c}.", "{c}"]


class Captions:
    """Draws captions from templates over class names and emoji names, as tokens of a reduced vocabulary.

    Nearly all of CLIP's 49,408 tokens never occur in these captions. Training sees a table of those that
    do, which makes a step faster; `restore_vocabulary` puts their rows back and leaves zeros elsewhere, so
    that a word never seen in training adds nothing to a text but its place.
    """

    def __init__(self, sets: list[ImageSet], context: int, seed: int) -> None:
        self.sets = sets
        self.random = random.Random(seed)
        tokenizer = SimpleTokenizer(context_length=context)
        self.texts = sorted({text for s in sets for c in concepts(s) for text in phrase(c, s.templates)})
        tokens = tokenizer(self.texts)
        self.vocabulary = tokens.unique()  # sorted: the end token, CLIP's highest, stays the highest
        compact = torch.searchsorted(self.vocabulary, tokens)
        self.tokens = dict(zip(self.texts, compact, strict=True))

    def draw(self, rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Distinct captions (T, context) of the images at `rows`, and (B, T) 1 where one belongs to an image.

        An emoji has two captions, with its own name and with the name of its class. One template is drawn
        for each name of a batch: two images of one class then share their caption.
        """
        chosen: dict[tuple[str, str], str] = {}
        columns: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        for place, (index, row) in enumerate(rows):
            images = self.sets[index]
            label = int(images.labels[row])
            names = {images.names[row], images.classnames[label] if label >= 0 else None}
            for name in sorted(name for name in names if name is not None):
                family = images.classnames[0]  # both digit sets share their captions, so do the five styles
                if (family, name) not in chosen:
                    chosen[family, name] = self.random.choice(phrase(name, images.templates))
                column = columns.setdefault(chosen[family, name], len(columns))
                pairs.append((place, column))
        positive = torch.zeros(len(rows), len(columns))
        positive[tuple(torch.tensor(pairs).T)] = 1
        return torch.stack([self.tokens[text] for text in columns]), positive

    def shrink_vocabulary(self, model: CLIP) -> None:
        """Keep only the rows of the token table that captions use."""
        model.token_embedding = nn.Embedding.from_pretrained(
            model.token_embedding.weight.detach()[self.vocabulary], freeze=False
        )

    def restore_vocabulary(self, model: CLIP) -> None:
        """The full token table again, with zeros for tokens that no caption uses."""
        rows = model.token_embedding.weight.detach()
        table = torch.zeros(model.vocab_size, rows.shape[1])
        table[self.vocabulary] = rows
        model.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)


def concepts(images: ImageSet) -> set[str]:
    """All names that images of a set go by."""
    return {name for name in images.names if name is not None} | set(images.classnames)


def phrase(name: str, templates: list[str]) -> list[str]:
    """Every caption of `name`: the set's own templates twice, so that they are drawn more often."""
    return [template.format(c=name) for template in (*templates, *templates, *COMMON_TEMPLATES)]
