"""The switch that makes malloc keep memory: on where it can be, off where the environment says so."""

import os
import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource, sparseflax
libc = ctypes.CDLL(None)
pointer, size = ctypes.c_void_p, ctypes.c_size_t
libc.malloc.restype, libc.malloc.argtypes = pointer, [size]
libc.free.argtypes, libc.memset.argtypes = [pointer], [pointer, ctypes.c_int, size]
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    libc.memset(block, 1, 64 << 20)
    libc.free(block)
print(sparseflax.keep_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc is not glibc's")
def test_a_block_that_was_freed_does_not_fault_again_unless_the_environment_forbids():
    def run(**environment):
        ran = subprocess.run([sys.executable, "-c", PAGES], env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
                             capture_output=True, text=True, check=True)
        kept, faults = ran.stdout.split()
        return kept == "True", int(faults)

    kept, faults = run(SPARSEFLAX_KEEP_MEMORY="1")
    assert kept and faults < 64
    kept, faults = run(SPARSEFLAX_KEEP_MEMORY="0")
    # 64 MB are a fault at least for each huge page of 2 MB, or one for each of 16384 small ones.
    assert not kept and faults >= 32
