"""CLIPure-Diff follows its prior's loss, takes priors of any make, and is attacked through its true gradient."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmdefend
from vlmdefend.defenses.training_free import _diffusion_prior
from vlmdefend.defenses.training_free._diffusion_prior import (
    Gaussian,
    PriorTransformer,
    TextCondition,
    condition_of,
    cosine_signal,
    denoising_loss,
    load_prior,
)
from vlmdefend.defenses.training_free.clipure_diff import ClipureDiff, _Purified
from vlmdefend.errors import UserError
from vlmdefend.models.zero_shot.classifier import ZeroShotClassifier
from vlmdefend.rng import ImageRng
from vlmdefend.types import Outputs, Pipeline

CPU = torch.device("cpu")


class Quadratic:
    """The loss |x - target|^2 / D, whatever the noise: it takes n - (x - target) for the noise where signal is 1/2."""

    reads_states = False
    signal = torch.full((1000,), 0.5)

    def __init__(self, target: Tensor) -> None:
        self.target, self.times = target, torch.zeros(0, dtype=torch.int64)

    def prepared(self, embeddings: Tensor) -> Tensor:
        return embeddings - self.target

    def noise(self, noisy: Tensor, time: Tensor, condition: TextCondition) -> Tensor:
        self.times = torch.cat([self.times, time])
        return noisy * math.sqrt(2)  # x - target + n


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    return vlmdefend.load_model("tiny-rn", device="cpu").zero_shot(("cat", "dog", "boat"), ["a photo of a {c}."])


def condition(dimension: int) -> TextCondition:
    return TextCondition(F.normalize(torch.ones(dimension), dim=0))


def rng(count: int) -> ImageRng:
    return ImageRng(0, [str(i) for i in range(count)])


def test_a_step_goes_down_the_loss_by_eta_and_back_to_the_sphere() -> None:
    """At u the gradient of |r u - t|^2 is along r u - t; lengths of the embeddings stay."""
    features, target = torch.tensor([[2.0, 0.0], [0.0, 0.5]]), torch.tensor([1.0, 1.0])
    prior = Quadratic(target)
    found = ClipureDiff(steps=1, eta=3.0).purify(features, prior, condition(2), rng(2))
    down = F.normalize(target - features, dim=1)
    units = F.normalize(features, dim=1)
    assert torch.allclose(found, features.norm(dim=1, keepdim=True) * F.normalize(units + 3 * down, dim=1), atol=1e-6)


def test_each_image_and_step_has_a_late_step_of_the_diffusion_of_its_own() -> None:
    prior = Quadratic(torch.zeros(4))
    ClipureDiff(steps=6).purify(torch.randn(20, 4), prior, condition(4), rng(20))
    assert prior.times.min() >= 900
    assert prior.times.max() <= 999
    assert len(prior.times.unique()) > 50


def test_the_schedule_is_nichols() -> None:
    """alpha bar(t) = f(t) / f(0) up to the last steps, where beta is capped at 0.999."""
    signal = cosine_signal()

    def curve(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert float(signal[499]) == pytest.approx(curve(500) / curve(0), rel=1e-5)
    assert float(signal[899]) == pytest.approx(curve(900) / curve(0), rel=1e-5)
    assert float(signal[-1] / signal[-2]) == pytest.approx(0.001, rel=1e-3)


def test_the_gaussian_prior_gives_the_expected_noise() -> None:
    """x and n standard normal: E[n | noisy] is the regression of n on sqrt(a) x + sqrt(1 - a) n."""
    prior, generator = Gaussian(), torch.Generator().manual_seed(0)
    time = torch.full((200_000,), 300)
    left = float(prior.signal[300])
    mean = 2 * condition(4).features  # sqrt(D) times the unit text
    x, n = (torch.randn(200_000, 4, generator=generator) for _ in range(2))
    noisy = math.sqrt(left) * (mean + x) + math.sqrt(1 - left) * n
    error = prior.noise(noisy, time, condition(4)) - n
    assert float(error.mean()) == pytest.approx(0.0, abs=0.01)
    assert float((error * noisy).mean()) == pytest.approx(0.0, abs=0.01)  # nothing left that noisy could explain
    assert float(error.square().mean()) == pytest.approx(left, rel=0.02)


def test_the_loss_by_hand() -> None:
    prior = Gaussian()
    units, noise, time = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, -1.0]]), torch.tensor([950])
    left = float(prior.signal[950])
    away = math.sqrt(2) * (units - condition(2).features)
    expected = left * (math.sqrt(left) * noise - math.sqrt(1 - left) * away).square().mean()
    found = denoising_loss(prior, 7 * units, time, noise, condition(2))  # of any length
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


class Embeds:
    """Features are the first pixels, classes the axes."""

    num_classes, stochastic = 3, False
    text_features, blank_features = torch.eye(3), F.normalize(torch.ones(3), dim=0)
    std = torch.ones(3, 1, 1)

    def __call__(self, images: Tensor, rng: ImageRng) -> Outputs:
        features = images.flatten(1)[:, :3]
        return Outputs(self.logits(features), features)

    def logits(self, features: Tensor) -> Tensor:
        return 10 * F.normalize(features, dim=-1)


def test_the_first_surrogate_has_the_gradient_of_finite_differences_and_the_deployed_pipeline_has_not() -> None:
    image = (0.2 + 0.6 * torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))).double()
    defense = ClipureDiff(steps=3, eta=0.7)

    def value(pipeline: Pipeline, at: Tensor) -> Tensor:
        return pipeline(at, ImageRng(0, ["a"])).logits[:, 0].sum()

    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)).double()
    deployed, (unrolled, identity) = defense.wrap(Embeds()), defense.surrogates(Embeds())
    with torch.no_grad():
        slope = (value(deployed, image + 1e-6 * direction) - value(deployed, image - 1e-6 * direction)) / 2e-6
    slopes = []
    for pipeline in (deployed, unrolled, identity):
        pixels = image.clone().requires_grad_(True)
        slopes.append(float((torch.autograd.grad(value(pipeline, pixels), pixels)[0] * direction).sum()))
    assert slopes[1] == pytest.approx(float(slope), rel=1e-3)
    assert slopes[0] != pytest.approx(float(slope), rel=0.05)
    purified = deployed(image, ImageRng(0, ["a"])).features
    assert purified is not None
    at = purified.clone().requires_grad_(True)
    passed = torch.autograd.grad(Embeds().logits(at)[:, 0].sum(), at)[0] @ direction.flatten(1)[:, :3].T
    assert slopes[2] == pytest.approx(float(passed), rel=1e-4)  # as if the purified embedding were the image's


def test_steps_towards_the_text_are_what_the_gaussian_makes_of_them(classifier: ZeroShotClassifier) -> None:
    """At the last step of the diffusion next to nothing of the noise counts, and CLIPure-Cos is left."""
    features = classifier.features(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    text = condition_of(classifier, states=False)
    found = ClipureDiff(steps=1, eta=0.5, earliest=999).purify(features, Gaussian(), text, rng(4))
    units = F.normalize(features, dim=1)
    towards = F.normalize(text.features - (units @ text.features)[:, None] * units, dim=1)
    assert torch.allclose(F.normalize(found, dim=1), F.normalize(units + 0.5 * towards, dim=1), atol=1e-3)


class Network(nn.Module):
    """What diffusers' PriorTransformer is to us, small: the embedding is a mixture of what it is told."""

    def __init__(self, size: int, *, reads: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(embedding_dim=size)
        self.clip_mean, self.clip_std = (
            nn.Parameter(torch.full((1, size), 0.5)),
            nn.Parameter(torch.full((1, size), 2.0)),
        )
        self.encoder_hidden_states_proj = nn.Linear(size, size) if reads else None
        self.asked: dict[str, Tensor] = {}

    def forward(self, hidden_states: Tensor, timestep: Tensor, **told: Tensor) -> SimpleNamespace:
        self.asked = told
        return SimpleNamespace(predicted_image_embedding=hidden_states + told["proj_embedding"])


def test_a_prior_that_predicts_the_embedding_has_the_loss_of_its_error() -> None:
    """Up to the step's constant: noise error = sqrt(a / (1 - a)) times embedding error."""
    prior = PriorTransformer(Network(2, reads=False))
    embeddings, noise, time = torch.tensor([[2.5, -1.5]]), torch.tensor([[0.5, -1.0]]), torch.tensor([920])
    x = torch.tensor([[1.0, -1.0]])  # less the mean, by the deviation
    left = float(prior.signal[920])
    noisy = math.sqrt(left) * x + math.sqrt(1 - left) * noise
    error = noisy + condition(2).features - x
    found = denoising_loss(prior, embeddings, time, noise, condition(2))
    assert float(found.detach()) == pytest.approx(float((left / (1 - left) * error.square().mean()).detach()), rel=1e-4)


def test_a_prior_that_reads_tokens_receives_the_text_towers_output_per_token(classifier: ZeroShotClassifier) -> None:
    network = Network(64, reads=True)
    prior = PriorTransformer(network)
    told = condition_of(classifier, states=prior.reads_states)
    assert told.states is not None
    assert told.mask is not None
    assert told.pooled is not None
    prior.noise(torch.zeros(3, 64), torch.tensor([900, 950, 999]), told)
    assert network.asked["encoder_hidden_states"].shape == (3, 24, 64)
    assert network.asked["attention_mask"].sum(dim=1).tolist() == [7, 7, 7]  # start, "a photo of a .", end
    side = classifier.text_side
    assert side is not None
    tokens = side.states(["a photo of a ."])[0]
    assert torch.allclose(F.normalize(told.pooled, dim=0), side.encode(tokens)[0], atol=1e-5)
    end = told.states[6] @ classifier.clip.text_projection  # what the tower pools
    assert torch.allclose(end, told.pooled, atol=1e-4)
    assert not classifier.clip.ln_final._forward_hooks


def test_an_embedding_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="embeddings of 2 numbers, the model gives 3"):
        PriorTransformer(Network(2, reads=False)).prepared(torch.ones(1, 3))


