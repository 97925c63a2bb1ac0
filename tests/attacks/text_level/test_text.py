"""Attacks on the prompts: the budget is in tokens, every token is chosen by gradient and verified."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.attacks.conftest import Wrapped, convolutional, labelled
from tests.attacks.spoken import WORDS, Spoken
from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.criterion import Criterion
from vlmdefend.attacks.gradient.pgd import Pgd
from vlmdefend.attacks.losses import LOSSES
from vlmdefend.attacks.text_level._prompt_scores import PromptScores
from vlmdefend.attacks.text_level._prompts import first_order_gains
from vlmdefend.attacks.text_level._text_level import TextLevel
from vlmdefend.attacks.text_level.co import Co
from vlmdefend.attacks.text_level.text import Text
from vlmdefend.attacks.view import View
from vlmdefend.data import load_dataset
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.models.zero_shot.text_side import TextSide, ensembled
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline, Threat

MODES = [("suffix", False), ("suffix", True), ("substitute", False), ("substitute", True)]
QUICK: dict[str, Any] = {"candidates": 12, "beams": 1}


class Fashion(NamedTuple):
    model: ZeroShotClassifier
    side: TextSide
    images: Tensor
    labels: Tensor
    ids: list[str]

    def view(self, pipeline: Pipeline | None = None, **options: Any) -> View:
        return View(pipeline or self.model, ImageRng(0, self.ids), model=self.model, **options)


@pytest.fixture(scope="module")
def fashion() -> Fashion:
    model = load_model("tiny-vit", device="cpu")
    data = load_dataset("fashion", "test", limit=60)
    batch, _ = load_batch(data, range(60), PixelTransform(model.image_size, model.interpolation), skip_bad=False)
    classifier = model.zero_shot(data.class_names, ("a photo of a {c}.", "the {c} here"))
    assert classifier.text_side is not None
    return Fashion(classifier, classifier.text_side, batch.images, batch.labels, batch.ids)


def learned(attack: TextLevel, fashion: Fashion, k: int) -> TextLevel:
    found = attack.fit(fashion.view(), fashion.images, fashion.labels, Threat("tokens", float(k)))
    assert isinstance(found, TextLevel)
    return found


def robust(attack: TextLevel, fashion: Fashion, threat: Threat) -> int:
    return int((~attack(fashion.view(), fashion.images, fashion.labels, threat).fooled).sum())


@pytest.mark.parametrize(("mode", "per_class"), MODES)
def test_at_most_k_tokens_differ_and_class_names_stay(mode: Any, per_class: bool, fashion: Fashion) -> None:
    side = fashion.side
    fitted = learned(Text(mode=mode, per_class=per_class, **QUICK), fashion, 2)
    assert fitted.learned is not None
    tokens = fitted.learned.tokens
    for c in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            clean, now = side.tokens[c, t], tokens[c, t]
            end, new_end = int(side.ends_of(clean)), int(side.ends_of(now))
            slots = side.slots[t][c].tolist()
            names = [i for i in range(1, end) if i not in slots]
            assert torch.equal(now[names], clean[names])
            assert (now[new_end + 1 :] == 0).all()
            if mode == "suffix":
                assert new_end - end <= 2
                assert torch.equal(now[:end], clean[:end])
            else:
                assert new_end == end
                assert int((now != clean).sum()) <= 2
            changed = [int(v) for v in now[1:new_end] if int(v) not in clean[1:end].tolist()]
            assert side.usable(words=True)[changed].all()


@pytest.mark.parametrize("mode", ["suffix", "substitute"])
def test_without_per_class_all_classes_get_the_same_tokens(mode: Any, fashion: Fashion) -> None:
    fitted = learned(Text(mode=mode, **QUICK), fashion, 2)
    assert fitted.learned is not None
    side, tokens = fashion.side, fitted.learned.tokens
    for t in range(tokens.shape[1]):
        if mode == "substitute":
            assert (
                len({tuple(row[slots].tolist()) for row, slots in zip(tokens[:, t], side.slots[t], strict=True)}) == 1
            )
        else:
            ends, new = side.ends[:, t], side.ends_of(tokens[:, t])
            assert len({tuple(row[a:b].tolist()) for row, a, b in zip(tokens[:, t], ends, new, strict=True)}) == 1


@pytest.mark.parametrize(("mode", "per_class"), MODES)
def test_accuracy_never_rises_with_k_and_falls_under_one_token(mode: Any, per_class: bool, fashion: Fashion) -> None:
    attack = Text(mode=mode, per_class=per_class, **QUICK)
    clean = int((fashion.view()(fashion.images).argmax(dim=1) == fashion.labels).sum())
    left = [robust(learned(attack, fashion, k), fashion, Threat("tokens", float(k))) for k in (1, 2, 3)]
    assert clean > left[0] >= left[1] >= left[2]


def test_beams_carry_several_prompts_and_never_end_worse_with_more_rounds(fashion: Fashion) -> None:
    attack = Text(candidates=8, beams=3, sweeps=0)
    scores = [learned(attack, fashion, k).learned for k in (1, 2)]
    assert scores[0] is not None
    assert scores[1] is not None
    assert not scores[0].score.better(scores[1].score)


def test_the_found_prompts_are_scored_by_the_whole_pipeline(fashion: Fashion) -> None:
    """The score over kept embeddings equals a count over images and prompts that are encoded from their text."""
    fitted = learned(Text(**QUICK), fashion, 2)
    assert fitted.learned is not None
    clean = fashion.view()(fashion.images).argmax(dim=1) == fashion.labels
    tokens = fashion.side._tokenizer([fashion.side.decode(row) for row in fitted.learned.tokens.flatten(0, 1)])
    assert torch.equal(tokens, fitted.learned.tokens.flatten(0, 1))
    features = fashion.side.features(tokens.unflatten(0, fitted.learned.tokens.shape[:2]))
    with fashion.side.using(features):
        right = fashion.view()(fashion.images).argmax(dim=1) == fashion.labels
    assert fitted.learned.score.right == int((clean & right).sum())
    assert robust(fitted, fashion, Threat("tokens", 2.0)) == fitted.learned.score.right
    assert fitted.attacked_prompts(fashion.side)[5].startswith("a photo of a sandal . ")


def test_first_order_gains_are_the_derivative_of_the_loss(fashion: Fashion) -> None:
    """A step of size h from the present one-hot to another token's changes the loss by h times the gain."""
    side, answers = fashion.side, PromptScores(fashion.view(), fashion.side, fashion.images, fashion.labels)
    rows = torch.tensor([0, 2, 4])  # the first template of three classes
    places = side.slots[0][:3]
    flat, column, step = side.tokens.flatten(0, 1), 1, 1e-2
    gains = first_order_gains(side.gradient(side.tokens, rows, answers.gradient), flat[rows], places, side.table)
    token = int(gains[column].argmax())

    def loss(amount: float) -> float:
        embeddings = side.table[flat].clone()
        at = places[:, column]
        embeddings[rows, at] = (1 - amount) * embeddings[rows, at] + amount * side.table[token]
        return answers.score(ensembled(side.encode(flat, embeddings).unflatten(0, side.tokens.shape[:2]))).loss

    expected = (loss(step) - loss(-step)) / (2 * step)
    assert abs(expected) > 1e-3
    assert float(gains[column, token]) == pytest.approx(expected, rel=0.02)


