"""A rival that cannot live in this process: a command that times one convolution or a network and prints a JSON line.

It is called as

    COMMAND --conv ic,ih,iw,oc,kh,kw,stride,pad,groups --matrix FILE --batch N --threads T --seconds S
    COMMAND MODEL.onnx --batch N --threads T --seconds S

with the weights as MatrixMarket, (oc, ic / groups * kh * kw), and its last line has to be JSON with "engine", a name, and
"seconds", the median of one call.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from pathlib import Path

from experiments.baselines import oihw
from experiments.layers import Problem
from experiments.matrix_market import write_matrix

PATIENCE = 300  # seconds


def can_run(problem: Problem) -> bool:
    """Whether one stride and one padding describe the layer, as the command wants it."""
    shape = problem.shape
    pads = {pad for side in shape.padding for pad in side}
    return len(pads) == 1 and shape.strides[0] == shape.strides[1] and shape.kernel_dilation == (1, 1)


def time_command(command: str, problem: Problem, threads: int, seconds: float) -> tuple[str, float]:
    """(name of the engine, seconds of one call), measured by the command.

    Raises:
      RuntimeError: it failed, or printed something else.
    """
    shape = problem.shape
    sizes = shape.ic, shape.ih, shape.iw, shape.oc, shape.kh, shape.kw, shape.strides[0], shape.padding[0][0], shape.groups
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "weights.mtx"
        write_matrix(matrix, oihw(problem.kernel).reshape(shape.oc, -1))
        arguments = ["--conv", ",".join(map(str, sizes)), "--matrix", str(matrix), "--batch", str(shape.n),
                     "--threads", str(threads), "--seconds", str(seconds)]
        return _ask(command, arguments)


def time_network(command: str, model: bytes, n: int, threads: int, seconds: float) -> tuple[str, float]:
    """(name of the engine, seconds of one call) for n images through an ONNX model, measured by the command.

    Raises:
      RuntimeError: it failed, or printed something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        file.write_bytes(model)
        return _ask(command, [str(file), "--batch", str(n), "--threads", str(threads), "--seconds", str(seconds)])


def _ask(command: str, arguments: list[str]) -> tuple[str, float]:
    ran = subprocess.run([*shlex.split(command), *arguments], capture_output=True, text=True, timeout=PATIENCE)
    try:
        answer = json.loads(ran.stdout.splitlines()[-1])
        return str(answer["engine"]), float(answer["seconds"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise RuntimeError(f"the yardstick `{command}` exited with {ran.returncode} and printed {ran.stdout[-200:]!r}, wanted "
                           f"a JSON line with engine and seconds; it also said {ran.stderr[-500:]!r}") from None
