"""Judges the cost model: its predictions here, and how far its constants and its form carry.

    python -m experiments.calibrate --check             # predicted against measured, on layers that were not fitted, 6 minutes
    python -m experiments.calibrate --transfer          # constants of one instruction set used for another
    python -m experiments.calibrate --gpu               # a GPU's roofline, where there is a GPU
    python -m experiments.calibrate --spdy DIR          # the model's form on another engine and machine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.benchmark.results import ROOT
from experiments.benchmark.timing import keep_memory, use_threads

RESULTS = ROOT / "experiments" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--check", action="store_true", help="predict layers that were not fitted, and measure them")
    task.add_argument("--transfer", action="store_true", help="fit on AVX2 and on AVX-512, predict the other")
    task.add_argument("--gpu", action="store_true", help="dense and gathered sparse convolutions on a GPU")
    task.add_argument("--spdy", type=Path, metavar="DIR", help="fit ResNet-18's published times, predict ResNet-50's")
    parser.add_argument("--threads", type=int, help="default: as many as there are CPUs")
    parser.add_argument("--isa", help="instruction set of the sparse kernel, default the best")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="of --check")
    parser.add_argument("--seconds", type=float, help="for measuring; default 300, of --transfer and --gpu 50")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    args = parser.parse_args()
    seconds = args.seconds or (300.0 if args.check else 50.0)
    if args.threads:
        use_threads(args.threads)
    keep_memory()
    # Imported after that: JAX has to see it.
    from experiments.calibrate import check, gpu, spdy, transfer

    try:
        if args.check:
            check.run(args.batch, seconds, args.isa, args.out)
        elif args.transfer:
            transfer.run(seconds, args.out)
        elif args.gpu:
            gpu.run(seconds, args.out)
        else:
            spdy.run(args.spdy, args.out)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
