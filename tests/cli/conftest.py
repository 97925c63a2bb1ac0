"""The command, run in this process as a shell would run it, and what it may say when it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.cli.distillation import SHORT, command, environment
from vlmdefend.attacks import ATTACKS
from vlmdefend.cli.main import run
from vlmdefend.defenses import DEFENSES

QUICK = ("--limit", "16", "--batch-size", "8", "--eps", "4/255", "--device", "cpu")
SET = ("--limit", "16", "--batch-size", "8", "--device", "cpu")

GRAY = '''"""Gray: the mean of the three channels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.defenses import DEFENSES
from vlmdefend.defenses.base import Defense, Paradigm, Recipe, TransformedInput
from vlmdefend.rng import ImageRng
from vlmdefend.types import Pipeline


@DEFENSES.register
@dataclass(frozen=True, kw_only=True)
class Gray(Defense):
    """Average the channels: colour noise cancels.

    Options:
        strength: 1 is gray, 0 leaves the image as it is.
    """

    name: ClassVar[str] = "gray"
    paradigm: ClassVar[Paradigm] = "training-free"
    summary: ClassVar[str] = "the mean of the three channels"
    citation: ClassVar[str] = "–"
    recipe: ClassVar[Recipe] = Recipe("exact: autograd sees all of it")
    strength: float = 1.0

    def wrap(self, model: Pipeline) -> Pipeline:
        """Average, predict."""
        return TransformedInput(model, self.average)

    def average(self, images: Tensor, rng: ImageRng) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W), three equal channels at strength 1."""
        gray = images.mean(dim=1, keepdim=True).expand_as(images)
        return images + self.strength * (gray - images)
'''

SIGNS = '''"""Signs: a random corner of the ball."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmdefend.attacks import ATTACKS
from vlmdefend.attacks.base import Attack
from vlmdefend.attacks.view import View
from vlmdefend.rng import ImageRng
from vlmdefend.types import Norm, Threat


@ATTACKS.register
@dataclass(frozen=True, kw_only=True)
class Signs(Attack):
    """The best of some random corners."""

    name: ClassVar[str] = "signs"
    summary: ClassVar[str] = "a random corner of the ball"
    citation: ClassVar[str] = "–"
    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    gradient_free: ClassVar[bool] = True

    def perturb(self, view: View, images: Tensor, labels: Tensor, threat: Threat, rng: ImageRng) -> Tensor:
        """One corner per image."""
        signs = rng.uniform(images.shape[1:], -1.0, 1.0).to(images.device).sign()
        return (images + threat.radius(images) * signs).clamp(0, 1)
'''

BROKEN = GRAY.replace('"gray"', '"broken"').replace(
    "gray = images", 'raise RuntimeError("the transform\\nis broken")\n        gray = images'
)


class Outcome(NamedTuple):
    """What a shell sees of a command."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Plugins and threads of one test do not reach the next."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for registry in (ATTACKS, DEFENSES):
        registry._classes = {
            k: c for k, c in registry._classes.items() if not c.__module__.startswith("vlmdefend_plugin")
        }


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("list", "attacks")``: the exit code, standard output and standard error."""

    def call(*args: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["vlmdefend", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            run()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def evaluate(cli: Cli, tmp_path: Path) -> Cli:
    """``evaluate("-d", "jpeg")`` on few images, into ``tmp_path / "runs"``; a later option wins over the quick ones."""
    return lambda *args: cli("evaluate", *_without(QUICK, args), *_out(tmp_path, args), *args)


@pytest.fixture
def refused(evaluate: Cli) -> Callable[..., str]:
    """The one sentence with which ``evaluate`` refuses these options."""

    def call(*args: object) -> str:
        outcome = evaluate(*args)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        return one_sentence(outcome)

    return call


@pytest.fixture
def attack(cli: Cli, tmp_path: Path) -> Cli:
    """``attack("set", "--eps", "4/255")`` into a folder of ``tmp_path``."""
    return lambda name, *options: cli("attack", *SET, *options, "--out", tmp_path / str(name))


@pytest.fixture
def distill(cli: Cli, tmp_path: Path) -> Cli:
    """``distill("--eps", "4/255")`` on few images, into ``tmp_path / "out"`` unless an --out is given."""

    def call(*args: object) -> Outcome:
        out = () if "--out" in args else ("--out", tmp_path / "out")
        return cli("distill", *SHORT, *out, *args)

    return call


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished distillation that no test changes."""
    out = tmp_path_factory.mktemp("distilled") / "out"
    finished = subprocess.run(
        [*command(), *SHORT, "--out", str(out)], env=environment(), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    (out.parent / "stdout").write_text(finished.stdout)
    (out.parent / "stderr").write_text(finished.stderr)
    return out


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], Path]:
    """``put("gray.py", text)`` writes a file and returns its path."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def one_sentence(outcome: Outcome) -> str:
    """The whole of standard error, which must be one line that begins with ``error:``."""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    return error_line(lines[0])


def error_line(line: str) -> str:
    assert line.startswith("error: ")
    assert line.endswith((".", "?"))
    assert "Traceback" not in line
    assert len(line) > len("error: ") + 20, "says too little"
    return line


def rows_of(folder: Path) -> dict[str, bytes]:
    """Cell key -> the bytes of its rows."""
    return {file.parent.name: file.read_bytes() for file in sorted(folder.glob("cells/*/rows.jsonl"))}


def files_of(folder: Path) -> dict[str, bytes]:
    """Path -> content of a set, without the record, which holds the time."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if "cells" not in f.relative_to(folder).parts}


def _without(options: tuple[str, ...], given: tuple[Any, ...]) -> list[str]:
    pairs = zip(options[::2], options[1::2], strict=True)
    return [word for name, value in pairs if name not in given for word in (name, value)]


def _out(tmp_path: Path, given: tuple[Any, ...]) -> list[str]:
    return [] if "--out" in given else ["--out", str(tmp_path / "runs")]
