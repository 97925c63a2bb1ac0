"""Every `vlmdefend` command of the README and of docs/, and every Python block, runs as it is written, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.models.weights.checkpoint import save_folder

README = Path(__file__).parent.parent / "README.md"
PAGES = sorted((README.parent / "docs").glob("*.md"))
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
# The commands that train run as written but for these options, so that they end within seconds.
SHORTER = {
    "distill": "--limit 80 --held-out 16 --gap-images 8 --batch-size 32 --epochs-a 1 --epochs-b 1",
    "train": "--limit 60 --held-out 8 --batch-size 32 --epochs 1",
    "urda-train": "--limit 72 --eval-limit 20 --batch-size 18 --batch-size-student 18 --epochs-teacher 1 "
    "--epochs-student 1",
}


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path = README) -> list[str]:
    lines = [line[2:] for block in blocks("console", page) for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("vlmdefend")]


def run_in_order(lines: list[str], folder: Path) -> dict[str, str]:
    program = [sys.executable, "-c", "from vlmdefend.cli.main import run; run()"]
    outputs = {}
    for line in lines:
        done = subprocess.run(
            program + shlex.split(line)[1:] + shlex.split(SHORTER.get(line.split()[1], "")),
            cwd=folder,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs[line] = done.stdout
    return outputs


def make_photos(folder: Path) -> None:
    images = vlmdefend.load_dataset("fashion", limit=30)
    pixels = load_batch(images, range(30), PixelTransform(None), skip_bad=False)[0].images
    from torchvision.utils import save_image

    for i, label in enumerate(images.labels):
        place = folder / images.class_names[label].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        save_image(pixels[i], place / f"{i}.png")


def test_readme_commands_and_examples_work(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    save_folder(vlmdefend.load_model("tiny-vit"), tmp_path / "my-clip", {"made": "for the README's test"})
    reading, plugin, script = blocks("python")
    (tmp_path / "gray.py").write_text(plugin, encoding="utf-8")
    (tmp_path / "read.py").write_text(reading, encoding="utf-8")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    found = commands()
    assert len(found) >= 12
    outputs = run_in_order(found, tmp_path)
    assert (tmp_path / "table.tex").read_text().count(r"\begin{tab") >= 1
    assert (tmp_path / "verdicts.csv").stat().st_size > 0
    gray = next(text for line, text in outputs.items() if "gray.py" in line)
    assert "strength=0.5" in gray
    printed = {}
    for file in ("read.py", "script.py"):
        done = subprocess.run(
            [sys.executable, file], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed[file] = done.stdout
    assert "33 of 100 images fooled the model" in printed["read.py"]
    assert "jpeg" in printed["script.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    found = commands(page)
    assert found
    run_in_order(found, tmp_path)


def test_every_link_of_the_readme_to_a_page_leads_somewhere() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in PAGES}


def test_the_table_shown_is_the_table_that_comes_out(tmp_path: Path) -> None:
    """The README's second table, run again: the same images survive, to within what another machine may change."""
    line = next(c for c in commands() if "noise" in c)
    shown = next(text for text in blocks("text") if "low_pass" in text)
    robust = {m[1]: float(m[2]) for m in re.finditer(r"^(\w+) +4/255.*? ([\d.]+) \[", shown, re.MULTILINE)}
    options = dict(zip(*[iter(shlex.split(line)[2:])] * 2, strict=True))
    found = vlmdefend.evaluate(
        tmp_path, **{k.removeprefix("--"): v if k != "--limit" else int(v) for k, v in options.items()}
    )
    from vlmdefend.reporting import verdict_lines

    lines = {entry.pipeline.defense: entry for entry in verdict_lines(found.results)}
    assert set(lines) == set(robust)
    for name, entry in lines.items():
        assert abs(100 * entry.worst.value - robust[name]) <= 1.5, name
