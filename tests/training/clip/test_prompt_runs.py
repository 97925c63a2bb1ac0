"""Tests of runs that learn prompts: bit-identical resumption, and what their model folder can be used for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.clip.test_train_methods import Interrupt, training
from tests.training.conftest import TEMPLATES
from vlmdefend.data import load_dataset
from vlmdefend.errors import UserError
from vlmdefend.evaluation.launchers.inline import evaluate
from vlmdefend.models import load_model
from vlmdefend.progress import Progress
from vlmdefend.reporting.verdicts.verdict import verdict_rows
from vlmdefend.training.clip.stored_features import FILE

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
    """Returns options of a run of a second on the random model."""
    return SMALL | {"model": f"local-dir:{folders['vit']}"} | more


@pytest.mark.parametrize(("method", "parts"), [("apt", "context:2"), ("advpt", "class-context:2"), ("fap", "deep:2")])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    method: str, parts: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = small(folders, trains=parts)
    training(tmp_path / "whole", method, **options).run(Progress())
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path / "broken", method, **options).run(Interrupt())
    assert not (tmp_path / "broken" / "learned_prompts.safetensors").exists()
    training(tmp_path / "broken", method, **options).run(Progress())
    whole, broken = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("whole", "broken"))
    assert whole.weights_hash == broken.weights_hash
    assert whole.model_cfg == broken.model_cfg
    vanilla = load_model(f"local-dir:{folders['vit']}", device="cpu").clip.state_dict()
    state = whole.clip.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in vanilla.items())
    assert set(state) - set(vanilla) <= {"prompts.context", "prompts.visual", "prompts.text"}
    again = training(tmp_path / "whole", method, **options).run(Progress())
    assert again.reused


def test_a_context_for_all_classes_works_on_another_data_set_and_one_for_each_class_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = load_dataset("mnist", "test", limit=4)
    for parts in ("context:2", "class-context:2"):
        training(tmp_path / parts, "apt", **small(folders, trains=parts, epochs=1)).run(Progress())
        model = load_model(f"local-dir:{tmp_path / parts}", device="cpu")
        if parts == "context:2":
            assert model.zero_shot(other.class_names, TEMPLATES).num_classes == 10
        else:
            with pytest.raises(UserError, match="say nothing of others"):
                model.zero_shot(other.class_names, TEMPLATES)


@pytest.mark.parametrize(
    ("parts", "prompt"), [("context:2", "2 learned vectors"), ("class-context:3", "3 learned vectors of each class")]
)
def test_a_record_notes_that_prompts_were_learned_and_the_protocols_templates_are_unused(
    parts: str, prompt: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    training(tmp_path / "out", "apt", **small(folders, trains=parts, epochs=1)).run(Progress())
    names = [f"local-dir:{folder}" for folder in (folders["vit"], tmp_path / "out")]
    results = evaluate(tmp_path / "runs", model=names, dataset="fashion", limit=4, attack="none").results
    vanilla, learned = (next(r for r in results if r[0].cell.model == name) for name in names)
    assert (vanilla[0].learned_prompt, learned[0].learned_prompt) == ("", prompt)
    note = f"the prompts are {prompt} and the class name, not the protocol's templates"
    assert [note in line.notes for line in verdict_rows([vanilla, learned])].count(True) == 1
    (line,) = verdict_rows([learned])
    assert note in line.notes


def test_attacked_prompts_are_recorded_with_learned_vectors_named(folders: dict[str, Path], tmp_path: Path) -> None:
    training(tmp_path / "out", "apt", **small(folders, trains="context:2", epochs=1)).run(Progress())
    options = {"attack": "text:candidates=4:beams=1", "eps": "1", "attacker": "whitebox"}
    done = evaluate(
        tmp_path / "runs", model=f"local-dir:{tmp_path / 'out'}", dataset="fashion", limit=8, batch_size=4, **options
    )
    ((record, _),) = done.results
    assert all(prompt.startswith("[2 learned vectors] ") for prompt in record.attacked_prompts)
    assert record.attacked_prompts[0].startswith("[2 learned vectors] t - shirt")
    assert " x " not in " ".join(record.attacked_prompts)


def test_advpt_runs_the_image_tower_before_the_first_step_alone(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(tmp_path / "out", "advpt", **small(folders, held_out=0, trains="context:2"))
    seen: list[int] = []
    encode = run.model.clip.encode_image
    monkeypatch.setattr(
        run.model.clip, "encode_image", lambda images, **more: seen.append(len(images)) or encode(images, **more)
    )
    run.run(Progress())
    assert sum(seen) == 48 * 3  # the clean features, one step, the adversarial features
    assert (tmp_path / "out" / "training" / FILE).exists()


def test_weights_are_trained_under_prompts_that_were_learned_before(folders: dict[str, Path], tmp_path: Path) -> None:
    """The prompts do not change; mixtures are of weights."""
    training(tmp_path / "apt", "apt", **small(folders, trains="context:2", epochs=1)).run(Progress())
    options = small(folders, model=f"local-dir:{tmp_path / 'apt'}", epochs=1, mix=(0.5,))
    found = training(tmp_path / "tecoa", "tecoa", **options).run(Progress())
    assert list(found.summary) == ["vanilla", "result", "mix-0.5"]
    first, second = (load_model(f"local-dir:{tmp_path / name}", device="cpu") for name in ("apt", "tecoa"))
    assert torch.equal(first.context, second.context)  # type: ignore[arg-type]
    assert first.weights_hash != second.weights_hash
    with pytest.raises(UserError, match="has learned prompts already"):
        training(tmp_path / "again", "apt", **{**options, "mix": (), "trains": "context:2"})
