"""Times single layers against every rival that is installed, and draws the results.

    python -m experiments.benchmark layers                      # thirteen layers, one image and sixteen, 3 minutes
    python -m experiments.benchmark layers --threads 2 --batch 64 --layer 3x3 --density 0.05 0.1 0.2
    python -m experiments.benchmark layers --matrices DIR       # the pruned AlexNet's weights
    python -m experiments.benchmark plot --out speed.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.benchmark import results, table
from experiments.benchmark.timing import keep_memory, use_threads


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    layers = commands.add_parser("layers", help="time single layers, append to the results")
    layers.add_argument("--threads", type=int, default=1)
    layers.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    layers.add_argument("--density", type=float, nargs="+", default=[0.1], metavar="D", help="share of weights that is kept")
    layers.add_argument("--layer", nargs="+", default=[], metavar="PART", help="only layers with one of these in their name")
    layers.add_argument("--corners", action="store_true", help="odd sizes instead of the benchmark's thirteen layers")
    layers.add_argument("--matrices", type=Path, metavar="DIR", help="the pruned AlexNet's weights, and only its layers")
    layers.add_argument("--rival", nargs="+", default=[], metavar="NAME", help="only these, by their file in baselines/")
    layers.add_argument("--yardstick", metavar="COMMAND", help="a rival in a process of its own, see baselines/yardstick.py")
    layers.add_argument("--isa", help="instruction set of our kernel, e.g. avx2; default the best")
    layers.add_argument("--seconds", type=float, default=3.0, help="for each layer, all contenders together")
    layers.add_argument("--page-faults", action="store_true", help="let malloc unmap large outputs, as it does by default")
    layers.add_argument("--out", type=Path, default=results.LAYERS, help="JSON lines, appended")
    layers.set_defaults(run=run_layers)
    plot = commands.add_parser("plot", help="draw speed against density from the results")
    plot.add_argument("--threads", type=int, default=1)
    plot.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    plot.add_argument("--layer", nargs="+", default=[""], metavar="PART", help="only layers with one of these in their name")
    plot.add_argument("--results", type=Path, default=results.LAYERS, help="JSON lines")
    plot.add_argument("--out", type=Path, default=results.LAYERS.with_name("speed.svg"))
    plot.set_defaults(run=run_plot)
    args = parser.parse_args()
    try:
        args.run(args)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def run_layers(args: argparse.Namespace) -> None:
    use_threads(args.threads)
    memory = "kept" if not args.page_faults and keep_memory() else "fresh"
    # Imported after that: JAX and the rivals have to see it.
    from experiments.baselines import field
    from experiments.benchmark.layers import measure

    baselines, absent = field(args.rival)
    console = Console()
    if absent:
        console.print(f"not installed: {', '.join(absent)}")
    origin = results.provenance({"jax", "jaxlib", *(need for baseline in baselines for need in baseline.needs)})
    lines = []
    with shown(console) as show:
        for problem, drawn in problems(args):
            line = measure(problem, baselines, threads=args.threads, seconds=args.seconds, isa=args.isa,
                           yardstick=args.yardstick)
            kind = "alexnet" if args.matrices else "corners" if args.corners else "benchmark"
            lines.append({"set": kind} | line | {"drawn": drawn, "memory": memory, "absent": absent} | origin)
            results.append(args.out, lines[-1])
            show(table.row(lines[-1]))
    for text in (*table.summaries(lines), *table.cliffs(lines), *table.disturbed(lines)):
        console.print(text, soft_wrap=True, highlight=False)


@contextmanager
def shown(console: Console) -> Iterator[Callable[[tuple[str, ...]], None]]:
    """Yields the function that shows a row: in a growing table on a terminal, as a line anywhere else."""
    if console.is_terminal:
        grid = Table(*table.HEAD)
        with Live(grid, console=console, auto_refresh=False) as live:  # its refreshing thread would disturb the times
            yield lambda row: (grid.add_row(*row), live.refresh())[-1]
    else:
        print(" | ".join(table.HEAD), flush=True)
        yield lambda row: print(" | ".join(row), flush=True)


def problems(args: argparse.Namespace) -> Iterator[tuple]:
    """(problem, the density it was drawn with or None for trained weights), one at a time: together they fill the memory."""
    from experiments.layers import ALEXNET, BENCHMARK, CORNERS, alexnet_problem, choose, random_problem

    for n in args.batch:
        if args.matrices:
            for name in ALEXNET:
                yield alexnet_problem(name, args.matrices, n), None
        else:
            for shape in choose(CORNERS if args.corners else BENCHMARK, args.layer):
                for density in args.density:
                    yield random_problem(shape.with_batch(n), density), density


def run_plot(args: argparse.Namespace) -> None:
    from experiments.benchmark.plot import plot_speed

    lines = [line for line in results.newest(results.read(args.results)) if line["threads"] == args.threads
             and line["n"] in args.batch and any(part in line["layer"] for part in args.layer)]
    plot_speed(lines, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
