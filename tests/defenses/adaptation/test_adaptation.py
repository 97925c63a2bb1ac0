"""Each adaptation loss against values computed by hand or another formula, and what holds for every method."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from vlmdefend.defenses.adaptation import ADAPTATIONS
from vlmdefend.defenses.adaptation._attack import ascend, away_from
from vlmdefend.defenses.adaptation._changed import cropped, cut_out, masked, strongly, weakly
from vlmdefend.defenses.adaptation._domain import domain_loss
from vlmdefend.defenses.adaptation._kernels import kernels, mean_discrepancy
from vlmdefend.defenses.adaptation._reversal import reversal_coefficient, reverse
from vlmdefend.defenses.adaptation.base import UNKNOWN, domains_of
from vlmdefend.defenses.adaptation.bsp import spectral_penalty
from vlmdefend.defenses.adaptation.cdan import certainty as cdan_certainty
from vlmdefend.defenses.adaptation.cdan import conditioned
from vlmdefend.defenses.adaptation.mcc import class_confusion
from vlmdefend.defenses.adaptation.mcd import classifier_discrepancy
from vlmdefend.defenses.adaptation.mdd import disparity_loss
from vlmdefend.defenses.adaptation.rfa import similarity_loss
from vlmdefend.defenses.adaptation.self_training import confident_consistency
from vlmdefend.defenses.adaptation.shot import centroid_labels, mutual_information
from vlmdefend.errors import UnknownName, UserError
from vlmdefend.rng import ImageRng
from vlmdefend.types import Batch, Outputs

LOG2 = math.log(2)


def near(value: Tensor | float, expected: float) -> None:
    assert float(value) == pytest.approx(expected, abs=1e-6)


# gradient reversal


def test_reversal_is_the_identity_forward_and_minus_the_coefficient_backward() -> None:
    x = tensor([1.0, -2.0], requires_grad=True)
    y = reverse(x, 0.3)
    assert torch.equal(y, x)
    (3 * y).sum().backward()
    assert torch.allclose(x.grad, tensor([-0.9, -0.9]))


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [(0, 0.0), (1000, (math.e - 1) / (math.e + 1)), (500, math.tanh(0.25)), (10_000, math.tanh(5.0))],
)
def test_the_coefficient_grows_as_tanh_of_half_the_share(iteration: int, expected: float) -> None:
    near(reversal_coefficient(iteration), expected)
    near(reversal_coefficient(iteration, highest=0.1), 0.1 * expected)


# losses by hand


class _Constant(torch.nn.Module):
    """A discriminator that reads the first feature as its logit."""

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :1]


def test_the_domain_loss_is_half_the_error_of_each_domain() -> None:
    source, target = tensor([[0.0], [math.log(3)]]), tensor([[math.log(3)]])
    # sigmoid: 1/2, 3/4 | 3/4: -log 1/2, -log 3/4 | -log 1/4
    expected = 0.5 * (LOG2 + math.log(4 / 3)) / 2 + 0.5 * math.log(4)
    near(domain_loss(_Constant(), source, target, 1.0), expected)
    weighted = domain_loss(_Constant(), source, target, 1.0, (tensor([2.0, 0.0]), tensor([1.0])))
    near(weighted, 0.5 * (2 * LOG2) / 2 + 0.5 * math.log(4))


def test_features_climb_the_domain_loss_that_the_discriminator_descends() -> None:
    source, target = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    domain_loss(_Constant(), source, target, 1.0).backward()
    assert float(source.grad) > 0  # plainly it would be -1/4: descending would make the source look like the source


def test_cdan_multiplies_prediction_and_features_and_weights_by_confidence() -> None:
    outputs = Outputs(tensor([[math.log(3), 0.0]]), tensor([[2.0, 4.0]]))
    assert torch.allclose(conditioned(outputs), tensor([[1.5, 3.0, 0.5, 1.0]]))
    weights = cdan_certainty(tensor([[100.0, 0.0], [0.0, 0.0]]))  # 1 + e^0 = 2, 1 + e^-log 2 = 3/2
    assert torch.allclose(weights, tensor([2 / 1.75, 1.5 / 1.75]))


def test_mcc_is_zero_for_sure_and_even_classes_and_known_for_two_images() -> None:
    near(class_confusion(tensor([[90.0, 0.0], [0.0, 90.0]]), 1.0), 0.0)
    near(class_confusion(torch.zeros(2, 2), 2.5), 0.5)  # every row of the confusion is (1/2, 1/2)
    p = 0.75
    # predictions (p, q) and (q, p) weigh the same: rows (p^2 + q^2, 2pq) of sum 1, over 2 classes
    logits = tensor([[math.log(3), 0.0], [0.0, math.log(3)]]) * 2.5
    near(class_confusion(logits, 2.5), 2 * p * (1 - p))


def test_mdd_by_hand() -> None:
    source, second_source = tensor([[2.0, 0.0]]), tensor([[0.0, 0.0]])  # class 0; second head even: -log 1/2
    target, second_target = tensor([[0.0, 1.0]]), tensor([[math.log(3), 0.0]])  # class 1; second head 1/4 there
    loss = disparity_loss(source, second_source, target, second_target, 4.0)
    near(loss, 4 * LOG2 - math.log(3 / 4))


def test_the_mean_discrepancy_of_four_points_by_hand() -> None:
    points = tensor([[0.0], [1.0], [0.0], [3.0]])
    kernel = kernels(points, (1.0,), fixed=0.5)  # exp(-d^2)
    within = math.exp(-1) + math.exp(-9)
    between = (1 + math.exp(-9) + math.exp(-1) + math.exp(-4)) / 4
    near(mean_discrepancy(kernel, 2), within - 2 * between)
    # the width follows the mean squared distance of all pairs: 2 (1 + 0 + 9 + 1 + 4 + 9) / 16 = 3
    near(kernels(points, (1.0,))[0, 1], math.exp(-1 / 6))
    with pytest.raises(UserError, match="two images of each domain"):
        mean_discrepancy(kernel, 1)


def test_mcd_bsp_and_rfa_by_hand() -> None:
    near(classifier_discrepancy(tensor([[math.log(3), 0.0]]), tensor([[0.0, 0.0]])), 0.25)
    near(spectral_penalty(tensor([[3.0, 0.0], [0.0, 1.0]]), tensor([[0.0, 2.0]])), 9 + 4)
    # Gram matrices (1 0; 0 1) and (1 1; 1 1), rows to unit length: differences 1 - r, r twice, with r = 1/sqrt 2
    r = math.sqrt(0.5)
    near(similarity_loss(torch.eye(2), torch.ones(2, 1)), 2 * ((1 - r) ** 2 + r**2) / 4)
    near(similarity_loss(tensor([[1.0, 2.0], [0.5, -1.0]]), tensor([[3.0, 6.0], [1.5, -3.0]])), 0.0)


def test_consistency_counts_sure_images_alone_over_all() -> None:
    weak = tensor([[5.0, 0.0], [0.1, 0.0]])
    strong = tensor([[0.0, 0.0], [0.0, 9.0]])
    loss, used = confident_consistency(weak, strong, 0.95)
    near(loss, LOG2 / 2)
    near(used, 0.5)


def test_shot_wants_sure_predictions_of_all_classes() -> None:
    near(mutual_information(tensor([[90.0, 0.0], [0.0, 90.0]])), LOG2)
    near(mutual_information(tensor([[90.0, 0.0], [90.0, 0.0]])), 0.0)
    near(mutual_information(torch.zeros(3, 2)), 0.0)


def test_shot_gives_a_stray_image_the_class_of_its_neighbours() -> None:
    features = tensor([[1.0, 0.0], [0.9, 0.1], [0.95, 0.0], [0.0, 1.0], [0.1, 1.0]])
    logits = tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    assert centroid_labels(features, logits).tolist() == [0, 0, 0, 1, 1]


# attacks


def test_the_attack_on_a_linear_model_ends_in_the_corner_and_inside_the_ball() -> None:
    weight = tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    images = tensor([[0.5, 0.5, 0.99]])
    found = ascend(away_from(lambda x: x @ weight.T, tensor([0])), images, eps=0.1, alpha=0.05, steps=10)
    assert torch.allclose(found, tensor([[0.4, 0.6, 0.89]]))
    same = ascend(away_from(lambda x: x @ weight.T, tensor([0])), images, eps=0.0, alpha=0.05, steps=2)
    assert torch.equal(same, images)


# changed images


@pytest.mark.parametrize(
    "change",
    [weakly, strongly, cut_out, masked, lambda x, rng: cropped(x, rng, flip=True)],
    ids=["weak", "strong", "cut out", "masked", "cropped"],
)
def test_an_image_is_changed_alike_whatever_its_batch_and_stays_in_range(change) -> None:
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    together = change(images, ImageRng(0, ["a", "b", "c"], "x"))
    alone = change(images[1:2], ImageRng(0, ["b"], "x"))
    assert torch.allclose(together[1:2], alone, atol=1e-6)
    assert not torch.allclose(together, images)
    assert float(together.min()) >= 0
    assert float(together.max()) <= 1


def test_a_quarter_of_the_cells_is_hidden() -> None:
    found = masked(torch.ones(5, 3, 12, 12), ImageRng(0, list("abcde"), "x"))
    assert (found == 0).sum(dim=(1, 2, 3)).tolist() == [3 * 36] * 5
    cells = found.view(5, 3, 4, 3, 4, 3).amax(dim=(1, 3, 5))
    assert torch.equal(cells, found.view(5, 3, 4, 3, 4, 3).amin(dim=(1, 3, 5)))  # whole cells, in all channels


# contract


def test_target_images_are_recognised_by_their_unknown_labels() -> None:
    batch = Batch(["s", "t", "u"], torch.zeros(3, 3, 2, 2), tensor([4, UNKNOWN, UNKNOWN]))
    pair = domains_of(batch)
    assert (pair.source.ids, pair.target.ids) == (["s"], ["t", "u"])


@pytest.mark.parametrize("name", ADAPTATIONS.names())
def test_every_method_says_what_it_is(name: str) -> None:
    method = ADAPTATIONS.create(name)
    assert method.name == name
    assert method.summary
    assert method.citation
    assert method.role in ("adaptation", "robustification")
    assert repr(method).startswith(type(method).__name__)


def test_the_other_dart_is_another_method_and_dart_alone_is_neither() -> None:
    assert {"dart-urda", "dart-dad"} <= set(ADAPTATIONS.names())
    with pytest.raises(UnknownName, match="dart-"):
        ADAPTATIONS.create("dart")


def test_jan_multiplies_the_kernels_of_features_and_predictions() -> None:
    features, predictions = tensor([[0.0], [1.0], [2.0]]), tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    joint = kernels(features, (1.0,), fixed=0.5) * kernels(predictions, (1.0,), fixed=0.92**2)
    near(joint[0, 1], math.exp(-1) * math.exp(-0.5 / (2 * 0.92**2)))
    assert torch.allclose(F.relu(joint - 1), torch.zeros(3, 3))
