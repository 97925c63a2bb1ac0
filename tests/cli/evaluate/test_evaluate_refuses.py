"""Bad input: exit code 2 and one sentence that says what was given, what was expected and what to do next."""

from __future__ import annotations

import json
import lzma
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.conftest import Cli, error_line
from vlmdefend.models.names import ASSETS

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("options", "given", "advice"),
    [
        (["-m", "tiny-vi"], "unknown model 'tiny-vi'", "did you mean 'tiny-vit'"),
        (["--dataset", "fashon"], "unknown dataset 'fashon'", "did you mean 'fashion'"),
        (["-a", "pgdd"], "unknown attack 'pgdd'", "did you mean 'pgd'"),
        (["-d", "jpegg"], "unknown defense 'jpegg'", "did you mean 'jpeg'"),
        (["--protocol", "unifed"], "unknown protocol 'unifed'", "did you mean 'unified'"),
        (["--attacker", "whitbox"], "--attacker 'whitbox'", "'transfer', 'whitebox' or 'adaptive'"),
        (["-a", "pgd:step=3"], "option of attack pgd 'step'", "did you mean 'steps'"),
        (["-a", "pgd:steps=ten"], "pgd:steps='ten'", "valid integer"),
        (["-a", "pgd:steps"], "'pgd:steps'", "write pgd:steps=VALUE"),
        (["-a", "pgd:steps=3:steps=4"], "gives steps twice", "keep one"),
        (["-a", "pgd:steps=0"], "steps=0", "at least 1"),
        (["-a", "pgd:loss=hinge"], "pgd:loss='hinge'", "'dlr'"),
        (["-d", "noise:sigma=nan"], "noise:sigma='nan'", "finite number"),
        (["-d", "jpeg:quality=0"], "quality=0", "1 to 100"),
        (["-d", "ttc:eps=4"], "ttc:eps='4' is as large as the whole pixel range", "did you mean 4/255?"),
        (["-d", "tecoa"], "unknown defense 'tecoa'", "`vlmdefend train --method tecoa --out FOLDER`"),
        (["-d", "pmg_aft+jpeg"], "unknown defense 'pmg-aft'", "`vlmdefend train --method pmg-aft"),
        (["-d", "hpt-gpd"], "unknown defense 'hpt-gpd'", "`vlmdefend distill --proxy P --target T"),
        (["-d", "ttc:[eps=0.1"], "'ttc:[eps=0.1'", "write [ before and ] after what belongs together"),
        (["-d", "interpolate:of=none"], "of=none is the bare model", "[jpeg:quality=50]"),
        (["-d", "tte:crop_seed=99999999999999999999"], "crop_seed=99999999999999999999", "from 0 to 2**63 - 1"),
        (["-d", "tapt:statistics=/"], "tapt:statistics='/'", "name the file or the folder that it reads"),
        (["-a", "pgd:alpha=eps/0"], "alpha 'eps/0'", "Write eps/4, 2.5eps/steps, or a number such as 1/255"),
        (["-a", "co:step=3"], "option of attack co 'step'", "did you mean 'steps'"),
        (["-a", "co:width=3"], "option of attack co 'width'", "known: alpha, beams"),
        (["--eps", "8"], "eps '8'", "did you mean 8/255?"),
        (["--eps", "nan"], "eps 'nan'", "write it as a fraction (4/255)"),
        (["--eps", "inf"], "eps 'inf'", "write it as a fraction (4/255)"),
        (["--eps", "-1/255"], "eps '-1/255'", "zero or more, such as 4/255"),
        (["--eps", "1/0"], "eps '1/0' divides by zero", "write it as a fraction (4/255)"),
        (["--eps", "abc"], "eps 'abc'", "write it as a fraction (4/255)"),
        (["--eps", ","], "--eps [',']", "give at least one"),
        (["-m", ","], "--model [',']", "give at least one"),
        (["--limit", "0"], "--limit 0", "at least 1"),
        (["--limit", "-3"], "--limit -3", "at least 1"),
        (["--limit", "many"], "'--limit'", "`vlmdefend evaluate --help`"),
        (["--steps", "0"], "--steps 0", "at least 1"),
        (["-a", "pgd,cw,none", "--eps", "4/255"], "--eps 4/255: means another budget", "linf for pgd, l2 for cw"),
        (
            ["-a", "pgd,worst-of", "--steps", "50"],
            "--steps 50: does not apply to the attacks inside of worst-of",
            "[pgd:steps=50]",
        ),
        (["--batch-size", "0"], "--batch-size 0", "at least 1"),
        (["--threads", "0"], "--threads 0", "at least 1"),
        (["--seed", "x"], "--seed 'x'", "valid integer"),
        (["--norm", "l3"], "--norm 'l3'", "'linf', 'l2'"),
        (["--template", "a photo"], "--template 'a photo'", "write it where the class name goes"),
        (["--template", "a {c} of {d}"], "--template 'a {c} of {d}'", "other braces"),
        (["--device", "tpu9"], "--device tpu9", "use cpu, or cuda"),
        (["--classes", "/dev/null/names.txt"], "--classes /dev/null/names.txt", "give a text file"),
        (["--weights", "missing.pt"], "missing.pt: no such file", "give a .safetensors, .pt or .pth file"),
        (["--plugin", "missing.py"], "--plugin missing.py: no such file", "give the path of a Python file"),
        (["--config", "missing.yaml"], "--config missing.yaml: cannot be read", "give a YAML file"),
        (["-m", "local-dir:missing"], "there is no folder missing", "give the path of a folder"),
        (["-m", "RN50-quickgel"], "unknown model 'RN50-quickgel'", "did you mean 'RN50-quickgelu'"),
        (["-m", "ViT-B-32"], "'ViT-B-32' is an architecture without weights", "choose one as ViT-B-32:TAG"),
        (["--dataset", "folder:missing"], "folder:missing: there is no such folder", "give the path of a folder"),
        (["--limitt", "3"], "--limitt", "--limit"),
        (["surplus"], "surplus", "`vlmdefend evaluate --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_sentence_with_a_next_step(
    options: list[str], given: str, advice: str, refused: Refused, tmp_path: Path
) -> None:
    sentence = refused(*options)
    assert given in sentence
    assert advice in sentence
    assert not (tmp_path / "runs").exists(), "nothing is left behind by a command that was refused"


@pytest.mark.parametrize("function", ["os:getcwd", "sys:exit", "os:sep", "nowhere:prior"])
def test_a_prior_of_the_users_that_cannot_be_called_is_one_sentence(function: str, evaluate: Cli) -> None:
    outcome = evaluate("-d", f"clipure_diff:prior=[python:{function}]", "-a", "none", "--limit", "2")
    assert outcome.code == 2
    assert f"prior=python:{function}" in outcome.err
    assert "a function of it that takes the device and returns the prior" in outcome.err


def test_a_typing_error_in_the_command_is_met_with_the_nearest_command(cli: Cli) -> None:
    outcome = cli("evaluat")
    assert outcome.code == 2
    assert "evaluate" in error_line(outcome.err.rstrip("\n"))


def test_class_names_must_be_as_many_as_the_classes(refused: Refused, put: Callable[..., Path]) -> None:
    sentence = refused("--classes", put("names.txt", "a\nb\nc\n"))
    assert "has 10 classes, but 3 class names were given" in sentence
    assert "give one a class" in sentence


def test_an_empty_file_of_class_names_is_refused(refused: Refused, put: Callable[..., Path]) -> None:
    assert "write one class name per line" in refused("--classes", put("names.txt", "\n \n"))


def test_class_names_that_are_not_text_are_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused("--classes", tmp_path / "names.txt")


# model folders and weights files


def folder_with(tmp_path: Path, weights: bytes | None) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(ASSETS / "tiny-vit" / "open_clip_config.json", folder)
    if weights is not None:
        (folder / "open_clip_model.safetensors").write_bytes(weights)
    return folder


def embedded_weights() -> bytes:
    return lzma.decompress((ASSETS / "tiny-vit" / "open_clip_model.safetensors.xz").read_bytes())


def test_a_model_folder_without_weights_names_the_missing_file(refused: Refused, tmp_path: Path) -> None:
    sentence = refused("-m", f"local-dir:{folder_with(tmp_path, None)}")
    assert "open_clip_model.safetensors is missing" in sentence
    assert "copy it there" in sentence


def test_a_truncated_weights_file_is_named_and_every_other_model_runs(evaluate: Cli, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, embedded_weights()[:5000])
    outcome = evaluate("-m", f"local-dir:{folder},tiny-vit", "-a", "none")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "open_clip_model.safetensors is cut short" in error_line(line)
    assert "download or write it again" in line
    assert "tiny-vit on fashion" in outcome.out


class Leaves:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(form: str, evaluate: Cli, tmp_path: Path) -> None:
    file, trace = tmp_path / "weights.pt", tmp_path / "trace"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Leaves(trace)))
    else:
        torch.save({"state_dict": Leaves(trace)}, file)
    outcome = evaluate("--weights", file)
    assert not trace.exists()
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "weights.pt" in error_line(line)
    assert "Traceback" not in outcome.err


