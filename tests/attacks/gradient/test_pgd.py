"""PGD against closed forms and against the library whose iterates it must equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.pgd import Pgd, choose_targets, step_size
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng, opaque
from vlmdefend.types import Outputs, Threat


def minimal_radius(model: Wrapped, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """(B,) smallest perturbation that changes a linear classifier's prediction: gap / dual norm of the difference."""
    weight = model.head.weight
    logits = model(images).logits
    gaps = logits.gather(1, labels[:, None]) - logits  # (B, C)
    difference = weight[labels][:, None] - weight[None]  # (B, C, size)
    dual = difference.abs().sum(-1) if norm == "linf" else difference.norm(dim=-1)
    distance = gaps / dual
    distance.scatter_(1, labels[:, None], torch.inf)
    return distance.amin(1).detach()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(8,), (4, 6), (3, 8, 8)])
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_reaches_the_known_minimum_of_a_linear_model(norm: str, shape: tuple[int, ...], count: int, loss: str) -> None:
    model = linear(shape, 4)
    images, labels, ids = labelled(model, shape, count)
    radius = minimal_radius(model, images, labels, norm)
    attack = Pgd(steps=50, alpha="2.5eps/steps", loss=loss, restarts=5)
    reachable = radius * 1.25 < 0.2  # the box [0, 1] is no obstacle within the images' margin of 0.2
    over = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 1.25))
    assert over.fooled[reachable].all()
    under = attack(View(model, ImageRng(0, ids)), images, labels, Threat(norm, radius * 0.98))
    assert not under.fooled.any()


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_iterates_equal_torchattacks(start: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchattacks

    model = convolutional(seed=seed)
    images, labels, ids = labelled(model, (3, 8, 8), 16)
    eps, alpha = 8 / 255, 2 / 255
    logits_only = nn.Sequential(model.body, model.head).eval()
    torch.manual_seed(seed)
    theirs = torchattacks.PGD(logits_only, eps=eps, alpha=alpha, steps=10, random_start=start)(images, labels)
    torch.manual_seed(seed)
    injected = torch.clamp(images + torch.empty_like(images).uniform_(-eps, eps), min=0, max=1)
    places = {opaque(name): i for i, name in enumerate(ids)}
    monkeypatch.setattr(Threat, "random_start", lambda self, x, rng: injected[[places[i] for i in rng.names]].clone())
    attack = Pgd(steps=10, alpha=str(alpha), last=True, random_start=start)
    view = View(model, ImageRng(0, ids), width=16)
    ours = attack.perturb(view, images, labels, Threat("linf", eps), view.rng)
    assert torch.equal(ours, theirs)


def test_the_active_set_fools_the_same_images_as_the_fixed_batch() -> None:
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, (3, 8, 8), 40)
    threat = Threat("linf", 8 / 255)
    attack = Pgd(steps=20)
    shrinking = View(model, ImageRng(0, ids), width=8)
    fixed = View(model, ImageRng(0, ids), width=8, stop=False)
    one, two = attack(shrinking, images, labels, threat), attack(fixed, images, labels, threat)
    assert torch.equal(one.fooled, two.fooled)
    assert 0 < int(one.fooled.sum()) < 40
    assert int(one.steps.sum()) < int(two.steps.sum()) == 40 * 20


def test_best_iterate_is_no_weaker_than_the_last() -> None:
    model = convolutional(seed=7)
    images, labels, ids = labelled(model, (3, 8, 8), 40)
    threat = Threat("linf", 2 / 255)
    best = Pgd(steps=10, alpha="eps")(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    last = Pgd(steps=10, alpha="eps", last=True)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    assert (best.margin >= last.margin).all()
    assert (best.margin > last.margin).any()


def test_more_restarts_and_steps_never_help_the_model() -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, (3, 8, 8), 60)
    threat = Threat("linf", 1.5 / 255)
    view = lambda: View(model, ImageRng(0, ids))  # noqa: E731
    one = Pgd(steps=5)(view(), images, labels, threat)
    four = Pgd(steps=5, restarts=4)(view(), images, labels, threat)
    assert (four.fooled | ~one.fooled).all()
    longer = Pgd(steps=40)(view(), images, labels, threat)
    assert int(longer.fooled.sum()) >= int(one.fooled.sum())


@pytest.mark.parametrize("target", ["random", "second", "least", 2])
@pytest.mark.parametrize("loss", ["ce", "cw", "cw50", "dlr"])
def test_targeted_losses_reach_their_target(target, loss: str) -> None:  # type: ignore[no-untyped-def]
    model = linear((3, 8, 8), 5)
    images, labels, ids = labelled(model, (3, 8, 8), 6)
    view = View(model, ImageRng(0, ids))
    attack = Pgd(steps=30, loss=loss, target=target, last=True)
    rng = ImageRng(0, ids).child("attack")
    targets = choose_targets(target, view, images, labels, rng)
    assert (targets != labels).all()
    found = attack.perturb(view, images, labels, Threat("linf", 0.2), ImageRng(0, ids).child("attack"))
    logits = view(found)
    if loss == "dlr":  # its ratio only sets the target against the label: a third class may end above both
        assert (logits.gather(1, targets[:, None]) > logits.gather(1, labels[:, None])).all()
    else:
        assert torch.equal(logits.argmax(1), targets)


