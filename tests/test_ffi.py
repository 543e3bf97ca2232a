"""The border to XLA: which native modules are registered, and what happens without one."""

import os
import subprocess
import sys

import pytest

from sparseflax.conv import ffi


@pytest.mark.parametrize("built", [(0, 3), (0, 2), (0, 0)])
def test_same_or_older_modules_are_registered(built):
    assert ffi.refusal(built, (0, 3)) is None


@pytest.mark.parametrize("built", [(0, 4), (1, 0), (1, 3)])
def test_newer_modules_are_refused(built):
    message = ffi.refusal(built, (0, 3))
    assert message is not None
    assert f"built for XLA FFI {built[0]}.{built[1]}, the installed jaxlib speaks 0.3" in message
    assert "Upgrade jaxlib" in message


def test_the_runtime_speaks_what_the_module_was_built_for():
    assert ffi.native is not None and ffi.available, ffi.reason
    assert ffi.refusal(ffi.native.api_version(), ffi.runtime_api()) is None


def test_kernel_names():
    """Best first, the last of them runs anywhere."""
    names = ffi.kernels()
    assert ffi.isa() == names[0] and names[-1] == "portable" and len(set(names)) == len(names)


WITHOUT = """
import sys, types, warnings
import numpy as np
sys.modules["sparseflax._native"] = {module}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sparseflax as sf
    from sparseflax.conv import ffi
(warning,) = [w for w in caught if "sparseflax" in str(w.message)]
print(warning.category.__name__, warning.message)
import jax
x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 3), np.float32)
want = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
assert np.array_equal(jax.jit(sf.sparse_conv)(x, sf.pack(kernel)), want)
assert ffi.TARGET not in jax.jit(sf.sparse_conv).lower(x, sf.pack(kernel)).as_text()
assert ffi.kernels() == [] and ffi.isa() == "xla" and not ffi.available
from flax import nnx
machine = sf.detect_machine()
assert "python -m sparseflax calibrate" not in machine.source
model = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(0)))
whole = sf.prune.measure(model, x, machine, speedup=2, seconds=0.1)
guide = sf.prune.guided(sf.conv_shapes(model, x), machine, speedup=2, whole=whole, best_effort=True)
packed = sf.pack_model(model, sf.plan(model, x, machine))
assert np.allclose(packed(x), model(x), atol=1e-5)
"""


@pytest.mark.parametrize(("module", "message"), [
    ("None", "native module is missing"),
    ("types.SimpleNamespace(api_version=lambda: (0, 99))", "was built for XLA FFI 0.99"),
], ids=["missing", "too new"])
def test_without_a_usable_module_one_warning_and_plain_jax(module, message):
    done = subprocess.run([sys.executable, "-c", WITHOUT.format(module=module)], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("RuntimeWarning") and message in line and "sparse_conv runs as a dense convolution" in line
