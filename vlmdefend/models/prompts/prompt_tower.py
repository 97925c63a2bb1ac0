"""Class features from context vectors that differ between the images of a batch (prompt tuning)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.text_side import TextSide, ensembled, parts_of
from vlmdefend.models.zero_shot.text_tower import looks_backwards, read_short


class PromptTower:
    """The text tower as a differentiable function of the F context vectors before the class name.

    The vectors are shared by all classes (CoOp's unified context, Zhou et al. 2022, with the class name at the end of
    the tuned part) and stand where the template's words before the name stood: "a photo of a". What follows the name
    stays. Each of T templates has vectors of its own; one with fewer words than F leaves its last vectors unused.

    Attributes:
        context: (T, F, W) the vectors of the templates' own words, learned ones among them, with which the class
            features are the model's.
        classes: (C, D) unit class features of that context.

    Raises:
        UserError: no template has a word before the class name.
    """

    def __init__(self, side: TextSide) -> None:
        self.side = side
        if not any(side.before):
            raise UserError(
                "prompt tuning changes the words before the class name, and no template has one; use a template such "
                "as 'a photo of a {c}.'."
            )
        self._tokens = self._shortened(side.tokens.flatten(0, 1))  # (C T, L)
        embedded = side.embed(self._tokens).detach().view(*side.tokens.shape[:2], *self._tokens.shape[1:], -1)
        self._embedded, longest = embedded, max(side.before)
        counts = torch.tensor(side.before, device=embedded.device)
        self._used = (torch.arange(longest, device=embedded.device) < counts[:, None])[..., None]  # (T, F, 1)
        self.context = embedded[0, :, 1 : 1 + longest]
        self.classes = side.features(side.tokens)

    def __call__(self, context: Tensor) -> Tensor:
        """Turns (B, T, F, W) contexts into (B, C, D) unit class features, differentiable in the context."""
        rows, (classes, templates) = self._rows(len(context)), self.side.tokens.shape[:2]
        found = torch.cat([self._encode(context[owner, t], c, t) for owner, c, t in rows])
        return ensembled(found.view(len(context), classes, templates, -1))

    def gradient(self, context: Tensor, wanted: Tensor) -> Tensor:
        """Returns the gradient with respect to the context, from that with respect to the class features.

        One part of the prompts is in memory at a time, so that the graph does not grow with images x classes.

        Args:
            context: (B, T, F, W).
            wanted: (B, C, D) gradient of the loss with respect to the class features at that context.

        Returns:
            (B, T, F, W).
        """
        context, (classes, templates) = context.detach(), self.side.tokens.shape[:2]
        rows, wanted = self._rows(len(context)), wanted.unsqueeze(2)
        found = []
        if templates == 1:
            per_prompt = wanted.flatten(0, 2)
        else:  # through the mean over templates
            with torch.no_grad():
                prompts = torch.cat([self._encode(context[owner, t], c, t) for owner, c, t in rows])
            with torch.enable_grad():
                prompts = prompts.view(len(context), classes, templates, -1).requires_grad_(True)
                mean = ensembled(prompts)
            per_prompt = torch.autograd.grad(mean, prompts, wanted[:, :, 0])[0].flatten(0, 2)
        for (owner, c, t), part in zip(rows, parts_of(per_prompt), strict=True):
            with torch.enable_grad():
                own = context[owner, t].requires_grad_(True)
                features = self._encode(own, c, t)
            found.append(torch.autograd.grad(features, own, part)[0])
        return torch.cat(found).view(len(context), classes, *context.shape[1:]).sum(dim=1)

    def _rows(self, images: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Yields image, class and template of the B C T prompts, some at a time."""
        classes, templates = self.side.tokens.shape[:2]
        number = torch.arange(images * classes * templates, device=self._embedded.device)
        return [(n // (classes * templates), n // templates % classes, n % templates) for n in parts_of(number)]

    def _encode(self, context: Tensor, c: Tensor, t: Tensor) -> Tensor:
        """Encodes (R, F, W) contexts of R prompts of classes c and templates t into (R, D) unit features."""
        clean = self._embedded[c, t]
        until = 1 + context.shape[1]
        inside = torch.where(self._used[t], context, clean[:, 1:until])
        embeddings = torch.cat([clean[:, :1], inside, clean[:, until:]], dim=1)
        tokens = self._tokens[c * self.side.tokens.shape[1] + t]
        if self._tokens.shape[-1] == self.side.tokens.shape[-1]:
            return self.side.encode(tokens, embeddings)
        return read_short(self.side.classifier.clip, tokens, embeddings)

    def _shortened(self, tokens: Tensor) -> Tensor:
        """Cuts the padding behind the longest prompt, where the tower is causal."""
        return tokens[:, : int(self.side.ends.max()) + 1] if looks_backwards(self.side.classifier.clip) else tokens
