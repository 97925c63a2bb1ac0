"""Class prompts that lower the accuracy: tokens proposed by their gradient, verified by forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlmdefend.attacks.text_level._prompt_scores import PromptScore, PromptScores
from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.text_side import PROMPTS_AT_ONCE, TextSide, ensembled, parts_of

Mode = Literal["suffix", "substitute"]
PLACEHOLDER = "the"  # where a token will be appended, the gradient is taken at this one


class Prompts(NamedTuple):
    """The prompts of C classes and T templates, during the search and as its result."""

    tokens: Tensor  # (C, T, L)
    prompts: Tensor  # (C, T, D) their unit features
    score: PromptScore
    changed: tuple[tuple[int, ...], ...]  # for each group the slots that were changed, or 0, 1, ... appended

    @property
    def classes(self) -> Tensor:
        """Returns (C, D) unit class features."""
        return ensembled(self.prompts)


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that receive the same tokens in the same positions."""

    rows: Tensor  # (R,) which, counted c * T + t
    slots: Tensor | None  # (R, S) where tokens may be exchanged; None: tokens are appended

    def places(self, prompts: Prompts, side: TextSide, which: tuple[int, ...]) -> Tensor:
        """Returns the (R, len(which)) token positions of the slots of these numbers."""
        if self.slots is not None:
            return self.slots[:, list(which)]
        first = side.ends_of(side.tokens).flatten()[self.rows]
        return first[:, None] + torch.tensor(which, dtype=torch.int64, device=first.device)


def groups_of(side: TextSide, mode: Mode, per_class: bool) -> list[PromptGroup]:
    """Returns the groups of prompts that change together.

    A suffix is the same for all prompts, or all of one class. Substituted are tokens of a template, for all classes
    alike, or for each class by itself.

    Raises:
        UserError: no template has a token that could be exchanged.
    """
    classes, templates = side.tokens.shape[:2]
    every = torch.arange(classes * templates, device=side.tokens.device).view(classes, templates)
    if mode == "suffix":
        return [PromptGroup(rows, None) for rows in (every if per_class else every.view(1, -1))]
    groups = []
    for template, slots in enumerate(side.slots):
        if slots.shape[1]:
            rows = every[:, template]
            parts = [(rows[c : c + 1], slots[c : c + 1]) for c in range(classes)] if per_class else [(rows, slots)]
            groups += [PromptGroup(*part) for part in parts]
    if not groups:
        raise UserError(
            "mode=substitute exchanges words of the templates, and these hold nothing but the class name; use "
            "mode=suffix, or --template 'a photo of a {c}.'."
        )
    return groups


