"""Times single layers and whole networks against every rival that is installed, and draws the results.

    python -m experiments.benchmark layers                      # thirteen layers, one image and sixteen, 3 minutes
    python -m experiments.benchmark layers --threads 2 --batch 64 --layer 3x3 --density 0.05 0.1 0.2
    python -m experiments.benchmark layers --matrices DIR       # the pruned AlexNet's weights
    python -m experiments.benchmark threads                     # the same layers on two threads and on one, 3 minutes
    python -m experiments.benchmark int8                        # the same layers in eight bits and in float32, 1 minute
    python -m experiments.benchmark networks                    # six networks, one image and sixteen, 15 minutes
    python -m experiments.benchmark networks --network resnet50 --batch 1 --threads 2 --explain
    python -m experiments.benchmark networks --int8             # the same and the engines in eight bits, 30 minutes
    python -m experiments.benchmark trained                     # points lost in eight bits by a trained network, 15 minutes
    python -m experiments.benchmark memory                      # what they need while they run, 5 minutes
    python -m experiments.benchmark asked                       # speedups asked for and measured, from a first start, 4 minutes
    python -m experiments.benchmark plot --out speed.svg
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
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
    layers.add_argument("--yardstick", metavar="COMMAND",
                        help="a rival in a process of its own, see baselines/yardstick.py; its times are shown, not written")
    layers.add_argument("--isa", help="instruction set of our kernel, e.g. avx2; default the best")
    layers.add_argument("--seconds", type=float, default=3.0, help="for each layer, all contenders together")
    layers.add_argument("--page-faults", action="store_true", help="let malloc unmap large outputs, as it does by default")
    layers.add_argument("--out", type=Path, default=results.LAYERS, help="JSON lines, appended")
    layers.set_defaults(run=run_layers)
    threads = commands.add_parser("threads", help="time our kernel on several threads and on one, append to the results")
    threads.add_argument("--threads", type=int, default=2)
    threads.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    threads.add_argument("--density", type=float, default=0.1, metavar="D", help="share of weights that is kept")
    threads.add_argument("--layer", nargs="+", default=[], metavar="PART", help="only layers with one of these in their name")
    threads.add_argument("--isa", help="instruction set of our kernel, e.g. avx2; default the best")
    threads.add_argument("--rounds", type=int, default=12, help="turns of every process")
    threads.add_argument("--out", type=Path, default=results.THREADS, help="JSON lines, appended")
    threads.set_defaults(run=run_threads)
    int8 = commands.add_parser("int8", help="time our kernel in eight bits and in float32, append to the results")
    int8.add_argument("--threads", type=int, default=1)
    int8.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    int8.add_argument("--density", type=float, default=0.1, metavar="D", help="share of weights that is kept")
    int8.add_argument("--layer", nargs="+", default=[], metavar="PART", help="only layers with one of these in their name")
    int8.add_argument("--seconds", type=float, default=1.5, help="for each layer, both together")
    int8.add_argument("--out", type=Path, default=results.INT8, help="JSON lines, appended")
    int8.set_defaults(run=run_int8)
    networks = commands.add_parser("networks", help="time whole networks with pruned weights, append to the results")
    networks.add_argument("--threads", type=int, default=1)
    networks.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    networks.add_argument("--network", nargs="+", default=[], metavar="NAME", help="only these, e.g. resnet50")
    networks.add_argument("--matrices", type=Path, metavar="DIR", help="the pruned AlexNet's weights, for its convolutions")
    networks.add_argument("--rival", nargs="+", default=[], metavar="NAME",
                          help="only these, by their file in baselines/; inductor, which compiles for minutes, only so")
    networks.add_argument("--yardstick", metavar="COMMAND",
                          help="a rival in a process of its own, see baselines/yardstick.py; its times are shown, not written")
    networks.add_argument("--predicted", action="store_true", help="choose dense or sparse by the performance model alone")
    networks.add_argument("--seconds", type=float, default=10.0, help="for each network and batch, all contenders together")
    networks.add_argument("--int8", action="store_true",
                          help="prune in blocks of four, and time those who can compute in eight bits, too")
    networks.add_argument("--explain", action="store_true", help="show where our time goes")
    networks.add_argument("--out", type=Path, help="JSON lines, appended; default networks.jsonl or quantized.jsonl")
    networks.set_defaults(run=run_networks)
    trained = commands.add_parser("trained", help="train, prune, and judge a network in eight bits, append to the results")
    trained.add_argument("--threads", type=int, default=2)
    trained.add_argument("--batch", type=int, default=16, metavar="N", help="images in a batch that is timed")
    trained.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], metavar="S")
    trained.add_argument("--seconds", type=float, default=5.0, help="for the times, all contenders together")
    trained.add_argument("--folder", type=Path, default=Path("runs") / "trained",
                         help="for checkpoints: the same command goes on where it stopped (default: %(default)s)")
    trained.add_argument("--out", type=Path, default=results.TRAINED, help="JSON lines, appended")
    trained.set_defaults(run=run_trained)
    memory = commands.add_parser("memory", help="the peak memory of whole networks, packed and dense, append to the results")
    memory.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N")
    memory.add_argument("--network", nargs="+", default=[], metavar="NAME", help="only these, e.g. resnet50")
    memory.add_argument("--out", type=Path, default=results.MEMORY, help="JSON lines, appended")
    memory.set_defaults(run=run_memory)
    asked = commands.add_parser("asked", help="ask for speedups with nothing stored, and measure them, append to the results")
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--out", type=Path, default=results.ASKED, help="JSON lines, appended")
    asked.set_defaults(run=run_asked)
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
    if args.page_faults:
        os.environ["SPARSEFLAX_KEEP_MEMORY"] = "0"
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


def run_threads(args: argparse.Namespace) -> None:
    from experiments.benchmark.threads import measure
    from experiments.layers import BENCHMARK, choose, random_problem
    from sparseflax.conv import ffi

    origin = results.provenance({"jax", "jaxlib"})
    with shown(Console(), table.THREADS_HEAD) as show:
        for n in args.batch:
            for shape in choose(BENCHMARK, args.layer):
                problem = random_problem(shape.with_batch(n), args.density)
                line = measure(problem, args.threads, args.rounds, args.isa or ffi.isa())
                results.append(args.out, {"set": "threads"} | line | {"drawn": args.density, "memory": "kept"} | origin)
                show(table.threads_row(line))


def run_int8(args: argparse.Namespace) -> None:
    use_threads(args.threads)
    memory = "kept" if keep_memory() else "fresh"
    from experiments.benchmark import int8
    from experiments.layers import BENCHMARK, choose

    lines, console, origin = [], Console(), results.provenance({"jax", "jaxlib"})
    with shown(console, int8.HEAD) as show:
        for n in args.batch:
            for shape in choose(BENCHMARK, args.layer):
                lines.append(int8.measure(shape.with_batch(n), args.density, args.threads, args.seconds))
                results.append(args.out, {"set": "int8"} | lines[-1] | {"drawn": args.density, "memory": memory} | origin)
                show(int8.row(lines[-1]))
    for n, mean in int8.means(lines).items():
        console.print(f"n={n}: {mean:.2f} times float32, geometric mean of {len(lines) // len(args.batch)} layers")


def run_networks(args: argparse.Namespace) -> None:
    use_threads(args.threads)
    memory = "kept" if keep_memory() else "fresh"
    # Imported after that: JAX and the rivals have to see it.
    from experiments.baselines import network_field
    from experiments.benchmark import networks_int8, networks_table
    from experiments.benchmark.networks import measure
    from experiments.layers import ALEXNET, alexnet_problem
    from experiments.networks import NETWORKS
    from sparseflax import detect_machine

    baselines, absent = network_field(args.rival)
    names, console, machine = chosen(args.network), Console(), detect_machine()
    if absent:
        console.print(f"not installed: {', '.join(absent)}")
    origin = results.provenance({"jax", "jaxlib", *(need for baseline in baselines for need in baseline.needs)})
    trained = {name: alexnet_problem(name, args.matrices, 1).kernel for name in ALEXNET} if args.matrices else {}
    lines = []
    rows = networks_int8 if args.int8 else networks_table
    out = args.out or (results.QUANTIZED if args.int8 else results.NETWORKS)
    with shown(console, rows.HEAD) as show:
        for name in names:
            kernels = trained if name == "alexnet" else {}
            for n in args.batch:
                line = measure(NETWORKS[name], n, baselines, machine, threads=args.threads, seconds=args.seconds,
                               kernels=kernels, yardstick=args.yardstick, measured=not args.predicted, int8=args.int8)
                lines.append({"set": "networks int8" if args.int8 else "networks"} | line)
                results.append(out, lines[-1] | {"drawn": "trained" if kernels else "random",
                                                      "memory": memory, "absent": absent} | origin)
                show(rows.row(lines[-1]))
    for text in (*table.disturbed(lines), *(text for line in lines if args.explain for text in networks_table.breakdown(line))):
        console.print(text, soft_wrap=True, highlight=False)


def run_trained(args: argparse.Namespace) -> None:
    use_threads(args.threads)
    memory = "kept" if keep_memory() else "fresh"
    from experiments.baselines import network_field
    from experiments.benchmark import trained
    from sparseflax import detect_machine

    baselines = [baseline for baseline in network_field()[0] if hasattr(baseline, "network_int8")]
    origin = results.provenance({"flax", "jax", "jaxlib", *(need for baseline in baselines for need in baseline.needs)})
    line = trained.measure(args.seed, args.batch, baselines, detect_machine(), folder=args.folder, threads=args.threads,
                           seconds=args.seconds)
    results.append(args.out, {"set": "trained"} | line | {"memory": memory} | origin)
    with shown(Console(), trained.HEAD) as show:
        for row in trained.rows(line):
            show(row)


def run_memory(args: argparse.Namespace) -> None:
    os.environ["SPARSEFLAX_KEEP_MEMORY"] = "0"  # what a network needs, not what malloc keeps
    from experiments.benchmark import memory

    names, origin = chosen(args.network), results.provenance({"jax", "jaxlib"})
    with shown(Console(), memory.HEAD) as show:
        for name in names:
            for n in args.batch:
                line = memory.measure(name, n)
                results.append(args.out, {"set": "memory"} | line | {"drawn": "random", "memory": "fresh"} | origin)
                show(memory.row(line))


def run_asked(args: argparse.Namespace) -> None:
    from experiments.benchmark import asked

    origin = results.provenance({"flax", "jax", "jaxlib"})
    with shown(Console(), asked.HEAD) as show:
        for line in asked.measure(args.threads):
            results.append(args.out, {"set": "asked"} | line | origin)
            show(asked.row(line))


def chosen(networks: Sequence[str]) -> Sequence[str]:
    """The names given, or all. Raises ValueError for one that is no network's."""
    from experiments.networks import NETWORKS

    if unknown := set(networks) - set(NETWORKS):
        raise ValueError(f"no network is called {sorted(unknown)}, wanted some of {list(NETWORKS)}")
    return networks or list(NETWORKS)


@contextmanager
def shown(console: Console, head: tuple[str, ...] = table.HEAD) -> Iterator[Callable[[tuple[str, ...]], None]]:
    """Yields the function that shows a row: in a growing table on a terminal, as a line anywhere else."""
    if console.is_terminal:
        grid = Table(*head)
        with Live(grid, console=console, auto_refresh=False) as live:  # its refreshing thread would disturb the times
            yield lambda row: (grid.add_row(*row), live.refresh())[-1]
    else:
        print(" | ".join(head), flush=True)
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
    figure = plot_speed(lines)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
