"""A packed network called from many threads and processes at once, for a while, and ONNX Runtime under the same load.

    python -m experiments.soak                              # 8 processes of 8 threads each, 80 s for each engine
    python -m experiments.soak --processes 2 --seconds 600 --out mine.jsonl

Each process loads one program, exported for any batch, and its threads call it with batches of mixed sizes; every output is
compared with what the same images gave when nothing else ran. Told are wrong outputs, by how much more memory all processes had
in the second half of the time after the first minute than in its first half, at most, and latencies: p50 and p99 of each batch
size.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from array import array
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from experiments.benchmark import results
from experiments.benchmark.table import markdown
from experiments.benchmark.timing import use_threads

BATCHES = 1, 2, 4, 8
SETTLE = 60.0  # seconds after which memory may not grow any more
STATUS = Path("/proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.soak", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--threads", type=int, default=8, help="that call, in each process (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=80.0, help="for each engine (default: %(default)g)")
    parser.add_argument("--engine", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=results.SOAK, help="JSON lines to append to (default: %(default)s)")
    args = parser.parse_args()
    for engine in args.engine:
        line = soak(engine, args.processes, args.threads, args.seconds)
        results.append(args.out, {"set": "soak"} | line | results.provenance({"jax", "jaxlib", "onnxruntime"}))
        print(summary(line), flush=True)


def soak(engine: str, processes: int, threads: int, seconds: float) -> dict[str, Any]:
    """One engine under the load; its line of the results, without provenance.

    Raises:
      RuntimeError: a process ended early.
    """
    context, load, artefact = get_context("spawn"), os.getloadavg()[0], ENGINES[engine][0]()
    start, pipes, workers = context.Barrier(processes), [], []
    for number in range(processes):
        end, other = context.Pipe(duplex=False)
        workers.append(context.Process(target=_work, args=(other, start, engine, artefact, number, threads, seconds)))
        workers[-1].start()
        other.close()  # so that a worker's death is the end of the file here
        pipes.append(end)
    try:
        found = [pipe.recv() for pipe in pipes]
    except EOFError:
        for worker in workers:  # the others wait for it
            worker.terminate()
        raise RuntimeError(f"a process of {engine} ended early: see above") from None
    finally:
        for worker in workers:
            worker.join()
    return line_of(engine, threads, seconds, found) | {"load": load}


def line_of(engine: str, threads: int, seconds: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What all processes found, together."""
    import numpy as np

    latency = {str(n): np.concatenate([each["seconds"][n] for each in found]) for n in BATCHES}
    return {"engine": engine, "processes": len(found), "threads": threads, "seconds": seconds,
            "calls": sum(map(len, latency.values())), "wrong": sum(each["wrong"] for each in found),
            "grown": sum(each["grown"] for each in found), "resident": sum(each["resident"] for each in found),
            "latency": {n: {f"p{q}": float(np.percentile(times, q)) for q in (50, 99)}
                        for n, times in latency.items() if len(times)}}


def summary(line: dict[str, Any]) -> str:
    """A line of the results in words."""
    tail = ", ".join(f"{n}: {1e3 * each['p50']:.1f} and {1e3 * each['p99']:.1f} ms ({each['p99'] / each['p50']:.1f}x)"
                     for n, each in line["latency"].items())
    return (f"{line['engine']}, {line['processes']} processes of {line['threads']} threads: {line['calls']} calls, "
            f"{line['wrong']} wrong, memory grown by {line['grown'] / 1e6:.1f} of {line['resident'] / 1e6:.0f} MB in the "
            f"second half of the time; p50 and p99 by batch: {tail}")


def table(lines: list[results.Line]) -> str:
    """Each engine under the load, and below where, when and with what that was measured."""
    head = ("engine", "calls", "wrong", "memory, MB", "grown, MB", *(f"n={n}: p50, p99, ms" for n in BATCHES))
    rows = [(line["engine"], *(str(line[key]) for key in ("calls", "wrong")), f"{line['resident'] / 1e6:.0f}",
             f"{line['grown'] / 1e6:.1f}", *(f"{1e3 * each['p50']:.1f}, {1e3 * each['p99']:.0f}" if each else ""
                                             for each in (line["latency"].get(str(n)) for n in BATCHES))) for line in lines]
    last = lines[-1]
    return (f"{markdown(head, rows)}\n\n{last['cpu']}, {last['processes']} processes of {last['threads']} threads for "
            f"{last['seconds']:.0f} s each, {results.versions(last)}. Measured {last['date'][:10]} at {last['commit']}.")


