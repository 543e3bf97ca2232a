"""A function called in a process that has done nothing before.

What a process has done slows what it does next: after a calibration or a training its heap lies in pieces, malloc searches them
on every call of a network, and XLA's dense network of the digits took 1.15 to 1.5 times as long on two threads of a Zen 4, the
packed one as long as before. Who runs a network to use it has not trained it there.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import ParamSpec, TypeVar

from sparseflax.cost.atomic import write_atomically

P = ParamSpec("P")
R = TypeVar("R")

CHILD = "import sys; from sparseflax.job.afresh import answer; answer(sys.argv[1])"


def afresh(function: Callable[P, R], *args: P.args, **keywords: P.kwargs) -> R:
    """What function(*args, **keywords) returns in a new process; what it raises, too.

    Unlike a process of multiprocessing's, it does not run the caller's script again, so that a script may call it at its top.
    It ends when the caller does, however that ends: a run that goes on after a kill times nothing beside the old one's child.

    Args:
      function: of a module that can be imported; it, its arguments and what it returns are pickled.

    Raises:
      RuntimeError: the process ended without an answer.
    """
    with TemporaryDirectory(prefix="sparseflax-") as folder:
        question, reply = Path(folder) / "question", Path(folder) / "answer"
        question.write_bytes(pickle.dumps((function, args, keywords)))
        here = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # -P: the folder where it is called is on its path only if it is on ours.
        with subprocess.Popen([sys.executable, "-P", "-c", CHILD, folder], env=here, stdin=subprocess.PIPE) as process:
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        if not reply.exists():
            raise RuntimeError(f"the process that was to call {function.__qualname__} ended with {code} and without an answer: "
                               "what it printed last says why, unless it was killed for memory")
        worked, value = pickle.loads(reply.read_bytes())
    if not worked:
        raise value
    return value


def answer(folder: str) -> None:
    """Calls what the folder's question says, and writes what became of it."""
    Thread(target=_end_with_caller, daemon=True).start()
    function, args, keywords = pickle.loads((Path(folder) / "question").read_bytes())
    try:
        found = True, function(*args, **keywords)
    except Exception as error:
        found = False, error
    write_atomically(Path(folder) / "answer", pickle.dumps(found))


def _end_with_caller() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it returns when the other end is closed
    os._exit(1)
