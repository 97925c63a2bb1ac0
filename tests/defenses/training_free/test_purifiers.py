"""What purifiers of the embedding share: they need one, and refuse what cannot be; and AOM's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.defenses.linear import Linear
from vlmdefend.defenses.base import Defense
from vlmdefend.defenses.training_free.aom import Aom
from vlmdefend.defenses.training_free.clipure_cos import ClipureCos
from vlmdefend.defenses.training_free.cola import Cola
from vlmdefend.defenses.training_free.dbd import Dbd
from vlmdefend.errors import UserError
from vlmdefend.evaluation.cell.query_count import CountingModel


@pytest.mark.parametrize("defense", [ClipureCos(), Dbd(), Cola(), Aom()])
def test_a_model_of_logits_only_is_refused_in_a_sentence(defense: Defense) -> None:
    with pytest.raises(UserError, match="logits only"):
        defense.wrap(Linear(torch.ones(2, 48)))
    with pytest.raises(UserError, match="logits only"):
        defense.wrap(CountingModel(Linear(torch.ones(2, 48))))


def test_aom_steps_past_the_mean_of_the_noisy_copies() -> None:
    features, noisy = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 1.0], [1.0, 3.0]]])  # mean (1, 2)
    assert torch.allclose(Aom(kappa=0.5).step(features, noisy), F.normalize(torch.tensor([[1.0, 3.0]]), dim=1))


@pytest.mark.parametrize(
    "make",
    [lambda: ClipureCos(steps=-1), lambda: Dbd(keep=0.0), lambda: Cola(views=0), lambda: Aom(copies=0)],
)
def test_impossible_settings_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError):
        make()
