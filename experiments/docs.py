"""The README's table and the pages of docs/, their tables and pictures made anew from the committed result files.

    python -m experiments.docs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

from experiments import plots, report, soak
from experiments.benchmark import int8, networks_int8, results, trained
from experiments.benchmark.asked import asked_table
from experiments.benchmark.memory import memory_table
from experiments.benchmark.networks_table import cpus_table, networks_table
from experiments.benchmark.plot import plot_speed
from experiments.benchmark.table import densities_table, layers_table, machines_table, seconds, threads_table
from experiments.calibrate import check, figures, gpu, judgement, spdy, transfer
from experiments.compare import figures as compare_figures
from experiments.compare import page
from experiments.compare import runs as compare_runs
from experiments.stories.table import stories_table
from sparseflax.cost.atomic import write_atomically

ROOT = results.ROOT
RESULTS = ROOT / "experiments" / "results"
PICTURES = ROOT / "docs" / "results"
LAYERS = results.LAYERS, *results.OTHER_LAYERS  # a file for each CPU
DRAWN = RESULTS / "layers_zen4.jsonl"  # the CPU whose layers were timed against all rivals at many densities


def main(flags: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m experiments.docs", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(flags)
    for path, sections in PAGES.items():
        write_atomically(ROOT / path, made(ROOT / path, sections))
        print(path)
    for name, draw in DRAWINGS.items():
        with matplotlib.rc_context({"svg.hashsalt": "sparseflax"}):  # the same figure, the same text
            write_atomically(PICTURES / name, draw())
        print(f"docs/results/{name}")


def made(path: Path, sections: Mapping[str, Callable[[], str]]) -> str:
    """A page with its sections made anew."""
    text = path.read_text()
    for name, section in sections.items():
        text = with_section(text, name, section())
    return text


def with_section(page: str, name: str, section: str) -> str:
    """The page with what lies between a section's two markers replaced.

    Raises:
      ValueError: not exactly one of each marker, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page needs one line {begin} and after it one line {end}: the section goes between them")
    return f"{page[: page.index(begin)]}{begin}\n\n{section}\n\n{page[page.index(end) :]}"


def overview() -> str:
    """The README's table: networks before and after, by CPU, and which CPUs are missing."""
    every = results.by_cpu(results.NETWORKS)
    # Early lines do not say the family: they give way to those of a CPU that may be the same one.
    found = {cpu: lines for cpu, lines in every.items() if not any(
        _with_family(cpu, other) and lines[-1]["isa"] == later[-1]["isa"] for other, later in every.items())}
    single = [results.read(path)[-1]["cpu"] for path in LAYERS]
    missing = [f"On {cpu} only single layers were measured so far." for cpu in single
               if not any(other == cpu or _with_family(cpu, other) for other in found)]
    return "\n\n".join([cpus_table(found), *missing])


def _with_family(cpu: str, other: str) -> bool:
    """Whether the other name is the CPU's with its family: "Xeon" may be "Xeon (family 6)", not "Xeon @ 2.80GHz (family 6)"."""
    return other.startswith(f"{cpu} (")


def runs() -> str:
    """The main job's runs, a table for each CPU and number of threads, what was measured last first."""
    found: dict[str, list[results.Line]] = {}
    for line in reversed(results.read(RESULTS / "digits.jsonl")):
        found.setdefault(f"{line['cpu']}, {line['threads']} thread{'s' * (line['threads'] > 1)}", []).insert(0, line)
    return _by_cpu(found, lambda lines: "\n\n".join(filter(None, (report.table(lines), report.starts(lines)))))


def networks() -> str:
    """Whole networks, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.NETWORKS), networks_table)


def layers() -> str:
    """What single layers sum up to on each CPU, and layer by layer."""
    parts = [machines_table(LAYERS)]
    for path in LAYERS:
        lines = results.newest(results.read(path))
        parts += [f"## {lines[-1]['cpu']}, {lines[-1]['isa']}", layers_table(path),
                  "The pruned AlexNet of Park et al., its own weights:", layers_table(path, layers="alexnet")]
        if any(line["set"] == "corners" for line in lines):
            parts += ["Odd sizes:", layers_table(path, layers="corners")]
    return "\n\n".join(parts)


def threads() -> str:
    """Several threads over one, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.THREADS), threads_table)


def memory() -> str:
    """Peak memory, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.MEMORY), memory_table)


def soaked() -> str:
    """A packed network under many callers, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.SOAK), soak.table)