@dataclass(frozen=True, kw_only=True)
class PromptSearch:
    """Greedy or beam search: one token per round and group; the best first-order candidates are tried in full."""

    side: TextSide
    answers: PromptScores
    groups: list[PromptGroup]
    usable: Tensor  # (V,) bool
    candidates: int
    beams: int
    sweeps: int

    def run(self, rounds: int) -> Prompts:
        """Returns the best prompts with at most ``rounds`` tokens changed in each.

        Only what scores better than the prompts so far is taken, so the score never falls with ``rounds``.
        """
        side = self.side
        clean = side.encode(side.tokens.flatten(0, 1)).view(*side.tokens.shape[:2], -1)
        nothing: tuple[tuple[int, ...], ...] = ((),) * len(self.groups)
        beam = [Prompts(side.tokens, clean, self.answers.score(ensembled(clean)), nothing)]
        for _ in range(rounds):
            before = beam[0].score
            for number in range(len(self.groups)):
                beam = self._best(beam, [found for one in beam for found in self._grown(one, number)])
            for _ in range(self.sweeps):
                for number in range(len(self.groups)):
                    beam = self._best(beam, [found for one in beam for found in self._improved(one, number)])
            if beam[0].score == before:
                break
        return beam[0]

    def _best(self, beam: list[Prompts], found: list[Prompts]) -> list[Prompts]:
        """Returns the best few of both lists; at equal scores the earlier."""
        best: list[Prompts] = []
        for one in sorted(beam + found, key=lambda one: (one.score.right, -one.score.loss)):
            if len(best) < self.beams and not any(torch.equal(one.tokens, other.tokens) for other in best):
                best.append(one)
        return best

    def _grown(self, prompts: Prompts, number: int) -> list[Prompts]:
        """Returns prompts with one more token changed in a group."""
        group, changed = self.groups[number], prompts.changed[number]
        if group.slots is None:
            flat = prompts.tokens.flatten(0, 1).clone()
            flat[group.rows] = self.side.with_appended(flat[group.rows], self._placeholder())
            return self._tried(prompts, flat, number, (len(changed),), placeholder=True)
        free = tuple(slot for slot in range(group.slots.shape[1]) if slot not in changed)
        return self._tried(prompts, prompts.tokens.flatten(0, 1), number, free) if free else []

    def _improved(self, prompts: Prompts, number: int) -> list[Prompts]:
        """Returns prompts with another token in a position that was changed before."""
        changed = prompts.changed[number]
        return self._tried(prompts, prompts.tokens.flatten(0, 1), number, changed) if changed else []

    def _tried(
        self, prompts: Prompts, flat: Tensor, number: int, slots: tuple[int, ...], *, placeholder: bool = False
    ) -> list[Prompts]:
        """Scores the candidates at these positions and returns the best few.

        Args:
            flat: (C*T, L) the tokens at which the gradient is taken.
            placeholder: the token there is none of the prompts', so it is a candidate too.
        """
        side, group = self.side, self.groups[number]
        places = group.places(prompts, side, slots)  # (R, S)
        proposed = self._proposed(flat.view(*prompts.tokens.shape[:2], -1), group, places, placeholder)
        tried: list[Prompts] = []
        rows = flat[group.rows]  # (R, L)
        together = max(1, PROMPTS_AT_ONCE // len(rows))
        for some in parts_of(proposed, together):
            versions = rows.repeat(len(some), 1, 1)  # (K, R, L)
            for version, (slot, token) in zip(versions, some.tolist(), strict=True):
                version.scatter_(1, places[:, slot : slot + 1], token)
            encoded = side.encode(versions.flatten(0, 1)).view(*versions.shape[:2], -1)
            for version, features, (slot, _) in zip(versions, encoded, some.tolist(), strict=True):
                tried.append(self._with(prompts, number, version, features, slots[slot]))
            tried = self._best([], tried)
        return tried

    def _proposed(self, tokens: Tensor, group: PromptGroup, places: Tensor, placeholder: bool) -> Tensor:
        """Returns (K, 2) position and token of the highest first-order gains (HotFlip).

        Half of them for the loss over all images, half for those that are still right: the first soon knows only images
        that are far beyond the boundary, the second forgets those that could come back.
        """
        rows = tokens.flatten(0, 1)[group.rows]
        best = []
        for still_right in (False, True):
            gradient = self.side.gradient(
                tokens, group.rows, partial(self.answers.gradient, still_right=still_right)
            )  # (R, L, W)
            gains = first_order_gains(gradient, rows, places, self.side.table)  # (S, V)
            gains = gains.masked_fill(~self.usable, -torch.inf)
            if not placeholder:
                gains = gains.scatter(1, rows.gather(1, places)[:1].T, -torch.inf)
            count = min(-(-self.candidates // 2), int((gains > -torch.inf).sum()))
            best.append(gains.flatten().topk(count).indices)
        found = torch.tensor(sorted(set(torch.cat(best).tolist())), device=rows.device)  # a fixed order
        return torch.stack([found // gains.shape[1], found % gains.shape[1]], dim=1)

    def _with(self, prompts: Prompts, number: int, rows: Tensor, features: Tensor, slot: int) -> Prompts:
        group = self.groups[number]
        tokens, encoded = prompts.tokens.flatten(0, 1).clone(), prompts.prompts.flatten(0, 1).clone()
        tokens[group.rows], encoded[group.rows] = rows, features
        shape = prompts.tokens.shape[:2]
        changed = tuple(dict.fromkeys((*prompts.changed[number], slot)))
        every = (*prompts.changed[:number], changed, *prompts.changed[number + 1 :])
        encoded = encoded.view(*shape, -1)
        return Prompts(tokens.view(*shape, -1), encoded, self.answers.score(ensembled(encoded)), every)

    def _placeholder(self) -> int:
        token = self.side.token(PLACEHOLDER)
        return token if self.usable[token] else int(self.usable.nonzero()[0, 0])


def first_order_gains(gradient: Tensor, rows: Tensor, places: Tensor, table: Tensor) -> Tensor:
    """Returns the first-order gain of the loss for every exchange of a token (Ebrahimi et al. 2018, eq. 3).

    Args:
        gradient: (R, L, W) of the loss with respect to the token embeddings.
        rows: (R, L) the tokens.
        places: (R, S); the tokens of one column are exchanged together.
        table: (V, W).

    Returns:
        (S, V) for each column and each new token.
    """
    at = places[:, :, None].expand(-1, -1, gradient.shape[2])
    here = gradient.gather(1, at)  # (R, S, W)
    present = (here * table[rows.gather(1, places)]).sum(dim=(0, 2))  # (S,)
    return here.sum(dim=0) @ table.T - present[:, None]
