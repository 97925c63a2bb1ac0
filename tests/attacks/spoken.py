"""A text side for the small pipelines: a toy tower whose clean class features are the rows of their last layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped
from vlmdefend.models.zero_shot.text_side import TextSide

NAMES = ("ant", "bee", "cat", "dog", "eel")
WORDS = ("calm", "loud", "red", "blue", "old", "new", "far", "near")
LENGTH = 10


class Tokenizer:
    """One word, one token."""

    def __init__(self) -> None:
        words = ("a", "photo", "of", ".", "the", *WORDS, *NAMES)
        self.sot_token_id, self.eot_token_id = len(words) + 1, len(words) + 2
        self.all_special_ids = [0, self.sot_token_id, self.eot_token_id]
        self.encoder = {word: number for number, word in enumerate(words, 1)}
        self.decoder = {number: f"{word}</w>" for word, number in self.encoder.items()}
        self.decoder |= dict.fromkeys(self.all_special_ids, "<special>")

    def encode(self, text: str) -> list[int]:
        return [self.encoder[word] for word in text.replace(".", " .").split()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.decoder[token] for token in tokens).replace("</w>", " ")

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[self.sot_token_id, *self.encode(text), self.eot_token_id] for text in texts]
        return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


class Tower(nn.Module):
    """The normalised sum of the embeddings: of a class name the row of its class, of words a little of anything."""

    def __init__(self, rows: Tensor, tokenizer: Tokenizer, strength: float) -> None:
        super().__init__()
        table = torch.zeros(len(tokenizer.decoder), rows.shape[1])
        for name, row in zip(NAMES, rows, strict=False):
            table[tokenizer.encoder[name]] = row
        words = F.normalize(torch.randn(len(WORDS), rows.shape[1], generator=torch.Generator().manual_seed(3)), dim=1)
        for word, direction in zip(WORDS, words, strict=True):
            table[tokenizer.encoder[word]] = strength * direction
        self.token_embedding = nn.Embedding.from_pretrained(table)  # frozen; draws nothing

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        return F.normalize(self.token_embedding(tokens).sum(dim=1), dim=-1)


class Spoken:
    """What stands at the bottom of a pipeline around ``model`` and knows its prompts."""

    def __init__(self, model: Wrapped, strength: float = 0.1) -> None:
        self._model = model
        self._lengths = model.head.weight.detach().norm(dim=1, keepdim=True)
        self._clean = (model.head.weight.detach() / self._lengths).float()
        tokenizer = Tokenizer()
        self.clip: Any = Tower(self._clean, tokenizer, strength)
        self.text_side = TextSide(self, tokenizer, NAMES[: model.num_classes], ("a photo of a {c}.",))  # type: ignore[arg-type]

    @property
    def text_features(self) -> Tensor:
        return self._clean if self._model.rows is None else self._model.rows / self._lengths

    @text_features.setter
    def text_features(self, features: Tensor) -> None:
        self._model.rows = None if features is self._clean else features * self._lengths

    def logits(self, features: Tensor) -> Tensor:
        return self._model.logits(features)
