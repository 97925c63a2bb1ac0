"""Every `vlmdefend` command and every Python block of the README runs as it is written, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import vlmdefend
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.models.checkpoint import save_folder

README = Path(__file__).parent.parent / "README.md"
# The commands that train run as written but for these options, so that they end within seconds.
SHORTER = {
    "distill": "--limit 80 --held-out 16 --gap-images 8 --batch-size 32 --epochs-a 1 --epochs-b 1",
    "train": "--limit 60 --held-out 8 --batch-size 32 --epochs 1",
    "urda-train": "--limit 72 --eval-limit 20 --batch-size 18 --batch-size-student 18 --epochs-teacher 1 "
    "--epochs-student 1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("vlmdefend")]


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
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "from vlmdefend.cli.main import run; run()"]
    found = commands()
    assert len(found) >= 12
    outputs = {}
    for line in found:
        done = subprocess.run(
            program + shlex.split(line)[1:] + shlex.split(SHORTER.get(line.split()[1], "")),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs[line] = done.stdout
    assert (tmp_path / "table.tex").read_text().count(r"\begin{tab") >= 1
    assert (tmp_path / "verdicts.csv").stat().st_size > 0
    gray = next(text for line, text in outputs.items() if "gray.py" in line)
    assert "strength=0.5" in gray
    printed = {}
    for file in ("read.py", "script.py"):
        done = subprocess.run(
            [sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        printed[file] = done.stdout
    assert "33 of 100 images fooled the model" in printed["read.py"]
    assert "jpeg" in printed["script.py"]


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