def test_gains_of_a_hand_computed_example() -> None:
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    gradient = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [1.0, 1.0]]])  # two prompts of two tokens
    rows = torch.tensor([[0, 1], [0, 2]])
    places = torch.tensor([[0], [0]])
    # summed gradient (1, 1): 1, 1, 4 for the three tokens; present: (1,0)·(1,0) + (0,1)·(1,0) = 1
    assert first_order_gains(gradient, rows, places, table).tolist() == [[0.0, 0.0, 3.0]]


def identity(outputs: Outputs, features: Tensor) -> Outputs:
    return outputs


def temperature(outputs: Outputs, features: Tensor) -> Outputs:
    return Outputs(2 * outputs.logits, features)


class Around:
    """A pipeline around the model."""

    stochastic = False

    def __init__(self, model: ZeroShotClassifier, change: Callable[[Outputs, Tensor], Outputs]) -> None:
        self.model, self.change, self.num_classes, self.asked = model, change, model.num_classes, 0

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        self.asked += len(images)
        outputs = self.model(images, rng)
        assert outputs.features is not None
        return self.change(outputs, outputs.features)


def turned(model: ZeroShotClassifier, outputs: Outputs, features: Tensor) -> Outputs:
    """The embedding depends on the prompts."""
    features = features + features.norm(dim=1, keepdim=True) * model.text_features.mean(dim=0)
    return Outputs(model.logits(features), features)