def asked() -> str:
    """Speedups asked for and measured, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.ASKED), asked_table)


def stories() -> str:
    """Trained networks made faster, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.STORIES), stories_table)


def layers_int8() -> str:
    """Single layers in eight bits and in float32, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.INT8), int8.table)


def whole_int8() -> str:
    """Whole networks in eight bits, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.QUANTIZED), networks_int8.table)


def trained_int8() -> str:
    """A trained network in eight bits, a table for each CPU."""
    return _by_cpu(results.by_cpu(results.TRAINED), trained.table)


def compared() -> str:
    """Pruning methods, all of them on the first CPU; a table of each network for each CPU, of the newest line of each run."""
    files = RESULTS / "compare.jsonl", *sorted(RESULTS.glob("compare_*.jsonl"))
    found = [list(compare_runs.lines(file).values()) for file in files]
    return _by_cpu({lines[-1]["cpu"]: lines for lines in found}, page.tables)


def density() -> str:
    """Times of single layers at many densities; of one that was taken twice, the shorter, as the machine was disturbed less."""
    shortest: dict[tuple, results.Line] = {}
    for line in results.read(RESULTS / "density.jsonl"):
        key = line["layer"], line["n"], line["drawn"]
        shortest[key] = min(shortest.get(key, line), line, key=lambda line: seconds(line)[0])
    return densities_table(list(shortest.values()))


def model() -> str:
    """Predicted against measured times, a table for each CPU."""
    files = {path: results.read(path) for path in (check.LINES, *check.OTHER_LINES)}
    return "\n\n".join(text for lines in files.values() for text in (f"## {lines[-1]['cpu']}", judgement.table(lines)))


def carries(folder: Path = RESULTS) -> str:
    """How far constants, form and machine description carry, each from its result file.

    Raises:
      FileNotFoundError: one of them is missing.
    """
    parts = []
    for title, text, table, file in (
            ("Another instruction set", "The constants of one, used for the kernel of another:", transfer.table,
             "transfer.jsonl"),
            ("Another engine", "The form, on an engine and a machine that are not ours (the timings of SPDY, Frantar and "
             "Alistarh, ICML 2022):", spdy.table, "spdy.jsonl"),
            ("A GPU", "As the model sees it, and as measured:", gpu.table, "gpu.jsonl")):
        if not (folder / file).exists():
            option = file.removesuffix(".jsonl")
            raise FileNotFoundError(f"{folder / file} is missing: run python -m experiments.calibrate --{option}")
        parts += [f"## {title}", text, table(results.read(folder / file))]
    return "\n\n".join([*parts, gpu.says(results.read(folder / "gpu.jsonl"))])


def _by_cpu(found: Mapping[str, list[results.Line]], table: Callable[[list[results.Line]], str]) -> str:
    return "\n\n".join(text for cpu, lines in found.items() for text in (f"## {cpu}", table(lines)))


def _compared() -> list[results.Line]:
    return results.read(RESULTS / "compare.jsonl")


def _drawn() -> list[results.Line]:
    return [line for line in results.newest(results.read(DRAWN)) if (line["threads"], line["n"]) == (1, 1)]


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"overview": overview},
    "docs/cost.md": {"paper": figures.table},
    "docs/stories.md": {"stories": stories},
    "docs/pruning.md": {"gains": lambda: page.gains(_compared())},
    "docs/results/runs.md": {"runs": runs},
    "docs/results/compare.md": {"compare": compared},
    "docs/results/model.md": {"model": model},
    "docs/results/transfer.md": {"transfer": carries},
    "docs/results/networks.md": {"networks": networks},
    "docs/results/int8.md": {"networks": whole_int8, "trained": trained_int8, "layers": layers_int8},
    "docs/results/layers.md": {"layers": layers},
    "docs/results/threads.md": {"threads": threads},
    "docs/results/serving.md": {"soak": soaked},
    "docs/results/memory.md": {"memory": memory},
    "docs/results/asked.md": {"asked": asked},
    "docs/results/density.md": {"density": density},
}
DRAWINGS: dict[str, Callable[[], str]] = {
    "calibration.svg": lambda: check.plot(results.read(check.LINES)),
    "compare.svg": lambda: compare_figures.pareto(_compared(), _compared()[0]["network"]),
    "density.svg": lambda: plots.svg(plot_speed(_drawn())),
    "figure3.svg": figures.figure3,
    "figure5.svg": figures.figure5,
}

if __name__ == "__main__":
    main()
