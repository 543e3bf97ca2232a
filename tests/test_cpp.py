"""The kernel below XLA and Python: its C++ tests under sanitizers and on an emulated aarch64, and its machine code."""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from sparseflax.conv import ffi
from sparseflax.conv.ffi import runtime_api

KERNEL = Path(__file__).parents[1] / "xla_ffi"
TEST = Path(__file__).parent / "cpp" / "sparse_conv_test.cc"
INT8, DENSE, DEPTHWISE, PROGRAM = (TEST.with_name(f"{name}_test.cc") for name in ("int8", "dense", "depthwise", "program"))
BORDER = [KERNEL / "handler.cc", KERNEL / "program_handler.cc"]  # need XLA's headers, and what tests them:
HANDLER, *FUZZ = (TEST.with_name(f"{name}.cc") for name in ("handler_test", "handler_fuzz", "program_fuzz"))
MAINS = [TEST, INT8, DENSE, DEPTHWISE, PROGRAM, HANDLER, *FUZZ]
X86, ARM = "g++", "aarch64-linux-gnu-g++"
OUTSIDE = "handler.cc", "int8_handler.cc", "program_handler.cc", "module.cc"  # what needs XLA or Python
SOURCES = sorted(p for p in KERNEL.glob("*.cc") if p.name not in OUTSIDE)
TILES = [p for p in SOURCES if "microkernel.inc" in p.read_text() and p.name != "portable.cc"]  # with vectors of their own
BUILT = 0, 3  # FFI version of the headers in pyproject.toml
SERIAL = ["tiles", "flattened", "nonfinite", "damaged", "sizes"]
INT8_SERIAL = ["tiles", "nearly_all", "flattened"]
AVAILABLE = {*ffi.kernels(), *ffi.kernels("int8")}
# Whose instructions can be replaced, see cpp/emulated, and have to be here.
EMULATED = [p for p in SOURCES if "SF_EMULATED" in p.read_text() and p.stem not in AVAILABLE]
RELEASE = ["-O3", "-DNDEBUG", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]  # as CMakeLists.txt builds the module
# Under a sanitizer: the loops, which all instruction sets share, with the vectors of any machine and with the best of this one.
# Its other sets run as they are released, between the same guard pages.
BEST = {*ffi.kernels()[:1], *ffi.kernels("int8")[:1]}
WATCHED = [p for p in SOURCES if p not in TILES or p.stem in BEST or not AVAILABLE]

# name: compiler, flags, sources; a file of another architecture compiles to nothing. Only what is released is optimized: nearly
# all of the time went there, and a sanitizer sees more of what a source says. NEON's kernels are run as they are released;
# where instructions or a processor are emulated a little of it (-Og) saves more than it takes, and what a sanitizer looks at is
# called and not inlined (SF_CALLS).
BUILDS = {
    "x86 release": (X86, RELEASE, TILES),
    "address,undefined": (X86, ["-O0", "-DSF_CALLS", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
                                "-fno-sanitize=null,object-size"], [*WATCHED, *BORDER, *MAINS]),  # address sees those
    "emulated": (X86, ["-Og", "-mavx2", "-mfma", "-DSF_EMULATED", f"-I{TEST.with_name('emulated')}"], EMULATED),
    "thread": (X86, ["-O0", "-DSF_CALLS", "-fsanitize=thread"], [*WATCHED, *BORDER, TEST, PROGRAM, HANDLER]),
    "neon release": (ARM, RELEASE, TILES),
    "neon": (ARM, ["-Og", "-static"], [*(p for p in SOURCES if p not in TILES), TEST, INT8, DENSE, DEPTHWISE]),
}