def test_embeddings_are_kept_only_where_the_prompts_leave_them_alone(fashion: Fashion) -> None:
    cases = {True: [identity], False: [temperature, partial(turned, fashion.model)]}
    for keeps, changes in cases.items():
        for change in changes:
            pipeline = Around(fashion.model, change)
            answers = PromptScores(fashion.view(pipeline, width=16), fashion.side, fashion.images, fashion.labels)
            assert answers.keeps_embeddings == keeps
            other = fashion.model.text_features.roll(1, dims=0)
            before = pipeline.asked
            found, gradient = answers.logits(other), answers.gradient(other)
            assert (pipeline.asked == before) == keeps
            with fashion.side.using(other), torch.no_grad():
                expected = pipeline(answers.images, ImageRng(0, [""] * len(answers))).logits
            assert torch.allclose(found, expected, atol=1e-3)
            assert gradient.abs().max() > 0


def test_the_gradient_for_class_features_equals_autograd_over_all_images(fashion: Fashion) -> None:
    answers = PromptScores(fashion.view(width=16), fashion.side, fashion.images, fashion.labels)
    classes = fashion.model.text_features.roll(1, dims=0).clone().requires_grad_(True)
    with fashion.side.using(classes):
        logits = fashion.model(answers.images).logits
    right = logits.argmax(dim=1) == answers.labels
    losses = torch.nn.functional.cross_entropy(logits, answers.labels, reduction="none")
    for still_right, value in ((False, losses.mean()), (True, losses[right].mean() if right.any() else losses.mean())):
        (expected,) = torch.autograd.grad(value, classes, retain_graph=True)
        found = answers.gradient(classes.detach(), still_right=still_right)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_text_leaves_the_images_as_they_are_to_the_bit(fashion: Fashion) -> None:
    before = fashion.images.clone()
    fitted = learned(Text(**QUICK), fashion, 1)
    found = fitted(fashion.view(), fashion.images, fashion.labels, Threat("tokens", 1.0))
    assert torch.equal(found.images, before)
    assert torch.equal(fashion.images, before)
    assert found.outside == 0


def test_nothing_of_the_model_changes(fashion: Fashion) -> None:
    features, state = fashion.model.text_features, torch.random.get_rng_state()
    fitted = learned(Co(**QUICK, steps=2), fashion, 1)
    fitted(fashion.view(), fashion.images[:], fashion.labels, Threat("linf", 1 / 255))
    assert fashion.model.text_features is features
    assert all(p.grad is None and not p.requires_grad for p in fashion.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_same_images_teach_the_same_prompts(fashion: Fashion) -> None:
    first, second = (learned(Text(**QUICK), fashion, 2).learned for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("loss", ["co", "ce"])
def test_co_leaves_no_more_images_right_than_pgd_alone(loss: Any, fashion: Fashion) -> None:
    threat = Threat("linf", 2 / 255)
    alone = Pgd(steps=5)(fashion.view(), fashion.images, fashion.labels, threat)
    fitted = Co(steps=5, loss=loss, **QUICK).fit(fashion.view(), fashion.images, fashion.labels, threat)
    both = fitted(fashion.view(), fashion.images, fashion.labels, threat)
    text = robust(learned(Text(**QUICK), fashion, 1), fashion, Threat("tokens", 1.0))
    assert int((~both.fooled).sum()) <= min(int((~alone.fooled).sum()), text)
    assert threat.contains(both.images, fashion.images).all()


def test_the_loss_of_co_is_three_cross_entropies_and_the_divergence_of_embeddings() -> None:
    clean, moved = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])  # softmax: 1/2 1/2 and 1/4 3/4
    criterion = Criterion(torch.tensor([0]), reference=Outputs(torch.zeros(1, 2), clean))
    found = LOSSES["co"](Outputs(torch.zeros(1, 2), moved), criterion)
    divergence = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert found.item() == pytest.approx(3 * 0.6931472 + divergence.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["text", "co"])
