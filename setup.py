"""Builds the native CPU kernels: one source compiled for several instruction sets, into one library.

The library registers its operators with LibTorch through the stable ABI. It is not a Python module, so one build serves
every Python, and every torch from 2.10 on. Where it cannot be built (no C++ compiler, no torch), the package installs
without it and runs on the reference back end. KEELNORM_NATIVE=0 skips it, KEELNORM_NATIVE=1 requires it. CXX, CXXFLAGS
and LDFLAGS are used. KEELNORM_OBJECTS names a folder that keeps object files, so that the next build compiles only
changed files.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build as build_command
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "keelnorm.engine.kernels.cpu.libkeelnorm"
CSRC = Path("src/keelnorm/engine/kernels/cpu/csrc")
TORCH_FOR_BUILDING = "torch==2.13.0"
TORCH_TARGET_VERSION = "0x020a000000000000"  # the oldest torch that the library must load into: 2.10

FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
]
#: The flags of each instruction set of csrc/instruction_sets.h.
INSTRUCTION_SETS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *INSTRUCTION_SETS["avx2"]]
    INSTRUCTION_SETS["avx512_bf16"] = ["-mavx512bf16", *INSTRUCTION_SETS["avx512"]]
DTYPES = dict.fromkeys(INSTRUCTION_SETS, ("f32", "f64", "bf16", "f16")) | {"avx512_bf16": ("bf16",)}

wish = os.environ.get("KEELNORM_NATIVE", "")
if wish not in ("", "0", "1"):
    raise SystemExit(f"KEELNORM_NATIVE is {wish!r}; legal are 0 (skip), 1 (require) and unset (build where possible)")


class BuildError(Exception):
    """The library can't be built; the message is one line, shown to users of the package."""


def find_compiler() -> list[str] | None:
    """Find the C++ compiler's command: CXX if it is set, else the first that is installed."""
    wished = os.environ.get("CXX", "").strip()
    for name in [wished] if wished else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def find_torch() -> Path | None:
    """Find the torch to compile against, 2.10 or newer; in an isolated build also outside, in the same Python."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(folder) / "torch" for folder in [*site.getsitepackages(), site.getusersitepackages()]]
    for torch in candidates:
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
        if version and (int(version[1]), int(version[2])) >= (2, 10):
            return torch
    return None


def run(command: list[str], what: str) -> None:
    """Run a command; raise a BuildError that names the file if it fails."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run on {what}: {error}") from None
    sys.stderr.write(done.stdout + done.stderr)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in said if "error" in line), said[-1] if said else "it said nothing")
        raise BuildError(f"{command[0]} ended with status {done.returncode} on {what}: {told[:300]}")


def is_current(object_: Path, command: list[str]) -> bool:
    """Whether a kept object file is up to date with its sources and its command."""
    record, depends = object_.with_suffix(".command"), object_.with_suffix(".d")
    if not (object_.exists() and depends.exists() and record.exists() and record.read_text() == shlex.join(command)):
        return False
    sources = [Path(word) for word in depends.read_text().replace("\\\n", " ").split()[1:]]
    return all(source.exists() and source.stat().st_mtime <= object_.stat().st_mtime for source in sources)


def compile_unit(command: list[str], object_: Path, what: str) -> None:
    """Compile an object file unless a kept one is up to date."""
    command = [*command, "-MMD", "-c", "-o", str(object_)]
    if not is_current(object_, command):
        object_.unlink(missing_ok=True)
        run(command, what)
        object_.with_suffix(".command").write_text(shlex.join(command))


def build(library: Path) -> None:
    """Compile and link the library.

    Raises:
        BuildError: KEELNORM_NATIVE=0 skips it, something is missing, or the compiler failed.
    """
    if wish == "0":
        raise BuildError("KEELNORM_NATIVE=0 skipped it")
    compiler, torch = find_compiler(), find_torch()
    if compiler is None:
        asked = f" (CXX is {os.environ['CXX']!r})" if os.environ.get("CXX") else ""
        raise BuildError(f"there was no C++ compiler{asked}")
    if torch is None:
        raise BuildError("there was no torch 2.10 or newer to compile against")
    wished_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    with_torch = [f"-isystem{torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    units = [
        *(
            (f"kernels_{isa}_{dtype}", "kernels.cpp", [f"-DKEELNORM_ISA={isa}", f"-DKEELNORM_DTYPE={dtype}", *options])
            for isa, options in INSTRUCTION_SETS.items()
            for dtype in DTYPES[isa]
        ),
        ("register", "register.cpp", with_torch),
        ("dispatch", "dispatch.cpp", []),
    ]
    kept = os.environ.get("KEELNORM_OBJECTS")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(kept or temporary)
        folder.mkdir(parents=True, exist_ok=True)

        def compile_(unit: tuple[str, str, list[str]]) -> str:
            name, source, options = unit
            object_ = folder / f"{name}.o"
            command = [*compiler, *FLAGS, *wished_flags, *options, str(CSRC / source)]
            compile_unit(command, object_, f"{source} ({name})")
            return str(object_)

        objects = list(pool.map(compile_, units))
        # Debian's linker drops libraries that nothing refers to yet; the operators need these when they are loaded.
        libraries = ["-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        strip = [] if any(re.match(r"-g(?!0)", flag) for flag in wished_flags) else ["-Wl,-s"]
        options = [*strip, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run([*compiler, "-shared", *objects, *libraries, *options, "-o", str(library)], library.name)


class BuildAfresh(build_command):
    """Clears the build folder first: modules removed since the last build would be installed otherwise."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Puts the library into its package's folder, or not_built.txt with the reason why it is missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        library = Path(self.get_ext_fullpath(LIBRARY))  # in the source tree when the install is editable
        reason = library.with_name("not_built.txt")
        library.parent.mkdir(parents=True, exist_ok=True)
        for stale in (library, reason):  # removed, not overwritten: a running process may have it mapped
            stale.unlink(missing_ok=True)
        try:
            build(library)
        except BuildError as error:
            if wish == "1":
                raise CompileError(f"KEELNORM_NATIVE=1 requires the native CPU kernels, but {error}") from None
            reason.write_text(f"{error}\n")
            self.warn(f"the native CPU kernels are missing, the reference back end will run: {error}")

    def get_output_mapping(self) -> dict[str, str]:  # from a wheel's path to the source tree's, for editable installs
        paths = [(Path(wheel), Path(source)) for wheel, source in super().get_output_mapping().items()]
        paths += [(wheel.with_name("not_built.txt"), source.with_name("not_built.txt")) for wheel, source in paths]
        return {str(wheel): str(source) for wheel, source in paths if source.exists()}


class WheelForEveryPython(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


needs_torch = wish != "0" and find_compiler() is not None and find_torch() is None
sources = sorted(str(path) for path in CSRC.glob("*.cpp"))
depends = sorted(str(path) for path in CSRC.glob("*.h"))
setup(
    ext_modules=[Extension(LIBRARY, sources, depends=depends, language="c++")],
    cmdclass={"build": BuildAfresh, "build_ext": BuildNative, "bdist_wheel": WheelForEveryPython},
    setup_requires=[TORCH_FOR_BUILDING] if needs_torch else [],
)
