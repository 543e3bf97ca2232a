"""What a network needs while it runs, as the operating system sees it: a process of its own for packed and for dense.

What XLA reserves for a program leaves out what its libraries allocate while it runs, which for dense convolutions is much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.benchmark.results import Line
from experiments.benchmark.table import OURS, markdown
from experiments.benchmark.timing import use_threads

DENSE = "dense"
HEAD = "network", "n", "packed, MB", "dense, MB", "packed / dense", "of it weights, packed", "dense"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CALLS = 2


def measure(network: str, n: int) -> dict[str, Any]:
    """The line of the results of one of `experiments.networks`, without provenance: "peak" and "weights", in bytes.

    Raises:
      ValueError: the system does not tell, or a network could not be run.
    """
    if not CLEAR.exists():
        raise ValueError("this system does not tell the peak memory of a process: measure on Linux")
    found = {form: _alone(network, n, form) for form in (OURS, DENSE)}
    return {"layer": network, "n": n, "threads": 1, "isa": found[OURS]["isa"],
            **{key: {form: each[key] for form, each in found.items()} for key in ("peak", "weights")}}


def row(line: Line) -> tuple[str, ...]:
    """The cells under HEAD."""
    peak, weights = ([f"{line[key][form] / 1e6:.0f}" for form in (OURS, DENSE)] for key in ("peak", "weights"))
    return line["layer"], str(line["n"]), *peak, f"{line['peak'][OURS] / line['peak'][DENSE]:.2f}", *weights


def memory_table(lines: Iterable[Line]) -> str:
    """The results of a CPU as a Markdown table."""
    lines = sorted(lines, key=lambda line: (line["layer"], line["n"]))
    last = lines[-1]
    caption = f"{last['cpu']}, {last['isa']}, one thread. Measured {last['date'][:10]} at {last['commit']}."
    return "\n".join([markdown(HEAD, list(map(row, lines))), "", caption])


def _alone(network: str, n: int, form: str) -> dict[str, Any]:
    context = get_context("spawn")
    end, other = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(other, network, n, form))
    process.start()
    other.close()  # so that its death is the end of the file here
    try:
        return end.recv()
    except EOFError:
        raise ValueError(f"the process that ran {network}, n={n}, {form} ended early: see above") from None
    finally:
        process.join()


def _run(connection: Connection, network: str, n: int, form: str) -> None:
    use_threads(1)
    import jax
    import numpy as np
    from flax import nnx

    from experiments.networks import NETWORKS, pruned
    from sparseflax import detect_machine, pack_model, plan
    from sparseflax.conv import ffi

    spec = NETWORKS[network]
    x, model = np.zeros((n, spec.image, spec.image, 3), np.float32), pruned(spec)
    if form == OURS:
        model = pack_model(model, plan(model, x, detect_machine()))
    graph, state = nnx.split(model)
    state, x = jax.device_put((state, x))
    program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    del model
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    peak = weights + x.nbytes + rise(lambda: [program(state, x).block_until_ready() for _ in range(CALLS)])
    connection.send({"peak": peak, "weights": weights, "isa": ffi.isa()})


def rise(run: Callable[[], Any]) -> int:
    """Bytes by which this process was larger at its largest, while `run` ran, than before."""
    CLEAR.write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return 1024 * int(STATUS.read_text().split(f"{name}:")[1].split()[0])
