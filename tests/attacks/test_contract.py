"""Every attack of the registry keeps the contract; a new attack file is tested without a new test."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.attacks.conftest import Wrapped, convolutional, labelled
from tests.attacks.spoken import Spoken
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack, AttackResult
from vlmdefend.attacks.view import View
from vlmdefend.errors import UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)
RADII = {
    "linf": (1 / 255, 4 / 255, 16 / 255),
    "l2": (0.0375, 0.15, 0.6),
    "patch": (0.02, 0.1, 0.4),
    "corruption": (1.0, 2.0, 5.0),
}
SMALL = {norm: radii[1] for norm, radii in RADII.items()}
CASES = [
    pytest.param(cls.name, norm, id=f"{cls.name}-{norm}") for cls in ATTACKS for norm in RADII if norm in cls.norms
]
contract = pytest.mark.parametrize(("name", "norm"), CASES)


class InDouble(Wrapped):
    """Computes in float64 on float32 pixels."""

    def forward(self, images: torch.Tensor, rng: ImageRng | None = None) -> Outputs:
        return Wrapped.forward(self, images.double(), rng)


def prepared(name: str, model: Wrapped, threat: Threat, width: int = 4) -> Attack:
    chosen = ATTACKS.create(name, **ATTACKS.get(name).quick)
    if not chosen.learns_from:
        return chosen
    fitted, classes, names = labelled(model, SHAPE, 12, seed=7)
    whole = Threat(threat.norm, float(torch.as_tensor(threat.eps).max()))
    view = View(model, ImageRng(0, names), width=width, model=Spoken(model))
    return chosen.fit(view, fitted, classes, whole)


def attack(
    name: str,
    model: Wrapped,
    images: torch.Tensor,
    labels: torch.Tensor,
    ids: list[str],
    threat: Threat,
    width: int = 4,
) -> AttackResult:
    view = View(model, ImageRng(0, ids), width=width, model=Spoken(model))
    return prepared(name, model, threat, width)(view, images, labels, threat)


@contract
@pytest.mark.parametrize("count", [1, 3, 8])
def test_results_keep_the_budget(name: str, norm: str, count: int, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, count)
    images[0, 0, 0, :4] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    threat = Threat(norm, SMALL[norm])
    found = attack(name, conv, images, labels, ids, threat)
    assert found.images.shape == images.shape
    assert found.images.isfinite().all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert (threat.distance(found.images, images) <= SMALL[norm] + 1e-6).all()
    assert found.outside == 0
    with torch.no_grad(), prepared(name, conv, threat).conditions(Spoken(conv).text_side):
        assert torch.equal(conv(found.images).logits.argmax(1) != labels, found.fooled)


@contract
def test_nothing_but_the_result_changes(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 5)
    before, state = images.clone(), copy.deepcopy(conv.state_dict())
    conv.body[5].train()  # an activation: mixed flags must stay as they are, and the labels stay right
    conv.head.weight.requires_grad_(False)
    training = [m.training for m in conv.modules()]
    requires = [p.requires_grad for p in conv.parameters()]
    rng = torch.random.get_rng_state()
    found = attack(name, conv, images, labels, ids, Threat(norm, SMALL[norm]))
    created = ATTACKS.create(name, **ATTACKS.get(name).quick)
    if not created.gradient_free and not created.learns_from:
        assert (found.steps > 0).any(), "it did not run"
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert all(p.grad is None for p in conv.parameters())
    assert [m.training for m in conv.modules()] == training
    assert [p.requires_grad for p in conv.parameters()] == requires
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in conv.state_dict().items())


@contract
def test_an_image_does_not_depend_on_its_mates(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 7)
    conv = conv.double()  # the last bit of batch-dependent blocking then lies below a pixel's float32
    conv.__class__ = InDouble
    threat = Threat(norm, SMALL[norm])
    together = attack(name, conv, images, labels, ids, threat, width=4)
    again = attack(name, conv, images, labels, ids, threat, width=4)
    assert torch.equal(together.images, again.images)
    order = torch.tensor([5, 2, 0, 6, 1, 4, 3])
    shuffled = attack(name, conv, images[order], labels[order], [ids[i] for i in order], threat, width=3)
    assert torch.allclose(shuffled.images, together.images[order], atol=1e-6)
    assert torch.equal(shuffled.fooled, together.fooled[order])
    for i in range(7):
        alone = attack(name, conv, images[i : i + 1], labels[i : i + 1], [ids[i]], threat, width=1)
        assert torch.allclose(alone.images[0], together.images[i], atol=1e-6)


@contract
def test_works_under_no_grad_and_refuses_inference_tensors(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 3)
    threat = Threat(norm, SMALL[norm])
    expected = attack(name, conv, images, labels, ids, threat)
    with torch.no_grad():
        assert torch.equal(attack(name, conv, images, labels, ids, threat).images, expected.images)
    with torch.inference_mode():
        inference = images * 1.0
    with pytest.raises(UserError, match="inference_mode"):
        attack(name, conv, inference, labels, ids, threat)


@contract
def test_radius_zero_gives_the_clean_images(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 3)
    found = attack(name, conv, images, labels, ids, Threat(norm, 0.0))
    assert torch.equal(found.images, images)
    assert not found.fooled.any()


@contract
def test_one_radius_per_image_equals_the_number(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 6)
    eps = SMALL[norm]
    number = attack(name, conv, images, labels, ids, Threat(norm, eps))
    tensor = attack(name, conv, images, labels, ids, Threat(norm, torch.full((6,), eps)))
    assert torch.allclose(number.images, tensor.images, atol=1e-6)
    mixed = torch.tensor([0.0, eps, eps / 2, eps, 0.0, eps])
    found = attack(name, conv, images, labels, ids, Threat(norm, mixed))
    assert (Threat(norm, mixed).distance(found.images, images) <= mixed + 1e-6).all()
    assert torch.equal(found.images[0], images[0])


@contract
def test_a_shift_of_all_logits_changes_nothing(name: str, norm: str, conv: Wrapped) -> None:
    """Product masks in place of -inf break on negative logits (SigLIP-like models)."""
    images, labels, ids = labelled(conv, SHAPE, 8)
    threat = Threat(norm, SMALL[norm])
    plain = attack(name, conv, images, labels, ids, threat)
    conv.shift = -10.0
    assert torch.equal(attack(name, conv, images, labels, ids, threat).fooled, plain.fooled)


@contract
def test_saturated_pixels_can_move(name: str, norm: str, conv: Wrapped) -> None:
    if name == "none":
        return
    images = (labelled(conv, SHAPE, 4)[0] > 0.5).float()
    with torch.no_grad():
        labels = conv(images).logits.argmax(1)
    ids = [f"binary-{i}" for i in range(4)]
    found = attack(name, conv, images, labels, ids, Threat(norm, RADII[norm][2]))
    moved = (found.images != images).flatten(1).any(1)
    assert moved.any()
    if ATTACKS.get(name).changes_prompts:
        moved |= found.steps == 0  # the prompts alone fooled it
    assert moved.all()


@contract
def test_what_is_wrong_already_is_left_alone(name: str, norm: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 4)
    labels = labels.clone()
    labels[1] = (labels[1] + 1) % 5
    found = attack(name, conv, images, labels, ids, Threat(norm, SMALL[norm]))
    assert found.fooled[1]
    assert found.steps[1] == 0
    assert torch.equal(found.images[1], images[1])


@contract
def test_no_images_is_no_error(name: str, norm: str, conv: Wrapped) -> None:
    found = attack(name, conv, torch.zeros(0, *SHAPE), torch.zeros(0, dtype=torch.int64), [], Threat(norm, 0.1))
    assert found.images.shape == (0, *SHAPE)


@contract
def test_accuracy_falls_with_the_radius(name: str, norm: str) -> None:
    model = convolutional(seed=9)
    images, labels, ids = labelled(model, SHAPE, 24)
    fooled = [int(attack(name, model, images, labels, ids, Threat(norm, eps)).fooled.sum()) for eps in RADII[norm]]
    assert fooled == sorted(fooled)
    if name != "none":
        assert fooled[-1] > fooled[0]


@contract
def test_every_attack_says_what_it_is(name: str, norm: str) -> None:
    cls = ATTACKS.get(name)
    instance = ATTACKS.create(name)
    assert cls.summary
    assert cls.citation
    assert ATTACKS.create(name, **instance.spec()) == instance
    assert repr(instance).startswith(cls.__name__)
    file = cls.__module__.rpartition(".")[2]
    assert name.replace("-", "_") == file
    assert all(spent >= 0 for spent in instance.budget(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, y: (i.double(), y), "float32"),
        (lambda i, y: (i + 1, y), r"\[0, 1\]"),
        (lambda i, y: (i, y[:-1]), "labels"),
        (lambda i, y: (i, y.float()), "int64"),
        (lambda i, y: (i, y + 10), "labels reach"),
        (lambda i, y: (i * float("nan"), y), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, message: str, conv: Wrapped) -> None:  # type: ignore[no-untyped-def]
    images, labels, ids = labelled(conv, SHAPE, 3)
    images, labels = change(images, labels)
    with pytest.raises(UserError, match=message):
        attack("pgd", conv, images, labels, ids, Threat("linf", 0.1))
