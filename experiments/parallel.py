"""Training on many devices: processes that jax.distributed joins, one mesh over all their devices, and what they agree on.

Each process holds the whole state and draws the whole batch of every step, of which its devices take their rows; `jit` adds
what they find. So nothing of pruning knows how many there are: masks are computed everywhere, from the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from multiprocessing import connection, get_context
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROWS = "data"  # the mesh's one axis
HEARTBEAT = 30  # seconds after which a process that says nothing is taken for dead by those on other hosts
DIGEST = 8  # bytes of what is compared


def mesh_of_all() -> Mesh:
    """All devices of all processes, for `fit`."""
    return jax.make_mesh((jax.device_count(),), (ROWS,), axis_types=(AxisType.Auto,))


def everywhere(mesh: Mesh, tree: Any) -> Any:
    """The tree with a copy of each array on every device."""
    return jax.device_put(tree, on_all(mesh))


def on_all(mesh: Mesh) -> NamedSharding:
    """Of an array that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh, batch: np.ndarray) -> jax.Array:
    """The rows of a batch (n, ...), which every process has in whole, shared out over the devices."""
    return jax.make_array_from_callback(batch.shape, NamedSharding(mesh, PartitionSpec(ROWS)), batch.__getitem__)


def check_batch(devices: int, batch: int) -> None:
    """Raises ValueError where the devices do not divide the batch."""
    if batch % devices:
        raise ValueError(f"a batch of {batch} cannot be shared out over {devices} devices: choose a batch that is a multiple "
                         f"of {devices}, or fewer devices")


def agree(facts: Mapping[str, str]) -> None:
    """Compares what processes have to have in common; all of them call it, with the same names.

    Args:
      facts: {name: value}, such as the seed, or a digest of the data.

    Raises:
      ValueError: values differ; names them, and the processes.
    """
    values = [fact.encode() for fact in facts.values()]
    digests = np.stack([np.frombuffer(hashlib.blake2b(value, digest_size=DIGEST).digest(), np.uint32) for value in values])
    found = np.asarray(multihost_utils.process_allgather(digests)).reshape(-1, *digests.shape)  # (processes, facts, words)
    if wrong := differences(found, jax.process_index(), facts):
        raise ValueError(f"the processes do not run the same: {wrong}. Start all of them with the same code, command and data")


def differences(found: np.ndarray, own: int, facts: Mapping[str, str]) -> str:
    """In words, where digests (processes, facts, words) differ from the first process's, seen by process `own`; or ""."""
    parts = []
    for at, (name, value) in enumerate(facts.items()):
        others = [process for process in range(1, len(found)) if (found[process, at] != found[0, at]).any()]
        if others:
            parts.append(f"{name} of process {', '.join(map(str, others))} is not that of process 0 (process {own} has "
                         f"{value[:60]})")
    return "; ".join(parts)


def together(member: Callable[[Mesh], Any], processes: int) -> None:
    """Calls `member(mesh)` in so many processes on this host at once.

    Args:
      member: can be pickled; what it returns is lost.
      processes: each with an equal share of the CPUs, joined over the loopback.

    Raises:
      RuntimeError: one of them failed or was killed; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workers = [get_context("spawn").Process(target=_join, args=(member, address, processes, number), daemon=True)
               for number in range(processes)]
    for worker in workers:
        worker.start()
    try:
        while running := [worker.sentinel for worker in workers if worker.exitcode is None]:
            connection.wait(running)
            ended = {number: worker.exitcode for number, worker in enumerate(workers) if worker.exitcode}
            if ended:
                number, code = next(iter(ended.items()))
                raise RuntimeError(f"process {number} of {processes} ended with {code}, so the others were ended too: what it "
                                   "had to say stands above. The same command, with as many processes or others, goes on from "
                                   "the last checkpoint")
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _join(member: Callable[[Mesh], Any], address: str, processes: int, number: int) -> None:
    os.environ["NPROC"] = str(max(1, (os.cpu_count() or 1) // processes))  # before JAX makes its client
    jax.distributed.initialize(address, processes, number, heartbeat_timeout_seconds=HEARTBEAT)
    member(mesh_of_all())
    jax.distributed.shutdown()