class Remembering(Wrapped):
    """Notes which of its queries were misclassified; for one image at a time."""

    def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
        outputs = Wrapped.forward(self, images, rng)
        self.wrong = getattr(self, "wrong", False) or bool((outputs.logits.argmax(1) != self.label).any())
        return outputs


@pytest.mark.parametrize(("target", "eps"), [(None, 8 / 255), ("random", 24 / 255), ("least", 32 / 255)])
def test_an_image_misclassified_at_any_iterate_is_fooled(target, eps: float) -> None:  # type: ignore[no-untyped-def]
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, (3, 8, 8), 40)
    model.__class__ = Remembering
    seen = []
    for i in range(40):
        model.wrong, model.label = False, labels[i]
        view = View(model, ImageRng(0, ids[i : i + 1]))
        fooled = Pgd(steps=8, target=target)(view, images[i : i + 1], labels[i : i + 1], Threat("linf", eps)).fooled
        assert bool(fooled) == model.wrong
        seen.append(model.wrong)
    assert 0 < sum(seen) < 40


def test_restarts_count_with_last_too() -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, (3, 8, 8), 60)
    threat = Threat("linf", 6 / 255)
    one, many = (
        Pgd(steps=2, last=True, restarts=n)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
        for n in (1, 6)
    )
    assert (many.margin >= one.margin).all()
    assert (many.margin > one.margin).any()


def test_a_random_pipeline_is_scored_at_the_last_iterate_not_the_luckiest() -> None:
    class Noisy(Wrapped):
        stochastic = True

        def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
            assert rng is not None
            return Wrapped.forward(self, images + 0.1 * rng.normal(images.shape[1:]), rng)

    model = convolutional(seed=5)
    images, labels, ids = labelled(model, (3, 8, 8), 12)
    model.__class__ = Noisy
    threat = Threat("linf", 8 / 255)
    found = Pgd(steps=4)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    last = Pgd(steps=4, last=True)(View(model, ImageRng(0, ids), stop=False), images, labels, threat)
    assert torch.equal(found.images, last.images)


@pytest.mark.parametrize("loss", ["kl", "feature", "feature_cos"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_label_free_losses_move_the_features_further_than_noise(loss: str, norm: str) -> None:
    model = convolutional()
    images, labels, ids = labelled(model, (3, 8, 8), 6)
    threat = Threat(norm, {"linf": 8 / 255, "l2": 0.4}[norm])
    view = View(model, ImageRng(0, ids), stop=False)
    found = Pgd(loss=loss, last=True).perturb(view, images, labels, threat, view.rng)
    noise = threat.random_start(images, ImageRng(1, ids))
    moved = lambda x: (model(x).features - model(images).features).norm(dim=1)  # noqa: E731
    assert (moved(found) > 1.5 * moved(noise)).all()


def test_a_cut_gradient_is_a_zero_gradient_and_is_counted(conv: Wrapped) -> None:
    class Cut(Wrapped):
        def forward(self, images, rng=None):  # type: ignore[no-untyped-def]
            return Outputs(*[t.detach() for t in Wrapped.forward(self, images, rng)[:2]])

    images, labels, ids = labelled(conv, (3, 8, 8), 4)
    conv.__class__ = Cut
    view = View(conv, ImageRng(0, ids))
    Pgd(steps=3)(view, images, labels, Threat("linf", 1 / 255))
    assert int(view.queries.zero_gradients) == view.queries.gradient_values > 0


def test_step_rules() -> None:
    assert step_size("eps/4", 8.0, 10) == 2.0
    assert step_size("2.5eps/steps", 8.0, 10) == 2.0
    assert step_size("0.1*eps", 8.0, 10) == pytest.approx(0.8)
    assert step_size("1/255", 8.0, 10) == 1 / 255
    assert torch.equal(step_size("eps/4", torch.tensor([4.0, 8.0]), 10), torch.tensor([1.0, 2.0]))
    for wrong in ("eps/", "fast", "-1/255", "8"):
        with pytest.raises(UserError, match="alpha"):
            Pgd(alpha=wrong)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="steps"):
        Pgd(steps=0)
    with pytest.raises(UserError, match="target"):
        Pgd(loss="feature", target="random")
    model = linear((8,), 4)
    images, labels, ids = labelled(model, (8,), 2)
    with pytest.raises(UserError, match="target=9"):
        Pgd(target=9)(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))


def test_goal_margin_is_positive_exactly_when_fooled() -> None:
    logits = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(1))
    criterion = Criterion(labels)
    assert torch.equal(criterion.margin(logits) > 0, criterion.reached(logits))
