"""    python -m experiments.benchmark layers [--threads N] [--batch N ...] [--density D ...] [--layer PART ...]"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.benchmark import results
from experiments.benchmark.timing import use_threads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark")
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers", help="single layers against every rival that is installed")
    layers.add_argument("--threads", type=int, default=1)
    layers.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    layers.add_argument("--density", type=float, nargs="+", default=[0.1])
    layers.add_argument("--layer", nargs="+", default=[], metavar="PART", help="only layers with this in their name")
    layers.add_argument("--corners", action="store_true", help="odd sizes instead of the benchmark's thirteen layers")
    layers.add_argument("--matrices", type=Path, help="folder of the pruned AlexNet's weights: only its layers are run")
    layers.add_argument("--isa", help="force the kernel of an instruction set, e.g. avx2")
    layers.add_argument("--seconds", type=float, default=2.0, help="for each layer and batch, all contenders together")
    layers.add_argument("--out", type=Path, default=results.LAYERS)
    args = parser.parse_args()
    use_threads(args.threads)
    run_layers(args)


def run_layers(args: argparse.Namespace) -> None:
    # Imported here: JAX and the rivals have to see the threads set above.
    from experiments.baselines import field
    from experiments.benchmark.run import measure
    from experiments.benchmark.table import HEAD, row, summaries
    from experiments.layers import BENCHMARK, CORNERS, choose, random_problem

    baselines, absent = field()
    if absent:
        print(f"not installed: {', '.join(absent)}")
    origin = results.provenance({need for module in baselines for need in module.needs})
    lines = []
    print(" | ".join(HEAD))
    for n in args.batch:
        for density in args.density:
            for shape in choose(CORNERS if args.corners else BENCHMARK, args.layer):
                problem = random_problem(shape.with_batch(n), density)
                line = measure(problem, baselines, args.threads, args.seconds, args.isa) | {"absent": absent} | origin
                results.append(args.out, line)
                lines.append(line)
                print(" | ".join(row(line)), flush=True)
    print("\n".join(summaries(lines)))


if __name__ == "__main__":
    main()
