"""One run in however many processes started this: ``python -m tests.training.train_here MODELS OUT [optimizer]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.training.conftest import CONFIGS, build_run

torch.set_num_threads(1)


def main() -> None:
    models, out, images = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    run = build_run({kind: models / kind for kind in CONFIGS}, out, images=images, judged=True)
    run.run()
    if run.processes.count != 2:
        raise SystemExit(f"{run.processes.count} processes, not 2")


if __name__ == "__main__":
    main()