def test_weights_of_another_architecture_are_refused_by_the_first_that_does_not_fit(
    evaluate: Cli, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"layer.weight": torch.zeros(2, 2)}, file)
    outcome = evaluate("--weights", file)
    assert outcome.code == 2
    assert "does not fit the model" in error_line(outcome.errors[0])


# image folders


def pictures(folder: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (40 * i + 20, 90, 200 if name == "cat" else 10)).save(folder / name / f"{i}.png")
    return folder


def test_an_empty_class_folder_is_named(refused: Refused, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set", {"cat": 2, "dog": 0})
    sentence = refused("--dataset", f"folder:{folder}")
    assert f"class folder {folder / 'dog'} has no image" in sentence
    assert "put images in it, or remove it" in sentence


def test_a_corrupt_image_stops_its_cell_with_its_file_name(evaluate: Cli, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set", {"cat": 3, "dog": 3})
    (folder / "dog" / "1.png").write_bytes((folder / "dog" / "1.png").read_bytes()[:40])
    outcome = evaluate("--dataset", f"folder:{folder}", "-a", "none")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert str(folder / "dog" / "1.png") in error_line(line)
    assert "--skip-bad" in line


def test_with_skip_bad_the_run_finishes_and_the_record_lists_what_was_left_out(evaluate: Cli, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set", {"cat": 3, "dog": 3})
    (folder / "dog" / "1.png").write_text("no picture")
    dataset = ["--dataset", f"folder:{folder}", "-a", "none"]
    assert evaluate(*dataset).code == 2
    outcome = evaluate(*dataset, "--skip-bad")
    assert outcome.code == 0, outcome.err
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("cells/*/record.json")]
    (record,) = [record for record in records if record["status"] == "done"]
    assert record["n"] == 5
    (skipped,) = record["skipped"]
    assert skipped["id"] == "dog/1.png"
    assert "not an image" in skipped["reason"]
    assert "1 unreadable image left out" in outcome.out


# the output folder


def test_an_output_folder_that_is_a_file_is_refused(refused: Refused, put: Callable[..., Path]) -> None:
    file = put("runs", "mine")
    assert "is a file, not a folder; give a folder" in refused("--out", file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/vlmdefend", "/sys/vlmdefend"])  # closed even to root
def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_computed(
    out: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmdefend.evaluation.cell.evaluator.CellEvaluator.run", lambda *args: pytest.fail("computed"))
    if not Path(out).parent.exists():
        pytest.skip(f"no {Path(out).parent} here")
    sentence = refused("--out", out)
    assert f"{out}: cannot be written" in sentence
    assert "give another --out" in sentence