def test_a_view_without_a_text_side_is_refused(name: str, conv: Wrapped) -> None:
    images, labels, ids = labelled(conv, (3, 8, 8), 4)
    with pytest.raises(UserError, match=f"attack {name} needs a model whose text tower can be reached"):
        ATTACKS.create(name).fit(View(conv, ImageRng(0, ids)), images, labels, Threat("tokens", 1.0))


def test_an_attack_before_it_learned_is_refused(fashion: Fashion) -> None:
    with pytest.raises(UserError, match=r"call fit\(view"):
        Text()(fashion.view(), fashion.images, fashion.labels, Threat("tokens", 1.0))


def test_prompts_of_two_tokens_are_refused_where_one_is_allowed(fashion: Fashion) -> None:
    fitted = learned(Text(**QUICK), fashion, 2)
    assert max(map(len, fitted.learned.changed)) == 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match="learned prompts with 2 changed tokens"):
        fitted(fashion.view(), fashion.images, fashion.labels, Threat("tokens", 1.0))


def test_templates_of_nothing_but_the_name_cannot_be_substituted() -> None:
    model = load_model("tiny-vit", device="cpu").zero_shot(("cat", "dog"), ("{c}",))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    view = View(model, ImageRng(0, list("abcd")))
    with pytest.raises(UserError, match="nothing but the class name"):
        Text(mode="substitute").fit(view, images, torch.tensor([0, 1, 0, 1]), Threat("tokens", 1.0))


def test_an_attack_on_the_prompts_inside_of_a_wrapper_is_refused() -> None:
    with pytest.raises(UserError, match="changes the prompts"):
        ATTACKS.create("worst-of", attacks="co+pgd")


def test_where_no_image_is_right_the_prompts_stay_clean(fashion: Fashion) -> None:
    wrong = (fashion.view()(fashion.images).argmax(dim=1) + 1) % 10
    fitted = Text().fit(fashion.view(), fashion.images, wrong, Threat("tokens", 2.0))
    assert isinstance(fitted, Text)
    assert fitted.learned is not None
    assert torch.equal(fitted.learned.tokens, fashion.side.tokens)


def test_the_best_word_is_found_among_all() -> None:
    """With as many candidates as words, one token is the best of an exhaustive search."""
    model = convolutional(seed=4)
    images, labels, ids = labelled(model, (3, 8, 8), 24)
    spoken = Spoken(model, strength=2.0)
    view = View(model, ImageRng(0, ids), model=spoken)
    side, answers = spoken.text_side, PromptScores(view, spoken.text_side, images, labels)
    words = side.usable(words=True).nonzero()[:, 0].tolist()
    assert len(words) >= len(WORDS)
    tried = [answers.score(side.features(side.with_appended(side.tokens[:, 0], w)[:, None])) for w in words]
    best = min(tried, key=lambda score: (score.right, -score.loss))
    found = Text(candidates=100, sweeps=0).fit(view, images, labels, Threat("tokens", 1.0))
    assert isinstance(found, Text)
    assert found.learned is not None
    assert best.right < len(answers)
    assert found.learned.score == best
