"""The border: loads the native module, guards its ABI and registers the handlers with XLA."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import jax

# our compatibility promise to exported programs
TARGETS = TARGET, INT8_TARGET, PROGRAM = "sparseflax_conv_v1", "sparseflax_conv_int8_v2", "sparseflax_program_v2"


def runtime_api() -> tuple[int, int]:
    """(major, minor) of the FFI that the installed jaxlib speaks, read from the headers beside it."""
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    return tuple(int(m[1]) if m else 0 for m in found)  # type: ignore[return-value]


def refusal(built: tuple[int, int], running: tuple[int, int]) -> str | None:
    """Why a module built against FFI `built` must not be registered with a runtime that speaks `running`; None if it may.

    A runtime accepts its own and older minor versions. Registering a newer one would not fail alone: it takes the
    whole CPU backend down with it.
    """
    if built[0] == running[0] and built[1] <= running[1]:
        return None
    return (f"sparseflax's native module was built for XLA FFI {built[0]}.{built[1]}, the installed jaxlib speaks "
            f"{running[0]}.{running[1]}: sparse_conv runs as a dense convolution. Upgrade jaxlib or rebuild sparseflax "
            "against it (pip install --force-reinstall --no-deps sparseflax)")


def _load():
    try:
        native = importlib.import_module("sparseflax._native")
    except ImportError as error:
        return None, (f"sparseflax's native module is missing ({error}): sparse_conv runs as a dense convolution. "
                      "In a clone install with `pip install -e .`")
    return native, refusal(native.api_version(), runtime_api())


native, reason = _load()  # the module, or None; why the handlers are not registered, or None
available = reason is None
if native is not None and available:
    for _target, _instantiate, _execute in ((TARGET, native.conv_instantiate, native.conv_execute),
                                            (INT8_TARGET, native.int8_conv_instantiate, native.int8_conv_execute),
                                            (PROGRAM, native.program_instantiate, native.program_execute)):
        jax.ffi.register_ffi_target(_target, {"instantiate": _instantiate(), "execute": _execute()}, platform="cpu")
else:
    warnings.warn(str(reason), RuntimeWarning, stacklevel=2)


def kernels(element: str = "float32") -> list[str]:
    """Names of the instruction sets whose kernels of "float32" or "int8" this machine can run, best first, "portable" last."""
    return list(native.kernels(element == "int8")) if native is not None and available else []


def tables(element: str = "float32") -> dict[str, float]:
    """{instruction set: cycles of a multiply-add from memory} of this build, best first, whether it runs here or not."""
    return dict(native.tables(element == "int8")) if native is not None and kernels() else {}


def isa() -> str:
    """The instruction set whose kernels run by default here; "xla" when the native module is not available."""
    return (kernels() or ["xla"])[0]