def test_a_folder_without_diffusers_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    load_prior.cache_clear()
    with pytest.raises(UserError, match="pip install diffusers"):
        load_prior(str(tmp_path), CPU)


def test_a_folder_is_read_by_diffusers_from_safetensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    class Reader:
        @staticmethod
        def from_pretrained(folder: str, **options: object) -> nn.Module:
            asked.update(options, folder=folder)
            return Network(64, reads=False)

    (tmp_path / "config.json").write_text("{}")
    module = ModuleType("diffusers")
    module.PriorTransformer = Reader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", module)
    load_prior.cache_clear()
    prior = load_prior(str(tmp_path), CPU)
    assert asked == {"folder": str(tmp_path), "local_files_only": True, "use_safetensors": True}
    assert isinstance(prior, PriorTransformer)
    assert not any(parameter.requires_grad for parameter in prior.network.parameters())
    assert load_prior(str(tmp_path), CPU) is prior  # gigabytes, once


def test_a_python_function_gives_a_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_prior")
    module.load = lambda device: Quadratic(torch.zeros(3, device=device))  # type: ignore[attr-defined]
    module.broken = lambda device: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_prior", module)
    load_prior.cache_clear()
    pipeline = ClipureDiff(prior="[python:my_prior:load]", steps=1).wrap(Embeds())
    assert isinstance(pipeline, _Purified)
    assert isinstance(pipeline.prior, Quadratic)
    for text, reason in (
        ("python:no_such_module:load", "No module"),
        ("python:my_prior:absent", "absent"),
        ("python:my_prior:broken", "has no signal"),
        ("no/such/folder", "neither gaussian"),
    ):
        with pytest.raises(UserError, match=reason):
            load_prior(text, CPU)


def test_bad_use_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="steps=-1"):
        ClipureDiff(steps=-1)
    with pytest.raises(UserError, match="earliest=5"):
        ClipureDiff(earliest=5, latest=4)
    with pytest.raises(UserError, match="1000 steps"):
        ClipureDiff(latest=1000).wrap(Embeds())
    monkeypatch.setattr(Embeds, "blank_features", None)
    with pytest.raises(UserError, match="anchor=classes"):
        ClipureDiff().wrap(Embeds())
    ClipureDiff(anchor="classes").wrap(Embeds())
    monkeypatch.setattr(_diffusion_prior.Gaussian, "reads_states", True)
    load_prior.cache_clear()
    with pytest.raises(UserError, match="out of reach"):
        ClipureDiff(anchor="classes").wrap(Embeds())
