"""How far a long run is, on stderr: a progress bar on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10  # per run where there is no terminal


class Advance(Protocol):
    def __call__(self, done: int, text: str = "") -> None:
        """`done` steps of the total are done; `text` says how it goes."""


@contextmanager
def progress(title: str, total: int, done: int = 0, console: Console | None = None) -> Iterator[Advance]:
    """Show the progress of `total` steps, of which `done` were done before; yields the function to call after a step."""
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                   TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total, completed=done, text="")
            yield lambda done, text="": bars.update(task, completed=done, text=text)
    else:
        start, first = time.perf_counter(), done

        def line(done: int, text: str = "") -> None:
            if done * LINES // total > (done - 1) * LINES // total:
                seconds = (time.perf_counter() - start) / max(1, done - first)
                print(f"{title}  {done}/{total}  {text}  {seconds:.3f} s per step", file=sys.stderr, flush=True)

        yield line
