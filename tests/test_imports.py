"""Heavy packages are imported by what needs them, not by the command line's start."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "pandas", "open_clip", "matplotlib", "torchattacks", "scipy", "numpy")


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(','.join(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(filter(None, done.stderr.strip().splitlines()[-1].split(",") if done.stderr.strip() else []))


HELP = """
sys.argv = ["vlmdefend", *{args!r}]
from vlmdefend.cli.main import run
try:
    run()
except SystemExit as ended:
    assert not ended.code, ended.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import vlmdefend",
        "import vlmdefend.cli.main",
        "import vlmdefend.evaluation, vlmdefend.attacks, vlmdefend.defenses, vlmdefend.data, vlmdefend.models",
        "import vlmdefend.evaluation.store.records, vlmdefend.evaluation.store.run_folder\n"
        "import vlmdefend.evaluation.grid.grid",
        HELP.format(args=["--help"]),
        HELP.format(args=["evaluate", "--help"]),
        HELP.format(args=["--version"]),
        HELP.format(args=["list", "protocols"]),
        "from vlmdefend.cli.options import complete\n"
        "assert 'pgd' in complete.attacks('pg') and complete.defenses('jp') and complete.models('tiny')\n"
        "assert complete.datasets('fashion,fas') == ['fashion,fashion', 'fashion,fashion-mnist']",
    ],
    ids=["package", "command", "rooms", "records", "help", "help of evaluate", "version", "list", "completion"],
)
def test_nothing_heavy_is_loaded_by(code: str) -> None:
    assert loaded_by(code) == set()


def test_this_test_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_by("import numpy")
