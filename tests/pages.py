"""The code of a page, run in a process of its own, forked from one that has imported all: importing takes longer than most."""

import multiprocessing
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType

import flax  # noqa: F401
import jax  # noqa: F401
import optax  # noqa: F401

import sparseflax  # noqa: F401
from sparseflax.cost import timing

HURRY = 0.02  # of the seconds for which a page measures: that what it says of speed is right is not seen here


def run(code: str, folder: Path, cache: Path) -> str:
    """What the code prints, in a folder and with a cache of its own.

    Raises:
      AssertionError: it failed, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    printed = folder / "printed"
    args = code, str(folder), str(cache), str(printed), jax.config.jax_compilation_cache_dir
    process = context.Process(target=_execute, args=args)
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode == 0, printed.read_text()
    return printed.read_text()


def _execute(code: str, folder: str, cache: str, printed: str, compiled: str) -> None:
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = cache
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_disable_most_optimizations", True)  # half of the time was compilation
    jax.config.update("jax_compilation_cache_dir", compiled)  # much of a page is in others too
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    in_turn = timing.in_turn
    timing.in_turn = lambda calls, seconds, burst=0.0: in_turn(calls, HURRY * seconds, HURRY * burst)
    main = sys.modules["__main__"] = ModuleType("__main__")
    with warnings.catch_warnings():
        # One would mean that the kernel is missing.
        warnings.simplefilter("error", RuntimeWarning)
        try:
            exec(compile(code, "page", "exec"), vars(main))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