def parts(name: str, main: Path, other: str = "") -> dict[Path, str]:
    """{source: build of its object} for a program of a build: what that does not compile comes as it is released."""
    builds = [build for build in (other, name, f"{'neon' if BUILDS[name][0] == ARM else 'x86'} release") if build]
    found = {source: [build for build in builds if source in BUILDS[build][2]] for source in (*SOURCES, *BORDER, main)}
    return {source: having[0] for source, having in found.items() if having}


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def need(name: str, *programs: str) -> None:
    """Skips unless this machine can make a build and use it."""
    compiler, flags, _ = BUILDS[name]
    missing = [p for p in (compiler, *programs) if shutil.which(p) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    if compiler == X86 and platform.machine() != "x86_64":
        pytest.skip("x86-64 only")


def need_headers() -> None:
    """Skips where XLA's headers are newer than those that the module is built against: their runtime is another one."""
    if (found := runtime_api()) != BUILT:
        pytest.skip(f"the runtime of these tests speaks XLA FFI {BUILT}, the installed headers are of {found}")


def installed(source: Path) -> Path | None:
    """The object in the module that is installed from this clone, where nothing that it is made of has changed since."""
    made_of = source, *KERNEL.glob("*.h"), *KERNEL.glob("*.inc"), KERNEL / "CMakeLists.txt"
    newest = max(path.stat().st_mtime for path in made_of)
    found = KERNEL.parent.glob(f"build/*/CMakeFiles/_native.dir/{source.name}.o")
    return next((path for path in found if path.stat().st_mtime > newest), None)


def compiled(compiler: str, flags: list[str], source: Path, folder: Path) -> Path:
    if (compiler, flags) == (X86, RELEASE) and (ready := installed(source)):
        return ready
    target = folder / f"{source.stem}.o"
    run(compiler, "-std=c++17", *flags, f"-I{KERNEL}", "-isystem", jax.ffi.include_dir(), "-c", source, "-o", target)
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """For each build the futures of its object files: everything compiles in the background while tests run."""
    folder = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in BUILDS:
            (folder / name).mkdir()
        yield {name: {source: pool.submit(compiled, compiler, flags, source, folder / name) for source in sources}
               for name, (compiler, flags, sources) in BUILDS.items() if shutil.which(compiler)}
        pool.shutdown(cancel_futures=True)


def link(name: str, objects, folder: Path, main: Path = TEST, other: str = "") -> Path:
    """A program of a build, some of its objects those of another build; skips if its sanitizer does not link or start here."""
    compiler, flags, _ = BUILDS[name]
    if "-static" not in flags:
        (folder / "empty.cc").write_text("int main() {}")
        for command in ([compiler, *flags, folder / "empty.cc", "-o", folder / "empty"], [folder / "empty"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the {name} sanitizer does not work here: {done.stderr[-200:]}")
    linked = [objects[build][source].result() for source, build in parts(name, main, other).items()]
    run(compiler, *flags, "-pthread", *linked, "-o", folder / "test")
    return folder / "test"


def test_address_and_undefined_behaviour(objects, tmp_path):
    """Every instruction set of this machine x register tile x arrangement of lanes, between guard pages."""
    need("address,undefined")
    output = run(link("address,undefined", objects, tmp_path), "all", *SERIAL)
    assert re.findall(r"^ok (\w+)$", output, re.MULTILINE) == SERIAL


def test_int8_is_exact(objects, tmp_path):
    """Every instruction set of this machine x register tile x arrangement of lanes gives the integers of the reference."""
    need("address,undefined")
    output = run(link("address,undefined", objects, tmp_path, INT8), "all", *INT8_SERIAL)
    assert re.findall(r"^ok (\w+)$", output, re.MULTILINE) == INT8_SERIAL


@pytest.mark.parametrize("main", [DENSE, DEPTHWISE], ids=["dense", "depthwise"])
def test_a_step_is_exact(objects, tmp_path, main):
    """Every instruction set of this machine gives the integers of the reference, between guard pages."""
    need("address,undefined")
    output = run(link("address,undefined", objects, tmp_path, main))
    assert "ok portable" in output and len(output.splitlines()) == len(ffi.kernels())


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512vlvnni", "avxvnni"])
def test_int8_by_emulated_instructions(objects, tmp_path, isa):
    """VNNI, where there is none: the same sources, their instructions replaced by what the manual says that they do."""
    need("address,undefined")
    if isa in AVAILABLE:
        pytest.skip(f"{isa} itself runs here")
    if platform.system() != "Linux" or " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AVX2, which is not emulated")
    program = link("address,undefined", objects, tmp_path, INT8, other="emulated")
    assert re.findall(r"^ok (\w+)$", run(program, isa, *INT8_SERIAL), re.MULTILINE) == INT8_SERIAL


def test_data_races(objects, tmp_path):
    need("thread")
    assert run(link("thread", objects, tmp_path), "all", "threads", "pool") == "ok threads\nok pool\n"


@pytest.mark.parametrize("name", ["thread", "address,undefined"])
def test_the_handler_with_a_runtime_of_its_own(objects, tmp_path, name):
    """What XLA calls: metadata, instantiation, and executions by four threads at once that share a pool."""
    need(name)
    need_headers()
    assert run(link(name, objects, tmp_path, HANDLER)) == "ok\n"


@pytest.mark.parametrize("fuzz, outcome", [*zip(FUZZ, ("right", "computed"), strict=True)])
def test_handlers_given_anything(objects, tmp_path, fuzz, outcome):
    """A few of the cases of `python -m tests.fuzz`."""
    need("address,undefined")
    need_headers()
    assert f'"{outcome}"' in run(link("address,undefined", objects, tmp_path, fuzz), 1, 0, 60, 2000)


@pytest.mark.parametrize("name", ["address,undefined", "thread"])
def test_programs(objects, tmp_path, name, monkeypatch):
    """Any number of threads and images at a time gives the same, and what is only claimed takes no memory."""
    need(name)
    monkeypatch.setenv("ASAN_OPTIONS", "max_allocation_size_mb=512")
    assert run(link(name, objects, tmp_path, PROGRAM)) == "ok\n"


def test_neon_under_emulation(objects, tmp_path):
    need("neon", "qemu-aarch64")
    output = run("qemu-aarch64", link("neon", objects, tmp_path), "neon", *SERIAL)
    assert re.findall(r"^ok (\w+)$", output, re.MULTILINE) == SERIAL


@pytest.mark.parametrize("main", [DENSE, DEPTHWISE], ids=["dense", "depthwise"])
def test_a_neon_step_is_exact_under_emulation(objects, tmp_path, main):
    need("neon", "qemu-aarch64")
    assert "ok neon" in run("qemu-aarch64", link("neon", objects, tmp_path, main))


@pytest.mark.parametrize("isa", ["neondot", "neon"])
def test_neon_int8_under_emulation(objects, tmp_path, isa):
    need("neon", "qemu-aarch64")
    output = run("qemu-aarch64", "-cpu", "max", link("neon", objects, tmp_path, INT8), isa, *INT8_SERIAL)
    assert re.findall(r"^ok (\w+)$", output, re.MULTILINE) == INT8_SERIAL


def microkernels(objdump: str, file: Path) -> dict[str, list[str]]:
    """Instructions ("mnemonic operands") of every register tile: "namespace::VisitTile<y, x>" or ...::DenseTile<p, r>."""
    found: dict[str, list[str]] = {}
    code: list[str] = []
    for line in run(objdump, "-d", "-C", "--no-show-raw-insn", file).splitlines():
        if line.endswith(">:"):
            tile = re.search(r"\w+::(Visit|Dense)Tile<.*?>", line)
            code = found.setdefault(tile[0], []) if tile else []
        elif "\t" in line:
            code.append(line.split("\t", 1)[1])
    return found


@pytest.mark.parametrize(("name", "fma", "stack"), [
    ("x86 release", r"(\{vex\} )?(vfn?m\w+ps|vpmaddwd|vpdpbusd) .*%[yz]mm", r"v.*[-, ](0x\w+)?\(%rsp|v.*-0x\w+\(%rbp"),
    ("neon release", r"(fmla|sdot|sadalp)\t", r"(ld|st)[rpu]+\tq.*\[(sp|x29)"),  # d8 to d15 the callee has to save
])
def test_no_accumulator_is_spilled(objects, name, fma, stack):
    """A microkernel keeps its accumulators in registers: no vector goes to its stack frame or comes from there."""
    objdump = BUILDS[name][0].replace("g++", "objdump")
    need(name, objdump)
    checked = 0
    for source, compiled in objects[name].items():
        for tile, code in microkernels(objdump, compiled.result()).items():
            y, x = map(int, re.findall(r"\d+", tile.split("<")[1])[:2])
            hot = [i for i, line in enumerate(code) if re.match(fma, line)]
            assert len(hot) >= (4 if "Visit" in tile else 1) * y * x, f"{source.stem} {tile}: no hot loop in here"
            if "Dense" in tile:  # a part of a vector may go through the stack before and after
                code = code[hot[0]:hot[-1]]
            assert [line for line in code if re.match(stack, line)] == [], f"{source.stem} {tile}"
            checked += 1
    assert checked > 10


@pytest.mark.parametrize(("name", "maximum"), [("x86 release", r"vpmaxub .*%[yz]mm"), ("neon release", r"umax\tv")])
def test_maxima_of_bytes_are_vectors(objects, name, maximum):
    """A byte that is stored could lie where the sizes of the loop do: the compiler has to see that it does not."""
    objdump = BUILDS[name][0].replace("g++", "objdump")
    need(name, objdump)
    checked = 0
    for source, compiled in objects[name].items():
        code = run(objdump, "-d", "-C", compiled.result())
        if code := re.search(r"^\w+ <void \S*::PoolChannels<true, unsigned char>.*?\n\n", code, re.M | re.S):
            assert re.search(maximum, code[0]), source.stem
            checked += 1
    assert checked > 0
