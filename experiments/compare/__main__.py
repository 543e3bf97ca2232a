"""Pruning methods compared on cluttered digits: accuracy, size, and measured time, on one page.

    python -m experiments.compare [--quick] [--networks ...] [--methods ...] [--speedups ...] [--seeds ...] [--out DIR]
    python -m experiments.compare measure train      what needs no quiet machine once `measure` is done
    python -m experiments.compare time report        on a quiet one

Everything runs on one thread, for which `python -m sparseflax calibrate --threads 1` makes good predictions: run it first.
By default the first network runs every method, and the others the best guided and the best unguided one of those by accuracy,
which are asked for more speedups than the rest. A run takes about 45 seconds of one core, those two methods' less, and all of
them some three hours. Runs are made seed by seed, so that the first ones are a fair table too. The same command goes on where
it was killed: finished runs are skipped, others continue from their checkpoints. Processes may share a folder if no two of
them train the same network and seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.benchmark.timing import keep_memory, use_threads
from experiments.compare import networks, page, runs, summary, timing, training
from experiments.compare.runs import Run
from experiments.methods import METHODS
from sparseflax.cost.atomic import write_atomically

STAGES = "measure", "train", "time", "report"


def main(flags: Sequence[str] | None = None) -> None:
    arguments = _arguments(flags)
    # Before the first array is made: JAX sees it then.
    use_threads(arguments.threads)
    keep_memory()
    configs = networks.QUICK if arguments.quick else networks.NETWORKS
    out: Path = arguments.out or Path("runs", "compare-quick" if arguments.quick else "compare")
    seeds = arguments.seeds or (networks.QUICK_SEEDS if arguments.quick else networks.SEEDS)
    methods, speedups, between = (networks.QUICK_METHODS, networks.QUICK_SPEEDUPS, ()) if arguments.quick else (
        tuple(METHODS), networks.SPEEDUPS, networks.BETWEEN)
    first = next(iter(configs))

    def wanted(name: str) -> Iterator[list[Run]]:
        """The runs of a network, those of the best methods only when the others are done, which tell them."""
        if arguments.methods or name == first:
            yield [Run(name, method, speedup, seed) for seed in seeds for method in arguments.methods or methods
                   for speedup in arguments.speedups or speedups]
        if not arguments.methods:
            trained = runs.lines(out / runs.TRAINED)
            best = summary.best([line for run, line in trained.items() if run.network == first and run.speedup not in between])
            yield [Run(name, method, speedup, seed) for seed in seeds for method in best
                   for speedup in arguments.speedups or sorted(speedups + between)]

    chosen = [configs[name] for name in arguments.networks or configs]
    if "measure" in arguments.stages or "train" in arguments.stages:
        for config in chosen:
            training.measure(config, out)
    if "train" in arguments.stages:
        for config in chosen:
            for some in wanted(config.name):
                training.prune_all(config, some, out)
    if "time" in arguments.stages:
        for config in chosen:
            for some in wanted(config.name):
                timing.time_all(config, some, out)
    if "report" in arguments.stages:
        lines = list(runs.lines(out / runs.RESULTS).values())
        write_atomically(out / "compare.html", page.page(lines))
        print(page.terminal(lines))
        print(f"page: {out / 'compare.html'}")


def _arguments(flags: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", default=STAGES, help=f"of {', '.join(STAGES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="see that everything works, in under 5 minutes")
    parser.add_argument("--networks", nargs="+", choices=networks.NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(map(repr, METHODS))}")
    parser.add_argument("--speedups", nargs="+", type=float, help="requested of the whole network at batch 1")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of training and of what is timed; of a folder always the same")
    parser.add_argument("--out", type=Path, help="folder of everything; runs/compare by default")
    arguments = parser.parse_args(flags)
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"there is no stage {', '.join(unknown)}, wanted some of {', '.join(STAGES)}")
    if small := [speedup for speedup in arguments.speedups or () if not speedup >= 1]:
        parser.error(f"a requested speedup is at least 1, got {small}")
    return arguments


if __name__ == "__main__":
    main()
