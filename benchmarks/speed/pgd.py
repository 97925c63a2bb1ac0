"""Measure vlmdefend's PGD and print it against its targets.

    python -m benchmarks.speed.pgd speed       PGD-10, all steps: CPU time against the floor and torchattacks
    python -m benchmarks.speed.pgd memory      the same runs: peak bytes of the allocator
    python -m benchmarks.speed.pgd evaluate    a cell of `vlmdefend evaluate` with PGD-100 against torchattacks
    python -m benchmarks.speed.pgd start       the command line's first answer, and the demo
    python -m benchmarks.speed.pgd all         the four in this order

One CPU thread (start: all cores), nothing is downloaded. Times are ratios of runs that take turns, as median
[min-max]; the exit code is 0 whether or not a target is met. README.md beside this file keeps the last results.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once
PARTS = {"speed": "bench_fixed", "memory": "bench_fixed", "evaluate": "bench_evaluate", "start": "bench_start"}


def main() -> None:
    """Run the requested parts and print one table per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"])
    asked = parser.parse_args().part
    warnings.filterwarnings("ignore")
    import torch
    from tabulate import tabulate

    print(f"{os.cpu_count()} cores, torch {torch.__version__}, CPU")
    for part in PARTS if asked == "all" else [asked]:
        rows = getattr(importlib.import_module(PARTS[part]), part)()
        print(f"\n{part}\n\n{tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)}", flush=True)


if __name__ == "__main__":
    main()