def _work(pipe: Any, start: Any, engine: str, artefact: Any, number: int, threads: int, seconds: float) -> None:
    use_threads(1)  # a process serves a call on one thread, as many at once as ask
    import numpy as np

    images = {n: np.random.default_rng(n).standard_normal((n, 48, 48, 1), np.float32) for n in BATCHES}
    call = ENGINES[engine][1](artefact)
    wanted = {n: call(x) for n, x in images.items()}
    latency = [{n: array("d") for n in BATCHES} for _ in range(threads)]  # 8 bytes for each call: not a growth to tell
    wrong, memory, began = [0] * threads, list[tuple[float, int]](), 0.0

    def ask(thread: int) -> None:
        draw = np.random.default_rng((number, thread))
        while time.monotonic() < began + seconds:
            n = int(draw.choice(BATCHES))
            before = time.perf_counter()
            y = call(images[n])
            latency[thread][n].append(time.perf_counter() - before)
            wrong[thread] += not np.array_equal(y, wanted[n])

    start.wait()
    began = time.monotonic()
    asking = [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]
    for each in asking:
        each.start()
    while any(each.is_alive() for each in asking):
        memory.append((time.monotonic() - began, _resident()))
        time.sleep(1.0)
    memory.append((time.monotonic() - began, _resident()))
    settled = [size for at, size in memory if at >= min(SETTLE, seconds / 2)]
    half = len(settled) // 2
    pipe.send({"seconds": {n: np.concatenate([each[n] for each in latency]) for n in BATCHES}, "wrong": sum(wrong),
               "grown": max(settled[half:]) - max(settled[:half], default=settled[0]), "resident": max(settled)})


def _network() -> Any:
    """A small network at density 0.1, with random weights: a millisecond or so for an image."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    rngs, draw, layers = nnx.Rngs(0), np.random.default_rng(0), list[Any]()
    for ic, oc in ((1, 32), (32, 64), (64, 128), (128, 128)):
        layers += [nnx.Conv(ic, oc, (3, 3), rngs=rngs), nnx.relu, lambda x: nnx.max_pool(x, (2, 2), strides=(2, 2))]
        kernel = layers[-3].kernel
        kernel[...] = kernel[...] * jnp.asarray(draw.random(kernel.shape) < (0.1 if ic > 1 else 1.0), jnp.float32)
    return nnx.Sequential(*layers, lambda x: x.mean((1, 2)), nnx.Linear(128, 10, rngs=rngs))


def _exported() -> bytes:
    import numpy as np

    import sparseflax

    model, x = _network(), np.zeros((1, 48, 48, 1), np.float32)
    return sparseflax.export(sparseflax.pack_model(model, sparseflax.plan(model, x)), x, any_batch=True)


def _loaded(program: bytes) -> Callable[[Any], Any]:
    import jax
    import numpy as np

    import sparseflax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    run = sparseflax.load_program(program)
    return lambda x: np.asarray(run(x))


def _onnx_files() -> dict[int, bytes]:
    import numpy as np

    from experiments.export_onnx import to_onnx

    return {n: to_onnx(_network(), np.zeros((n, 48, 48, 1), np.float32)) for n in BATCHES}


def _sessions(files: dict[int, bytes]) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {n: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for n, file in files.items()}
    return lambda x: sessions[len(x)].run(None, {"x": x.transpose(0, 3, 1, 2)})[0]


# {name: (makes what a process is given, makes that a function of images)}
ENGINES = {"sparseflax": (_exported, _loaded), "onnxruntime": (_onnx_files, _sessions)}


def _resident() -> int:
    return 1024 * int(STATUS.read_text().split("VmRSS:")[1].split()[0])


if __name__ == "__main__":
    main()
