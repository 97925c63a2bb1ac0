"""Measure unsupervised robust domain adaptation on the embedded domains and print it against its targets.

    python -m benchmarks.quality.urda adapt     step 1: every method x pair, accuracy on held-out target images
    python -m benchmarks.quality.urda robust    step 2: every method x pair from one teacher, clean / PGD / worst
    python -m benchmarks.quality.urda ablate    DART without each of its parts, digits
    python -m benchmarks.quality.urda step      one step of DART against its own forwards and backwards, CPU time
    python -m benchmarks.quality.urda all       the four in this order

``--pairs digits`` or ``--pairs emoji``, ``--methods dann,mdd`` and ``--seeds 0,1`` choose a part. Runs go to ``--out``
and are found done when repeated. One CPU thread, nothing is downloaded. The exit code is 0 whether or not a target is
met.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once
PAIRS = {
    "digits": [("mnist", "uci-digits"), ("uci-digits", "mnist")],
    "emoji": [("emoji:google", "emoji:sketch")],
}
PARTS = ("adapt", "robust", "ablate", "step")


def main() -> None:
    """Run the requested parts and print one table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--pairs", default="all", choices=[*PAIRS, "all"])
    parser.add_argument("--methods", default="", help="comma-separated; default: all of the step")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/urda"))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from tabulate import tabulate

    import benchmarks.quality.urda_tables as bench_urda

    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, CPU")
    pairs = [pair for name, some in PAIRS.items() if asked.pairs in (name, "all") for pair in some]
    methods = [name for name in asked.methods.split(",") if name]
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    for part in PARTS if asked.part == "all" else [asked.part]:
        rows = getattr(bench_urda, part)(asked.out, pairs, methods, seeds)
        print(f"\n{part}\n\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}", flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
