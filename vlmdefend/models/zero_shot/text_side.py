"""The text tower of a zero-shot classifier for attacks on prompts: tokens, their gradient, other prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.models.zero_shot.text_tower import encode_embedded, token_embedding, tokenized

PROMPTS_AT_ONCE = 256


class TextSide:
    """The prompts of C classes and T templates, as tokens of a context of L.

    Args:
        classifier: answers with the prompts' features, and with others inside of :meth:`using`.
        tokenizer: open_clip's own.
        class_names: C names.
        templates: T texts with ``{c}``.
        context: (M, W) learned vectors that are read in place of the first M tokens of every prompt; None: the words.

    Attributes:
        tokens: (C, T, L) int64: start, template and class name, end, padding.
        slots: for each template (C, S): where its tokens lie that name no class, the same token in each column. What a
            tokenizer melts with the class name, and what lies between two mentions of it, counts as the name. A place
            of a learned vector holds no word and is none of them.
        before: for each template, how many tokens, or learned vectors, lie before the class name.

    Raises:
        UserError: a text tower or a tokenizer that is not open_clip's own; a prompt longer than the context.
    """

    def __init__(
        self,
        classifier: ZeroShotClassifier,
        tokenizer: Any,
        class_names: Sequence[str],
        templates: Sequence[str],
        context: Tensor | None = None,
    ) -> None:
        self.classifier, self._tokenizer = classifier, tokenizer
        self._clip: Any = classifier.clip
        self._embedding = token_embedding(self._clip)
        self._context = context
        if not all(hasattr(tokenizer, name) for name in ("encode", "decoder", "sot_token_id", "eot_token_id")):
            raise UserError(
                f"an attack on the prompts needs open_clip's own tokenizer, this model has {type(tokenizer).__name__}; "
                "use a CLIP model such as ViT-B/32."
            )
        texts = [template.replace("{c}", name) for name in class_names for template in templates]
        tokens = tokenized(tokenizer, texts).view(len(class_names), len(templates), -1)
        self.tokens = tokens.to(self._embedding.weight.device)
        slots = [self._slots_of(number, template) for number, template in enumerate(templates)]
        self.before = [_words_before(places) for places in slots]
        learned = 0 if context is None else len(context)
        self.slots = [places[:, learned:] for places in slots]

    @property
    def table(self) -> Tensor:
        """The (V, W) embedding of each token."""
        weight: Tensor = self._embedding.weight
        return weight

    @property
    def ends(self) -> Tensor:
        """The (C, T) position of the end token in the clean prompts."""
        return self.ends_of(self.tokens)

    def ends_of(self, tokens: Tensor) -> Tensor:
        """Returns the position of the end token: (..., L) to (...)."""
        ends: Tensor = (tokens == self._tokenizer.eot_token_id).long().argmax(dim=-1)
        return ends

    def token(self, word: str) -> int:
        """Returns the number of a word that is one token."""
        (number,) = self._tokenizer.encode(word)
        return int(number)

    def usable(self, *, words: bool) -> Tensor:
        """A (V,) bool mask of the tokens that a prompt may gain; no special ones.

        Args:
            words: only whole lower-case words of letters that the tokenizer reads back as this one token, so that the
                attacked prompt can be typed.
        """
        allowed = [number in self._tokenizer.decoder for number in range(len(self.table))]
        for number in self._tokenizer.all_special_ids:
            allowed[number] = False
        found = torch.tensor(allowed, device=self.tokens.device)
        return found & _words(self._tokenizer, len(self.table)).to(found.device) if words else found

    def decode(self, tokens: Tensor) -> str:
        """Returns the text of (L,) tokens between start and end; learned vectors are given as a count."""
        learned = 0 if self._context is None else len(self._context)
        text: str = self._tokenizer.decode(tokens[1 + learned : int(self.ends_of(tokens))].tolist())
        return f"[{learned} learned vectors] {text.strip()}" if learned else text.strip()

    def with_appended(self, tokens: Tensor, word: int) -> Tensor:
        """Inserts one more token before the end of (R, L) tokens.

        Raises:
            UserError: the context has no place left.
        """
        ends = self.ends_of(tokens)
        if int(ends.max()) + 1 >= tokens.shape[-1]:
            longest = self.decode(tokens[int(ends.argmax())])
            raise UserError(
                f"the prompt {longest!r} already fills the model's context of {tokens.shape[-1]} tokens; use a smaller "
                "--eps, mode=substitute, or shorter templates."
            )
        longer = tokens.scatter(-1, ends[:, None] + 1, self._tokenizer.eot_token_id)
        return longer.scatter(-1, ends[:, None], word)

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the (P, L, W) token embeddings that the text tower reads, of (P, L) tokens."""
        found: Tensor = self._embedding(tokens)
        if self._context is None:
            return found
        learned = self._context.detach().expand(len(tokens), -1, -1)
        return torch.cat([found[:, :1], learned, found[:, 1 + learned.shape[1] :]], dim=1)

    def encode(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Returns the (P, D) unit text features of (P, L) tokens.

        Args:
            embeddings: (P, L, W) what the tower reads in place of the tokens' own embeddings; the features are
                differentiable in it. The tokens still give the end of a prompt.
        """
        if embeddings is None:
            with torch.no_grad():
                return torch.cat([self._encode_words(part) for part in parts_of(tokens)])
        return encode_embedded(self._clip, tokens, embeddings)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """P texts -> (P, L) tokens, (P, D) features that are not normalised, (P, L, W) what is known of each token.

        The latter is what the tower's last norm gives, of which the features are made.
        """
        tokens: Tensor = self._tokenizer(list(texts)).to(self.tokens.device)
        tower = self._clip if hasattr(self._clip, "ln_final") else self._clip.text
        known: list[Tensor] = []
        handle = tower.ln_final.register_forward_hook(lambda module, given, found: known.append(found))
        try:
            with torch.no_grad():
                features = self._clip.encode_text(tokens, normalize=False)
        finally:
            handle.remove()
        return tokens, features, known[0]

    def features(self, tokens: Tensor) -> Tensor:
        """Returns the (C, D) unit class features of (C, T, L) tokens, as ``VisionLanguageModel.text_features``."""
        return ensembled(self.encode(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1))

    def gradient(self, tokens: Tensor, rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of a loss with respect to the token embeddings of some prompts.

        One prompt's graph at a time (256 of them), so that memory does not grow with the number of prompts.

        Args:
            tokens: (C, T, L).
            rows: (R,) which prompts, counted c * T + t.
            of: (C, D) class features -> (C, D) gradient of the loss with respect to them.

        Returns:
            (R, L, W); times the embedding table it is the gradient for a one-hot relaxation of the tokens.
        """
        flat = tokens.flatten(0, 1)
        with torch.enable_grad():
            prompts = self.encode(flat).view(*tokens.shape[:2], -1).requires_grad_(True)
            classes = ensembled(prompts)
        (wanted,) = torch.autograd.grad(classes, prompts, of(classes.detach()))
        found: list[Tensor] = []
        for part in parts_of(rows):
            with torch.enable_grad():
                embeddings = self.embed(flat[part]).detach().requires_grad_(True)
                features = self.encode(flat[part], embeddings)
            found.extend(torch.autograd.grad(features, embeddings, wanted.flatten(0, 1)[part]))
        return torch.cat(found)

    @contextmanager
    def using(self, features: Tensor) -> Iterator[None]:
        """Context in which the classifier, and every defense around it, uses these (C, D) class features."""
        before = self.classifier.text_features
        self.classifier.text_features = features
        try:
            yield
        finally:
            self.classifier.text_features = before

    def _encode_words(self, tokens: Tensor) -> Tensor:
        if self._context is not None:
            return encode_embedded(self._clip, tokens, self.embed(tokens))
        features: Tensor = self._clip.encode_text(tokens, normalize=True)
        return features

    def _slots_of(self, number: int, template: str) -> Tensor:
        pieces = template.split("{c}")
        before, after = self._tokenizer.encode(pieces[0]), self._tokenizer.encode(pieces[-1])
        rows = self.tokens[:, number]  # (C, L)
        ends = self.ends_of(rows)
        inner = [row[1:end].tolist() for row, end in zip(rows, ends.tolist(), strict=True)]
        # one token at least is the name, even where it repeats the template's words
        front = min(min(_shared(before, words), len(words) - 1) for words in inner)
        back = min(min(_shared(after[::-1], words[::-1]), len(words) - 1 - front) for words in inner)
        first = torch.arange(1, 1 + front, device=rows.device).expand(len(rows), front)
        last = ends[:, None] + torch.arange(-back, 0, device=rows.device)
        return torch.cat([first, last], dim=1)


@lru_cache(maxsize=4)
def _words(tokenizer: Any, size: int) -> Tensor:
    """Returns (V,) bool: tokens that are whole words; takes seconds, once per tokenizer."""
    found = torch.zeros(size, dtype=torch.bool)
    for number, written in tokenizer.decoder.items():
        stem = written.removesuffix("</w>")
        if number < size and stem != written and stem.isascii() and stem.isalpha() and stem.islower():
            found[number] = tokenizer.encode(stem) == [number]
    return found


def ensembled(prompts: Tensor) -> Tensor:
    """Averages (..., T, D) unit prompt features over the templates to (..., D) and normalises them."""
    mean = prompts.mean(dim=-2)
    features: Tensor = mean / mean.norm(dim=-1, keepdim=True)
    return features


def parts_of(rows: Tensor, width: int = PROMPTS_AT_ONCE) -> list[Tensor]:
    """Yields (R, ...) in parts of at most ``width`` rows."""
    return [rows[first : first + width] for first in range(0, len(rows), width)]


def _shared(a: list[int], b: list[int]) -> int:
    """Returns how many tokens two lists have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _words_before(slots: Tensor) -> int:
    """Returns how many template tokens lie before the class name."""
    count = 0
    while count < slots.shape[1] and bool((slots[:, count] == count + 1).all()):
        count += 1
    return count
