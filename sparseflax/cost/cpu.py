"""What the operating system and JAX say of this CPU: its name, caches and cores, the threads in use, the kernel it runs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from sparseflax.conv import ffi

SYSFS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
LANES = {"avx512": 16, "avx2": 8, "neon": 4, "portable": 4}  # float32 per vector register
NUMBERS = "cpu family", "model", "stepping"  # in CPUINFO


def client_threads() -> int:
    """Threads in the intra-op pool of JAX's CPU client: PJRT_NPROC, else NPROC, else the CPUs this process may use."""
    for variable in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(variable, "").strip().isdigit():
            return max(1, int(os.environ[variable]))
    return len(_cpus())


def instruction_set() -> str:
    """What the native module runs; without it, the best that the processor could run."""
    if ffi.kernels():
        return ffi.isa()
    flags = _cpuinfo("flags").split()
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags and "fma" in flags:
        return "avx2"
    return "neon" if platform.machine() in ("aarch64", "arm64") else "portable"


def caches() -> tuple[int, int, int, str]:
    """(L1 data, L2, L3) bytes as the first core sees them, and whether they were read or assumed."""
    found = {}
    for index in sorted((SYSFS / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
        except (OSError, ValueError):
            continue
    if 1 in found:
        return found[1], found.get(2, 0), found.get(3, 0), "caches read"
    return 32 << 10, 512 << 10, 8 << 20, "caches assumed"


def cores() -> int:
    """Physical cores among the CPUs this process may use; the CPUs themselves where the topology is not told."""
    cpus = _cpus()
    try:
        parts = ("physical_package_id", "core_id")
        return len({tuple((SYSFS / f"cpu{cpu}" / "topology" / part).read_text() for part in parts) for cpu in cpus})
    except OSError:
        return len(cpus)


def _cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def processor() -> str:
    """The name of the processor, and which one of that name: "AMD EPYC" are many."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown CPU"
    numbers = [f"{field.removeprefix('cpu ')} {number}" for field in NUMBERS if (number := _cpuinfo(field))]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def identity() -> dict[str, str | list[int]]:
    """What tells CPUs of one name apart: family, model and stepping, "" where they are not told, and bytes of the caches."""
    told: dict[str, str | list[int]] = {field: _cpuinfo(field) for field in NUMBERS}
    return told | {"caches": list(caches()[:3])}


def _cpuinfo(field: str) -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")
