"""Every `vlmdefend` command of the README and of docs/, and every Python block, runs as it is written.

Commands that need what another one writes run together with it, in the order of the page; every other command is a test
of its own.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vlmdefend
from vlmdefend.attacks import ATTACKS
from vlmdefend.cli.main import run
from vlmdefend.data.loader import load_batch
from vlmdefend.data.transforms import PixelTransform
from vlmdefend.defenses import DEFENSES
from vlmdefend.models.clip.folder import save_folder

README = Path(__file__).parent.parent / "README.md"
PAGES = sorted((README.parent / "docs").glob("*.md"))
# The commands that train run as written but for these options, so that they end within seconds.
SHORTER = {
    "distill": "--limit 80 --held-out 16 --gap-images 8 --batch-size 32 --epochs-a 1 --epochs-b 1",
    "train": "--limit 60 --held-out 8 --batch-size 32 --epochs 1",
    "urda-train": "--limit 72 --eval-limit 20 --batch-size 18 --batch-size-student 18 --epochs-teacher 1 "
    "--epochs-student 1",
}
Command = str


def blocks(language: str, page: Path = README) -> list[str]:
    """The fenced code blocks of one language, in the order of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path = README) -> list[Command]:
    """The lines of the page's console blocks that call vlmdefend."""
    lines = [line[2:] for block in blocks("console", page) for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if line.startswith("vlmdefend")]


def written_by(line: Command) -> str | None:
    """The value of ``--out``, if the command has one."""
    words = shlex.split(line)
    return words[words.index("--out") + 1] if "--out" in words else None


def reads(line: Command, name: str) -> bool:
    """Whether a word of the command names the file or folder ``name``, alone, in a list or after ``local-dir:``."""
    parts = [part for word in shlex.split(line)[2:] for part in re.split(r"[,:]", word)]
    return name in parts


def groups(page: Path) -> list[list[Command]]:
    """Commands that depend on one another's files, together; each other command alone."""
    found: list[list[Command]] = []
    for line in commands(page):
        needed = [group for group in found if any((out := written_by(one)) and reads(line, out) for one in group)]
        merged = [one for group in needed for one in group] + [line]
        found = [group for group in found if group not in needed] + [merged]
    return found


def is_table_shown(line: Command) -> bool:
    """Whether the README shows the table of this command; test_the_table_shown_is_the_table_that_comes_out runs it."""
    return "jpeg,noise,low_pass" in line


CASES = [(page, group) for page in (README, *PAGES) for group in groups(page) if not is_table_shown(group[-1])]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder and a terminal of 80 columns; plugins that a command loads are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path
    for registry in (ATTACKS, DEFENSES):
        for key in [k for k, c in registry._classes.items() if c.__module__.startswith("vlmdefend_plugin")]:
            del registry._classes[key]


@pytest.fixture
def shell(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[Command]], str]:
    """Runs command lines in order in this process; returns what they print; fails with the line that fails."""

    def run_in_order(lines: list[Command]) -> str:
        capsys.readouterr()
        printed = ""
        for line in lines:
            words = shlex.split(line) + shlex.split(SHORTER.get(line.split()[1], ""))
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                run()
            out, err = capsys.readouterr()
            assert not ended.value.code, f"{line}\n{out}\n{err}"
            printed += out
        return printed

    return run_in_order


def prepare(lines: list[Command], folder: Path) -> None:
    """The files that the page supposes its reader to have: photos, a model folder, the plugin of the page."""
    if any(reads(line, "photos") for line in lines):
        make_photos(folder / "photos")
    if any(reads(line, "my-clip") for line in lines):
        save_folder(vlmdefend.load_model("tiny-vit"), folder / "my-clip", {"made": "for the README's test"})
    if any("gray.py" in line for line in lines):
        (folder / "gray.py").write_text(python_block("gray.py"), encoding="utf-8")


def python_block(name: str) -> str:
    """The README's Python block whose first line is the comment ``# name``."""
    (found,) = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    return found


def make_photos(folder: Path) -> None:
    """Thirty images of fashion as PNG files in class folders."""
    images = vlmdefend.load_dataset("fashion", limit=30)
    pixels = load_batch(images, range(30), PixelTransform(None), skip_bad=False)[0].images
    from torchvision.utils import save_image

    for i, label in enumerate(images.labels):
        place = folder / images.class_names[label].replace(" ", "_")
        place.mkdir(parents=True, exist_ok=True)
        save_image(pixels[i], place / f"{i}.png")


@pytest.mark.parametrize(("page", "lines"), CASES, ids=lambda v: v.stem if isinstance(v, Path) else v[-1][10:70])
def test_a_command_of_a_page_runs_as_written(
    page: Path, lines: list[Command], workplace: Path, shell: Callable[[list[Command]], str]
) -> None:
    prepare(lines, workplace)
    printed = shell(lines)
    assert printed
    for name in filter(None, map(written_by, lines)):
        assert Path(name).exists(), name
    if any("gray.py" in line for line in lines):
        assert "strength=0.5" in printed
    if Path("table.tex").exists():
        assert Path("table.tex").read_text(encoding="utf-8").count(r"\begin{tab") >= 1


def test_every_command_of_every_page_is_in_exactly_one_group() -> None:
    for page in (README, *PAGES):
        assert sorted(line for group in groups(page) for line in group) == sorted(commands(page))
    assert len(commands()) >= 12
    assert all(commands(page) for page in PAGES if "```console" in page.read_text(encoding="utf-8"))


def test_the_reading_script_reads_the_saved_set(
    workplace: Path, shell: Callable[[list[Command]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    shell([line for line in commands() if written_by(line) == "from-vit"])
    (workplace / "read.py").write_text(python_block("read.py"), encoding="utf-8")
    runpy.run_path(str(workplace / "read.py"))
    assert "33 of 100 images fooled the model" in capsys.readouterr().out


def test_the_python_interface_works_as_shown(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = [block for block in blocks("python") if block.startswith("import vlmdefend\n")]
    (workplace / "script.py").write_text(script, encoding="utf-8")
    runpy.run_path(str(workplace / "script.py"))
    assert "jpeg" in capsys.readouterr().out


def test_every_link_of_the_readme_to_a_page_leads_somewhere() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in PAGES}


def test_the_table_shown_is_the_table_that_comes_out(workplace: Path, shell: Callable[[list[Command]], str]) -> None:
    """The README's second table, printed again: the same images survive, to within what another machine may change."""
    (line,) = filter(is_table_shown, commands())
    shown = next(text for text in blocks("text") if "low_pass" in text)
    before, after = worst_column(shown), worst_column(shell([line]))
    assert set(before) == {"none", "jpeg", "low_pass", "noise"}
    assert set(before) == set(after)
    for name, percent in after.items():
        assert abs(percent - before[name]) <= 2, name


def worst_column(table: str) -> dict[str, float]:
    """Worst-case accuracy in percent by defense, from a printed table."""
    return {m[1]: float(m[2]) for m in re.finditer(r"^(\w+) +4/255.*? ([\d.]+) \[", table, re.MULTILINE)}
