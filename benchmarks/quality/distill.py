"""Measure ``vlmdefend distill`` and print it against its targets.

    python -m benchmarks.quality.distill step   one HPT step with PGD-2: CPU time against floor and official profile
    python -m benchmarks.quality.distill tiny   tiny-vit -> tiny-rn on fashion: robust and clean accuracy
    python -m benchmarks.quality.distill all    both in this order

The official code does not run; its cost profile is made again from its description: the text encoder of both models
runs in every forward, with gradients, the attack's backward goes through all parameters, and the teacher builds a
graph. One CPU thread, nothing is downloaded, random weights in ``step``. ``tiny`` trains twice (five minutes each on an
idle core) and keeps the models in ``--out``; the same command goes on. The exit code is 0 whether or not a target is
met.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once
PARTS = {"step": "bench_distill_step", "tiny": "bench_distill_tiny"}


def main() -> None:
    """Run the requested parts and print one table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, default=Path("distilled-benchmark"), help="where tiny keeps its models")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from tabulate import tabulate

    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, CPU")
    for part in PARTS if asked.part == "all" else [asked.part]:
        rows = getattr(importlib.import_module(PARTS[part]), part)(asked.out)
        print(f"\n{part}\n\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
