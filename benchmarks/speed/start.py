"""How long the command line takes to answer, and the demo to finish: wall seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.speed.fixed import Row, spread, verdict

HELP_RUNS = 7
COMMAND = str(Path(sys.executable).parent / "vlmdefend")
PROBE = "import sys, vlmdefend.cli.main; print('torch' in sys.modules)"


def start() -> list[Row]:
    """``vlmdefend --help`` warm, whether it imports torch, and the command of ``make demo`` on all cores."""
    _seconds(COMMAND, "--help")
    helped = [_seconds(COMMAND, "--help") for _ in range(HELP_RUNS)]
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        demo = _seconds(COMMAND, "evaluate", "--attack", "pgd", "--out", f"{folder}/runs")
    return [
        _row("vlmdefend --help", spread(helped), "≤ 0.5 s", median(helped) <= 0.5),
        _row("torch imported for it", "no" if probe == "False" else "yes", "no", probe == "False"),
        _row("vlmdefend evaluate --attack pgd", f"{demo:.1f}", "< 90 s", demo < 90),
    ]


def _row(what: str, measured: str, target: str, met: bool) -> Row:
    return {"command": what, "wall s": measured, "target": f"{target}: {verdict(met)}"}


def _seconds(*command: str) -> float:
    """Wall seconds of a command with as many threads as it likes."""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    clock = time.perf_counter()
    subprocess.run(command, env=free, capture_output=True, check=True)
    return time.perf_counter() - clock
