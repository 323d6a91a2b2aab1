"""Builds the native CPU kernels: one source compiled for several instruction sets, into one library.

The library registers its operators with LibTorch through the stable ABI. It is not a Python module, so one build serves
every Python, and every torch from 2.10 on. Where it cannot be built (no C++ compiler, no torch), the package installs
without it and runs on the reference back end. KEELNORM_NATIVE=0 skips it, KEELNORM_NATIVE=1 requires it. CXX, CXXFLAGS
and LDFLAGS are used. KEELNORM_OBJECTS names a folder that keeps object files, so that the next build compiles only
changed files.

Autograd's node in C++ is built for this torch and this Python, where Python's headers are; others do without.
KEELNORM_NODE=0 skips it.
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
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build as build_command
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = "keelnorm.engine.kernels.cpu.libkeelnorm"
CSRC = Path("src/keelnorm/engine/kernels/cpu/csrc")
#: What a build leaves in the package.
BUILT = ("libkeelnorm.so", "not_built.txt", "autograd_node-torch-*", "no_autograd_node.txt")
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

#: Of the node: torch's headers are C++20, and its ABI has exceptions, Python objects and visible types.
NODE_FLAGS = ["-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]

wish = os.environ.get("KEELNORM_NATIVE", "")
if wish not in ("", "0", "1"):
    raise SystemExit(f"KEELNORM_NATIVE is {wish!r}; legal are 0 (skip), 1 (require) and unset (build where possible)")


class BuildError(Exception):
    """The library can't be built; the message is one line, shown to users of the package."""


class LacksError(BuildError):
    """What is optional lacks what it is built with."""


def find_compiler() -> list[str] | None:
    """Find the C++ compiler's command: CXX if it is set, else the first that is installed."""
    wished = os.environ.get("CXX", "").strip()
    for name in [wished] if wished else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    return None


def version_of(torch: Path) -> str | None:
    """Find the version of a torch by its files, as ``torch.__version__`` says it."""
    found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return found[1] if found else None


def find_torch() -> Path | None:
    """Find the torch to compile against, 2.10 or newer; in an isolated build also outside, in the same Python."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(folder) / "torch" for folder in [*site.getsitepackages(), site.getusersitepackages()]]
    for torch in candidates:
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.match(r"(\d+)\.(\d+)", version_of(torch) or "")
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


class Build:
    """What both libraries are built with.

    Args:
        folder: Where object files go.

    Raises:
        BuildError: KEELNORM_NATIVE=0 skips them, or something is missing.
    """

    def __init__(self, folder: Path) -> None:
        if wish == "0":
            raise BuildError("KEELNORM_NATIVE=0 skipped it")
        compiler, torch = find_compiler(), find_torch()
        if compiler is None:
            asked = f" (CXX is {os.environ['CXX']!r})" if os.environ.get("CXX") else ""
            raise BuildError(f"there was no C++ compiler{asked}")
        if torch is None:
            raise BuildError("there was no torch 2.10 or newer to compile against")
        self.compiler, self.torch, self.folder = compiler, torch, folder
        self.wished_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        folder.mkdir(parents=True, exist_ok=True)

    def compile(self, name: str, source: str, flags: list[str], options: list[str]) -> str:
        """Compile one object file."""
        object_ = self.folder / f"{name}.o"
        command = [*self.compiler, *flags, *self.wished_flags, *options, str(CSRC / source)]
        compile_unit(command, object_, f"{source} ({name})")
        return str(object_)

    def link(self, library: Path, objects: list[str], libraries: list[str]) -> None:
        """Link a library against torch's."""
        # Debian's linker drops libraries that nothing refers to yet; the operators need these when they are loaded.
        torchs = ["-Wl,--no-as-needed", f"-L{self.torch / 'lib'}", *libraries]
        strip = [] if any(re.match(r"-g(?!0)", flag) for flag in self.wished_flags) else ["-Wl,-s"]
        options = [*strip, *shlex.split(os.environ.get("LDFLAGS", ""))]
        run([*self.compiler, "-shared", *objects, *torchs, *options, "-o", str(library)], library.name)

    def kernels(self, library: Path, map_: Callable[..., Iterable[str]]) -> None:
        """Build the kernels' library."""
        with_torch = [f"-isystem{self.torch / 'include'}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        units = [
            *(
                (
                    f"kernels_{isa}_{dtype}",
                    "kernels.cpp",
                    [f"-DKEELNORM_ISA={isa}", f"-DKEELNORM_DTYPE={dtype}", *options],
                )
                for isa, options in INSTRUCTION_SETS.items()
                for dtype in DTYPES[isa]
            ),
            ("register", "register.cpp", with_torch),
            ("dispatch", "dispatch.cpp", []),
        ]
        objects = list(map_(lambda unit: self.compile(unit[0], unit[1], FLAGS, unit[2]), units))
        self.link(library, objects, ["-ltorch_cpu", "-lc10"])

    def node(self, folder: Path) -> None:
        """Build autograd's node for this torch and this Python."""
        if os.environ.get("KEELNORM_NODE") == "0":
            raise LacksError("KEELNORM_NODE=0 skipped it")
        headers = sysconfig.get_paths()["include"]
        if not (Path(headers) / "Python.h").exists():
            raise LacksError("there were no headers of this Python (on Debian and Ubuntu: python3-dev)")
        include = self.torch / "include"
        options = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}", f"-isystem{headers}"]
        built = self.compile("autograd_node", "autograd_node.cpp", NODE_FLAGS, options)
        library = folder / f"autograd_node-torch-{version_of(self.torch)}{EXTENSION_SUFFIXES[0]}"
        self.link(library, [built], ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"])


class BuildAfresh(build_command):
    """Clears the build folder first: modules removed since the last build would be installed otherwise."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Puts the libraries into their package's folder, or files that say why one is missing."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        library = Path(self.get_ext_fullpath(LIBRARY))  # in the source tree when the install is editable
        package = library.parent
        package.mkdir(parents=True, exist_ok=True)
        for name in BUILT:  # removed, not overwritten: a running process may have it mapped
            for stale in package.glob(name):
                stale.unlink()
        kept = os.environ.get("KEELNORM_OBJECTS")
        with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                build = Build(Path(kept or temporary))
                node = pool.submit(build.node, package)  # takes longest
                build.kernels(library, pool.map)
            except BuildError as error:
                self.leave_out(package / "not_built.txt", "the native CPU kernels are", error)
                return
            try:
                node.result()
            except BuildError as error:
                self.leave_out(package / "no_autograd_node.txt", "autograd's node in C++ is", error)

    def leave_out(self, record: Path, what: str, error: BuildError) -> None:
        """Record why something is missing, unless it is required: the node is where there are Python's headers."""
        if wish == "1" and not isinstance(error, LacksError):
            raise CompileError(f"KEELNORM_NATIVE=1 requires the native CPU kernels, but {error}") from None
        record.write_text(f"{error}\n")
        self.warn(f"{what} missing: {error}")

    def get_output_mapping(self) -> dict[str, str]:  # from a wheel's path to the source tree's, for editable installs
        paths = [(Path(wheel), Path(source)) for wheel, source in super().get_output_mapping().items()]
        return {
            str(wheel.with_name(found.name)): str(found)
            for wheel, source in paths
            for name in BUILT
            for found in source.parent.glob(name)
        }


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
