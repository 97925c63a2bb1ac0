"""Measure vlmdefend's attacks against the authors' code and print them against their targets.

    python -m benchmarks.speed.attacks apgd         apgd-ce, 100 steps, 500 images: fooled set, gradients, CPU time
    python -m benchmarks.speed.attacks autoattack   autoattack standard, 200 images: verdict per image, CPU time
    python -m benchmarks.speed.attacks square       square, 1,000 queries: queries per second, verdict
    python -m benchmarks.speed.attacks transfer     mi, di, ti: CPU time against their own forwards and backwards
    python -m benchmarks.speed.attacks memory       every attack that has a peer: peak bytes of the allocator
    python -m benchmarks.speed.attacks active       forwards and backwards spent per image against the fixed step count
    python -m benchmarks.speed.attacks all          the six in this order

The authors' code is the package ``pyautoattack``, for the measurement only. One CPU thread, nothing is downloaded. The
first run trains the robust model (five minutes) and keeps it in the user's cache. Times are ratios of runs that take
turns; the exit code is 0 whether or not a target is met. README.md beside this file keeps the last results.
"""

from __future__ import annotations

import argparse
import importlib
import os
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its thread pool reads this once
PARTS = {
    "apgd": "bench_original",
    "autoattack": "bench_original",
    "square": "bench_original",
    "transfer": "bench_transfer",
    "memory": "bench_peak",
    "active": "bench_active",
}


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
