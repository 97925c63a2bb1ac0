"""Momentum, look-ahead, diverse inputs, smoothing and scaling: each step by hand, their composition, the library's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attacks.conftest import Wrapped, convolutional, labelled, linear
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.di import Di, placement
from vlmdefend.attacks.gradient.mi import Mi
from vlmdefend.attacks.gradient.ni import Ni
from vlmdefend.attacks.gradient.si import Si
from vlmdefend.attacks.gradient.ti import Ti, gaussian
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.target_classes import choose_targets
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Threat

SHAPE = (3, 8, 8)
EPS = 8 / 255
NAMES = ["mi", "ni", "di", "ti", "si"]


def slope(model: Wrapped, pixels: Tensor, labels: Tensor) -> Tensor:
    pixels = pixels.clone().requires_grad_(True)
    loss = F.cross_entropy(model(pixels).logits, labels, reduction="sum")
    return torch.autograd.grad(loss, pixels)[0]


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True)


def perturbed(attack, model: Wrapped, images: Tensor, labels: Tensor, ids: list[str], norm: str = "linf") -> Tensor:  # type: ignore[no-untyped-def]
    view = View(model, ImageRng(0, ids), width=5, stop=False)
    return attack.perturb(view, images, labels, Threat(norm, EPS if norm == "linf" else 0.3), view.rng)


def perturbed_at_once(attack, model: Wrapped, images: Tensor, labels: Tensor, ids: list[str]) -> Tensor:  # type: ignore[no-untyped-def]
    view = View(model, ImageRng(0, ids), width=len(ids), stop=False)
    return attack.perturb(view, images, labels, Threat("linf", EPS), view.rng)


class LastIterate(View):
    """A view that calls itself random, for which an attack scores its last iterate as torchattacks does."""

    def __init__(self, view: View) -> None:
        self.__dict__.update(view.__dict__)

    @property
    def stochastic(self) -> bool:
        return True


@pytest.fixture
def case(conv: Wrapped) -> tuple[Wrapped, Tensor, Tensor, list[str]]:
    return (conv, *labelled(conv, SHAPE, 6))


def test_two_steps_of_momentum_by_hand() -> None:
    """A linear model and the margin loss: the gradient is w_other - w_label everywhere."""
    model = linear((2,), 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, -3.0], [0.0, 0.0]]))
        model.head.bias.copy_(torch.tensor([2.0, 0.0]))
    images, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    view = View(model, ImageRng(0, ["one"]), stop=False)
    found = Mi(steps=2, alpha="0.01", loss="cw").perturb(view, images, labels, Threat("linf", 0.1), view.rng)
    assert torch.allclose(found, torch.tensor([[0.48, 0.52]]))  # against w_label - w_other = (1, -3), twice 0.01
    along = torch.tensor([-1.0, 3.0]) / 10**0.5
    found = Mi(steps=2, alpha="0.01", loss="cw").perturb(view, images, labels, Threat("l2", 0.1), view.rng)
    assert torch.allclose(found, images + 0.02 * along)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_momentum_accumulates_normalised_gradients(case, decay: float) -> None:  # type: ignore[no-untyped-def]
    model, images, labels, ids = case
    alpha = EPS / 3
    x, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(3):
        momentum = unit(slope(model, x, labels)) + decay * momentum
        x = (images + (x + alpha * momentum.sign() - images).clamp(-EPS, EPS)).clamp(0, 1)
    view = LastIterate(View(model, ImageRng(0, ids)))
    last = Mi(steps=3, decay=decay).perturb(view, images, labels, Threat("linf", EPS), view.rng)
    assert torch.allclose(last, x, atol=1e-6)
    best = perturbed(Mi(steps=3, decay=decay), model, images, labels, ids)
    assert (best_margin(model, best, labels) >= best_margin(model, x, labels) - 1e-5).all()


def best_margin(model: Wrapped, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(images).logits
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return other - logits.gather(1, labels[:, None])[:, 0]


def test_nesterov_takes_the_gradient_ahead_of_the_iterate(case) -> None:  # type: ignore[no-untyped-def]
    model, images, labels, ids = case
    alpha, asked = EPS / 4, []

    class Recording(Wrapped):
        def forward(self, pixels: Tensor, rng: ImageRng | None = None) -> Outputs:
            asked.append(pixels.detach().clone())
            return Wrapped.forward(self, pixels, rng)

    model.__class__ = Recording
    found = perturbed_at_once(Ni(steps=4, decay=0.5), model, images, labels, ids)
    seen = asked.copy()
    x, momentum = images.clone(), torch.zeros_like(images)
    for point in seen:
        ahead = (x + 0.5 * alpha * momentum).clamp(0, 1)
        assert torch.allclose(point, ahead, atol=1e-6)
        momentum = unit(slope(model, ahead, labels)) + 0.5 * momentum
        x = (images + (x + alpha * momentum.sign() - images).clamp(-EPS, EPS)).clamp(0, 1)
    assert len(seen) == 4
    assert torch.allclose(found, x, atol=1e-6)


def test_scales_average_the_gradients_of_darker_copies(case) -> None:  # type: ignore[no-untyped-def]
    model, images, labels, ids = case
    x, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(2):
        copies = [slope(model, x / 2**i, labels) / 2**i for i in range(3)]
        momentum = unit(torch.stack(copies).mean(0)) + momentum
        x = (images + (x + EPS / 2 * momentum.sign() - images).clamp(-EPS, EPS)).clamp(0, 1)
    assert torch.allclose(perturbed(Si(steps=2, copies=3), model, images, labels, ids), x, atol=1e-6)


def test_smoothing_is_a_convolution_with_a_gaussian_of_sum_one() -> None:
    weights = gaussian(5, 2.0)
    expected = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64).square().mul(-0.5).exp()
    assert torch.allclose(weights, expected / expected.sum())
    gradient = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    plane = (weights[:, None] * weights).float().expand(3, 1, 5, 5)
    by_hand = F.conv2d(gradient, plane, padding=2, groups=3)
    assert torch.allclose(Ti(kernel=5, radius=2.0).smooth(gradient), by_hand, atol=1e-6)


def test_a_placement_is_a_bilinear_resize_and_a_zero_pad() -> None:
    image = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    for size, place, small, before in [(0.0, 0.0, 6, 0), (0.5, 0.6, 8, 1), (0.3, 0.99, 7, 3), (0.99, 0.9, 10, 0)]:
        matrix = placement(10, 0.6, torch.tensor([size]), torch.tensor([place]))[0]
        expected = torch.zeros(10, 10)
        resized = F.interpolate(image, size=(small, small), mode="bilinear", align_corners=False)[0, 0]
        expected[before : before + small, before : before + small] = resized
        assert torch.allclose(matrix @ image[0, 0] @ matrix.T, expected, atol=1e-6)


def test_placements_reach_every_size_and_place() -> None:
    draws = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    rows = placement(10, 0.8, draws[:, 0], draws[:, 1]).sum(2) > 0.5
    sizes, before = rows.sum(1), rows.float().argmax(1)
    pairs = set(zip(sizes.tolist(), before.tolist(), strict=True))
    assert pairs == {(8, 0), (8, 1), (8, 2), (9, 0), (9, 1), (10, 0)}


def test_diverse_inputs_transform_the_given_share_of_images_each_with_its_own_draw() -> None:
    images = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(1)).expand(400, 3, 10, 10)
    draws = ImageRng(0, [str(i) for i in range(400)]).uniform((4,))
    shown = Di(probability=0.3, smallest=0.7).vary(images, draws)
    changed = (shown != images).flatten(1).any(1)
    assert torch.equal(changed, (draws[:, 0] < 0.3) & changed)
    assert 70 <= int(changed.sum()) <= 150  # 0.3 * 400, less those of full size
    assert len({tuple(image.flatten().tolist()) for image in shown[changed]}) > 10
    assert torch.equal(Di(probability=0.0).vary(images, draws), images)


def test_a_composition_equals_its_parts_by_hand(case) -> None:  # type: ignore[no-untyped-def]
    model, images, labels, ids = case
    attack = ATTACKS.create("mi:steps=3:decay=0.9:plus=[ti:kernel=3]+[si:copies=2]+ni+[di:smallest=0.5:probability=1]")
    alpha, di, ti = EPS / 3, Di(smallest=0.5, probability=1.0), Ti(kernel=3)
    draws = ImageRng(0, ids).child("draws").uniform((3, 2, 4))
    x, momentum = images.clone(), torch.zeros_like(images)
    for number in range(3):
        point = (x + 0.9 * alpha * momentum).clamp(0, 1).requires_grad_(True)
        shown = [di.vary(point * scale, draws[:, number, copy]) for copy, scale in enumerate((1.0, 0.5))]
        loss = sum(F.cross_entropy(model(each).logits, labels, reduction="sum") for each in shown)
        gradient = ti.smooth(torch.autograd.grad(loss, point)[0] / 2)
        momentum = unit(gradient) + 0.9 * momentum
        x = (images + (x + alpha * momentum.sign() - images).clamp(-EPS, EPS)).clamp(0, 1).detach()
    found = perturbed(attack, model, images, labels, ids)
    assert ((found - x).abs() < 1e-5).float().mean() > 0.999  # a sign at the edge of rounding may differ
    other = ATTACKS.create("mi:steps=3:decay=0.9:plus=ni+[di:smallest=0.5:probability=1]+[si:copies=2]+[ti:kernel=3]")
    assert torch.equal(perturbed(other, model, images, labels, ids), found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_zero_gradient_does_not_stop_the_momentum(name: str, norm: str) -> None:
    class Blind(Wrapped):
        """Its first two gradients are zero; the next not a number, for the first image."""

        def forward(self, images: Tensor, rng: ImageRng | None = None) -> Outputs:
            outputs = Wrapped.forward(self, images, rng)
            if not images.requires_grad:
                return outputs
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked < 3:
                return Outputs(outputs.logits.detach() + 0.0 * outputs.logits, outputs.features)
            factor = torch.ones(len(images), 1)
            factor[0] = float("nan") if self.asked == 3 else 1.0
            return Outputs(outputs.logits * factor, outputs.features)

    model = convolutional()
    images, labels, ids = labelled(model, SHAPE, 4)
    model.__class__ = Blind
    options = {"copies": 1} if name == "si" else {}
    attack = ATTACKS.create(name, steps=6, **options)
    found = perturbed(attack, model, images, labels, ids, norm)
    assert found.isfinite().all()
    model.__class__ = Wrapped
    assert (best_margin(model, found, labels) > best_margin(model, images, labels)).all()


@pytest.mark.parametrize(("ours", "theirs"), [("mi", "MIFGSM"), ("ni", "NIFGSM"), ("si", "SINIFGSM")])
def test_iterates_equal_torchattacks(ours: str, theirs: str) -> None:
    """16 images, so that the mean in their loss is an exact power of two; few steps, so that nothing is clamped."""
    import torchattacks

    model = convolutional(seed=3)
    images, labels, ids = labelled(model, SHAPE, 16)
    logits_only = nn.Sequential(model.body, model.head).eval()
    alpha, steps = 1 / 255, 4
    expected = getattr(torchattacks, theirs)(logits_only, eps=EPS, alpha=alpha, steps=steps)(images, labels)
    options = {"plus": "ni", "copies": 5} if ours == "si" else {}
    attack = ATTACKS.create(ours, alpha=str(alpha), steps=steps, **options)
    view = LastIterate(View(model, ImageRng(0, ids), width=16))
    found = attack.perturb(view, images, labels, Threat("linf", EPS), view.rng)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target", ["random", "least"])
def test_a_target_is_reached(name: str, norm: str, target) -> None:  # type: ignore[no-untyped-def]
    model = linear(SHAPE, 5)
    images, labels, ids = labelled(model, SHAPE, 4)
    view = LastIterate(View(model, ImageRng(0, ids)))
    options = {"kernel": 1} if name == "ti" else {}
    attack = ATTACKS.create(name, steps=20, target=target, **options)
    threat = Threat(norm, 0.2 if norm == "linf" else 2.0)
    found = attack.perturb(view, images, labels, threat, view.rng)
    targets = choose_targets(target, view, images, labels, view.rng)
    assert torch.equal(view(found).argmax(1), targets)
    free = ATTACKS.create(name, steps=20, **options).perturb(view, images, labels, threat, view.rng)
    assert not torch.equal(view(free).argmax(1), targets)


@pytest.mark.parametrize(("name", "leaves"), [("mi", True), ("ti", True), ("ni", False), ("di", False), ("si", False)])
def test_an_image_leaves_early_only_where_the_query_is_the_iterate(name: str, leaves: bool) -> None:
    model = convolutional(seed=5)
    images, labels, ids = labelled(model, SHAPE, 12)
    attack = ATTACKS.create(name, steps=12, **({"kernel": 3} if name == "ti" else {}))
    found = attack(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 16 / 255))
    copies = 5 if name == "si" else 1
    assert (int(found.steps.sum()) < 12 * 12) if leaves else (found.steps == 12 * copies).all()


def test_losses_without_a_gradient_at_the_clean_image_need_a_random_start(case) -> None:  # type: ignore[no-untyped-def]
    model, images, labels, ids = case
    with pytest.raises(UserError, match="random_start=yes"):
        Mi(loss="feature")
    found = perturbed(Mi(loss="feature", random_start=True), model, images, labels, ids)
    moved = (model(found).features - model(images).features).norm(dim=1)
    noise = Threat("linf", EPS).random_start(images, ImageRng(1, ids))
    assert (moved > (model(noise).features - model(images).features).norm(dim=1)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mi:steps=0", "steps=0"),
        ("mi:decay=2", "decay=2"),
        ("mi:alpha=fast", "alpha"),
        ("ti:kernel=4", "kernel=4"),
        ("di:probability=2", "probability=2"),
        ("si:copies=0", "copies=0"),
        ("mi:plus=pgd", "no transfer attack"),
        ("mi:plus=di+di", "twice"),
        ("di:plus=di", "twice"),
        ("mi:plus=[di:steps=3]", "steps outside of plus"),
        ("mi:plus=[di:smallest=0.5", "bracket"),
        ("mi:plus=dii", "did you mean"),
    ],
)
def test_wrong_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ATTACKS.create(text)


@pytest.mark.parametrize("name", ["di", "ti"])
def test_images_without_height_and_width_are_refused(name: str) -> None:
    model = linear((8,), 3)
    images, labels, ids = labelled(model, (8,), 2)
    with pytest.raises(UserError, match=r"\(B, C, H, W\)"):
        ATTACKS.create(name)(View(model, ImageRng(0, ids)), images, labels, Threat("linf", 0.1))


def test_a_view_shows_the_transformed_image_and_gives_the_gradient_of_the_image_itself(conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, SHAPE, 3)
    view = View(conv, ImageRng(0, ids))
    query = view.gradient(images, Criterion(labels), LOSSES["cw"], lambda pixels: pixels.flip(3) * 0.5)
    darker = View(conv, ImageRng(0, ids)).gradient(images.flip(3) * 0.5, Criterion(labels), LOSSES["cw"])
    assert torch.equal(query.logits, darker.logits)
    assert torch.allclose(query.pixels, darker.pixels.flip(3) * 0.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "threat"),
    [
        ("mi:alpha=eps/4", "MIFGSM", Threat("linf", EPS)),
        ("ni:alpha=eps/4", "NIFGSM", Threat("linf", EPS)),
        ("si:alpha=eps/4:plus=ni", "SINIFGSM", Threat("linf", EPS)),
        ("cw:steps=50:searches=1:c=1", "CW:c=1:steps=50", Threat("l2", 0.25)),
    ],
    ids=lambda value: str(value).partition(":")[0],
)
def test_no_weaker_than_torchattacks_on_an_embedded_model(ours: str, theirs: str, threat: Threat) -> None:
    """With the same number of gradients and the same step; the two that draw at random are left out."""
    images = load_dataset("fashion", limit=32)
    model = load_model("tiny-vit").zero_shot(images.class_names, ("a photo of a {c}.",))
    batch, _ = load_batch(images, range(32), PixelTransform(32, "bicubic"), skip_bad=False)
    step = ":alpha=2/255" if threat.norm == "linf" else ""
    one, two = (
        ATTACKS.create(text)(View(model, ImageRng(0, batch.ids)), batch.images, batch.labels, threat)
        for text in (ours, f"torchattacks:{theirs}{step}")
    )
    assert int(one.fooled.sum()) >= int(two.fooled.sum())
    assert 4 < int(two.fooled.sum()) < 32  # the 4 that are wrong already, and some more
