"""Prompts that train: what moves and what does not, how often the text tower runs, and what comes out of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.conftest import CLASSES, EPS, TEMPLATES, batch_of, classifier, student_of
from tests.training.test_train_methods import Broken, training
from vlmdefend.data import load_dataset
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses.training_time import OBJECTIVES
from vlmdefend.errors import UserError
from vlmdefend.models import load_model
from vlmdefend.models.context import ContextReader
from vlmdefend.models.vision_language import VisionLanguageModel
from vlmdefend.rng import ImageRng
from vlmdefend.training.data import TrainingImages
from vlmdefend.training.listener import Listener
from vlmdefend.training.prompts import choose_prompts
from vlmdefend.training.stage import Optimization
from vlmdefend.training.stored import FILE
from vlmdefend.training.student import Accumulator, TrainedStudent, make_optimizer, update

CASES = [
    ("apt", "context:4", "rn"),
    ("apt", "context:4", "vit"),
    ("apt:prompting=constant", "class-context:2", "vit"),
    ("apt:prompting=perturbed", "context:4", "vit"),
    ("advpt", "context:4", "rn"),
    ("advpt", "class-context:2", "vit"),
    ("fap", "deep:2", "vit"),
    ("fap", "deep:3x1", "vit"),
]


def loaded(folders: dict[str, Path], kind: str) -> VisionLanguageModel:
    return load_model(f"local-dir:{folders[kind]}", device="cpu")


def one_step(method: str, student: TrainedStudent, count: int = 6, micro_batch: int | None = None) -> None:
    objective, batch = OBJECTIVES.create(method, eps=EPS, alpha=EPS / 2, steps=2), batch_of(count)
    options = Optimization(batch_size=count, micro_batch=micro_batch)
    Accumulator(student, None, options).gradients(objective, batch, ImageRng(0, batch.ids, "test"))
    update(student, make_optimizer(student.parameters, options), 0.1, 1.0)
    student.refresh()


def answers(student: TrainedStudent, images: Tensor) -> Tensor:
    with torch.no_grad():
        return student.attacked(images)


@pytest.mark.parametrize(("method", "parts", "kind"), CASES)
def test_prompts_move_and_no_weight_does_and_the_deployed_model_answers_as_the_trained_one(
    method: str, parts: str, kind: str, folders: dict[str, Path]
) -> None:
    model, original = loaded(folders, kind), loaded(folders, kind)
    student, images = student_of(model, parts), batch_of(3).images
    start = {name: p.detach().clone() for name, p in student.parameters.items()}
    assert start
    assert set(dict(model.clip.named_parameters())) == set(dict(original.clip.named_parameters())) | set(start)
    for _ in range(2):
        one_step(method, student)
    assert all(not torch.equal(p, start[name]) for name, p in student.parameters.items() if p.numel())
    frozen = {name: p for name, p in model.clip.named_parameters() if name not in start}
    assert not any(p.requires_grad or p.grad is not None for p in frozen.values())
    state = original.clip.state_dict()
    assert all(torch.equal(v, state[name]) for name, v in model.clip.state_dict().items() if name in state)
    assert model.prompts is not None
    original.add_prompts(model.prompts.deployed())
    assert set(dict(original.prompts.named_parameters())) <= {"context", "visual", "text"}  # type: ignore[union-attr]
    assert torch.allclose(answers(student, images), classifier(original)(images).logits, atol=1e-4)


def test_deep_prompts_are_maps_between_the_towers(folders: dict[str, Path]) -> None:
    """The toy has one block in each tower: the only tokens are the context and what it is mapped to."""
    model = loaded(folders, "vit")
    expected = model.text_features(CLASSES, TEMPLATES)
    student = student_of(model, "deep:2")
    assert torch.allclose(student.class_features, expected, atol=1e-5)  # begins at the template's own words
    assert sorted(student.parameters) == [
        "prompts.context",
        "prompts.deep",
        "prompts.to_image.bias",
        "prompts.to_image.weight",
    ]
    prompts = model.prompts
    assert prompts is not None
    assert prompts.visual_shape == (1, 2)


def test_deep_prompts_of_the_embedded_vit_have_the_depth_of_its_towers_at_most() -> None:
    made = training_classifier("tiny-vit")
    parameters = choose_prompts(made, "deep:2", seed=0)
    assert parameters is not None
    prompts = made.model.prompts
    assert prompts is not None
    assert (prompts.visual_shape, prompts.text_depth) == ((4, 2), 1)  # 4 blocks of the image tower, 2 of the text tower
    assert torch.equal(prompts.visual_tokens(2), parameters["prompts.deep"][1])
    mapped = parameters["prompts.to_text.0.weight"] @ parameters["prompts.deep"][0].T
    assert torch.allclose(prompts.text_tokens(1), mapped.T + parameters["prompts.to_text.0.bias"], atol=1e-5)


def training_classifier(name: str) -> Any:
    return classifier(load_model(name, device="cpu"))


@pytest.mark.parametrize(
    ("method", "parts"), [("apt", "context:4"), ("apt:prompting=constant", "context:4"), ("fap", "deep:2")]
)
def test_the_text_tower_reads_the_prompts_once_a_step(
    method: str, parts: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, calls = student_of(loaded(folders, "vit"), parts), []
    read = ContextReader.__call__

    def counted(self: ContextReader, context: Tensor) -> Tensor:
        calls.append(1)
        return read(self, context)

    monkeypatch.setattr(ContextReader, "__call__", counted)
    for _ in range(3):
        one_step(method, student)
    assert len(calls) == 3


def test_a_batch_in_parts_has_the_gradient_of_the_whole(folders: dict[str, Path]) -> None:
    for method, parts in (("apt", "context:4"), ("fap", "deep:2")):
        found = []
        for micro_batch in (None, 2):
            student = student_of(loaded(folders, "vit"), parts)
            one_step(method, student, micro_batch=micro_batch)
            found.append(torch.cat([p.detach().flatten() for p in student.parameters.values()]))
        assert torch.allclose(*found, atol=1e-5), method


def test_the_start_is_a_function_of_the_seed_and_leaves_the_global_state_alone(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    made = [
        choose_prompts(classifier(loaded(folders, "vit")), parts, seed)
        for parts in ("context:4", "deep:2")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    for same, again, other in (made[:3], made[3:]):
        name = list(same or {})[-1]
        assert torch.equal(same[name], again[name])  # type: ignore[index]
        assert not torch.equal(same[name], other[name])  # type: ignore[index]


def test_all_weights_may_train_under_a_learned_context_and_it_with_them(folders: dict[str, Path]) -> None:
    model, before = loaded(folders, "vit"), loaded(folders, "vit").clip.state_dict()
    choose_prompts(classifier(model), "context:2", seed=0)
    model.clip.requires_grad_(False)
    context = model.context.detach().clone()  # type: ignore[union-attr]
    student = student_of(model, "all")
    one_step("tecoa", student)
    assert not torch.equal(model.context, context)  # type: ignore[arg-type]
    assert not torch.equal(model.clip.token_embedding.weight, before["token_embedding.weight"])
    found = model.zero_shot(CLASSES, TEMPLATES)
    assert torch.allclose(student.class_features, found.text_features, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("vit", "context:0", "write context: and a whole number from 1, such as context:16"),
        ("vit", "context:4x2", "write context: and a whole number from 1"),
        ("vit", "deep:2x", "write deep: and a whole number from 1"),
        ("vit", "class-context:x", "write class-context: and a whole number from 1"),
        ("vit", "context:14", "the model reads 16; shorten"),
        ("vit", "deep:2x2", "tokens for 2 blocks, the image tower has 1"),
        ("vit", "deep:5", "4 tokens before the class name, fewer than the 5 vectors"),
        ("rn", "deep:2", "defined for a vision transformer, and this one is ModifiedResNet; choose a ViT"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(kind: str, parts: str, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose_prompts(classifier(loaded(folders, kind)), parts, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("apt", {"trains": "image"}, "apt learns prompts; write context:M or class-context:M"),
        ("fap", {"trains": "context:4"}, "fap learns prompts; write deep:M"),
        ("tecoa", {"trains": "context:4"}, "tecoa trains weights"),
        ("apt", {"mix": (0.5,)}, "no vanilla weights to be mixed with"),
    ],
)
def test_methods_that_learn_prompts_learn_nothing_else_and_others_learn_none(
    method: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        training(tmp_path / "out", method, **options)


# runs

SMALL: dict[str, Any] = {
    "dataset": "fashion",
    "lr": 0.1,
    "epochs": 2,
    "batch_size": 16,
    "save_every": 1,
    "limit": 48,
    "held_out": 8,
    "steps": 1,
    "eps": "8/255",
}


def small(folders: dict[str, Path], **more: Any) -> dict[str, Any]:
    """A run of a second on the random toy."""
    return SMALL | {"model": f"local-dir:{folders['vit']}"} | more


@pytest.mark.parametrize(("method", "parts"), [("apt", "context:2"), ("advpt", "class-context:2"), ("fap", "deep:2")])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    method: str, parts: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = small(folders, trains=parts)
    training(tmp_path / "whole", method, **options).run(Listener())
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "broken", method, **options).run(Broken())
    assert not (tmp_path / "broken" / "learned_prompts.safetensors").exists()
    training(tmp_path / "broken", method, **options).run(Listener())
    whole, broken = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("whole", "broken"))
    assert whole.weights_hash == broken.weights_hash
    assert whole.model_cfg == broken.model_cfg
    vanilla = loaded(folders, "vit").clip.state_dict()
    state = whole.clip.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in vanilla.items())
    assert set(state) - set(vanilla) <= {"prompts.context", "prompts.visual", "prompts.text"}
    again = training(tmp_path / "whole", method, **options).run(Listener())
    assert again.reused


def test_a_context_for_all_classes_answers_for_another_data_set_and_one_for_each_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = load_dataset("mnist", "test", limit=4)
    for parts in ("context:2", "class-context:2"):
        training(tmp_path / parts, "apt", **small(folders, trains=parts, epochs=1)).run(Listener())
        model = load_model(f"local-dir:{tmp_path / parts}", device="cpu")
        if parts == "context:2":
            assert model.zero_shot(other.class_names, TEMPLATES).num_classes == 10
        else:
            with pytest.raises(UserError, match="say nothing of others"):
                model.zero_shot(other.class_names, TEMPLATES)


def test_advpt_runs_the_image_tower_before_the_first_step_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(tmp_path / "out", "advpt", **small(folders, held_out=0, trains="context:2"))
    seen: list[int] = []
    encode = run.model.clip.encode_image
    monkeypatch.setattr(
        run.model.clip, "encode_image", lambda images, **more: seen.append(len(images)) or encode(images, **more)
    )
    run.run(Listener())
    assert sum(seen) == 48 * 3  # the clean features, one step, the adversarial features
    assert (tmp_path / "out" / "training" / FILE).exists()


def test_weights_are_trained_under_prompts_that_were_learned_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """The prompts stay; a mixture is one of weights."""
    training(tmp_path / "apt", "apt", **small(folders, trains="context:2", epochs=1)).run(Listener())
    options = small(folders, model=f"local-dir:{tmp_path / 'apt'}", epochs=1, mix=(0.5,))
    found = training(tmp_path / "tecoa", "tecoa", **options).run(Listener())
    assert list(found.summary) == ["vanilla", "result", "mix-0.5"]
    first, second = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("apt", "tecoa"))
    assert torch.equal(first.context, second.context)  # type: ignore[arg-type]
    assert first.weights_hash != second.weights_hash
    with pytest.raises(UserError, match="has learned prompts already"):
        training(tmp_path / "again", "apt", **{**options, "mix": (), "trains": "context:2"})


# what they are worth on the embedded model


class Means(Listener):
    def __init__(self) -> None:
        self.of: list[dict[str, float]] = []

    def epoch(self, end: Any) -> None:
        self.of.append(end.metrics)


def test_a_short_run_of_fap_lifts_robust_accuracy_of_a_vanilla_model(tmp_path: Path) -> None:
    options = {"eps": "4/255", "limit": 700, "epochs": 3, "batch_size": 8, "held_out": 100}
    found = training(tmp_path / "out", "fap", **options).run(Listener())
    before, after = found.summary["vanilla"], found.summary["result"]
    assert after.robust.hits >= before.robust.hits + 4  # 8 of 100 where it was written
    assert after.clean.hits >= before.clean.hits - 10


def test_apt_lowers_the_loss_at_the_adversarial_images(tmp_path: Path) -> None:
    """On the vanilla tower, where there is little robustness to be had; the authors begin with a robust one."""
    means = Means()
    training(tmp_path / "out", "apt", trains="context:4", limit=300, epochs=3, batch_size=32, lr=0.1).run(means)
    losses = [of["cross_entropy"] for of in means.of]
    assert losses[-1] < 0.9 * losses[0]
    assert means.of[-1]["accuracy_adversarial"] > means.of[0]["accuracy_adversarial"]


def test_advpt_learns_the_stored_images_and_is_no_help_against_an_attack_on_the_deployed_model(tmp_path: Path) -> None:
    run = training(tmp_path / "out", "advpt", eps="16/255", limit=500, epochs=6, batch_size=32, lr=0.1)
    found = run.run(Listener())
    images = load_dataset("fashion", "test", limit=100)
    batch = TrainingImages(images, PixelTransform(32)).batch(range(100))
    rng = ImageRng(1, batch.ids, "transfer")
    features = run.settings.objective.stored(run.student, batch, rng)  # type: ignore[attr-defined]
    by_hand, learned = (
        float(F.cross_entropy(run.student.classifier.logits(features, classes), batch.labels))
        for classes in (run.student.hand_features, run.student.class_features)
    )
    assert learned < 0.8 * by_hand  # on images that neither attack nor prompt has seen
    assert found.summary["result"].robust.hits <= found.summary["vanilla"].robust.hits + 3  # of 60
