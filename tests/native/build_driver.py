"""Builds the driver that checks the kernels without torch, and runs it.

    python tests/native/build_driver.py native|sanitize|arm [the driver's own arguments]

``native`` links the objects that the package is built of, ``sanitize`` the same compiled with AddressSanitizer and
UndefinedBehaviorSanitizer; both also leave a library in their folder, for KEELNORM_LIBRARY. ``arm`` compiles for
aarch64 and runs on an emulator. What did not change is not compiled again.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path("tests/native")
CSRC = Path("src/keelnorm/engine/kernels/cpu/csrc")
BUILD = Path("build")
DTYPES = ("f32", "f64", "bf16", "f16")

FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{CSRC}"]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ARM_COMPILER = "aarch64-linux-gnu-g++"
ARM_EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
ARM_PACKAGES = "g++-aarch64-linux-gnu and qemu-user"


class MissingToolError(Exception):
    """What this machine lacks, and which package has it."""


def compiler() -> list[str]:
    """The C++ compiler's command, chosen as setup.py does."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise MissingToolError("there is no C++ compiler: install g++")


def native(folder: Path = BUILD / "native", flags: list[str] | None = None) -> list[str]:
    """The command that runs the driver on this machine's kernels."""
    flags, command = flags or [], compiler()
    objects = folder / "objects" if flags else BUILD / "objects"
    environment = {
        **os.environ,
        "KEELNORM_NATIVE": "1",
        "KEELNORM_NODE": "0",
        "KEELNORM_OBJECTS": str(objects),
        "CXXFLAGS": shlex.join([*flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]),
        "LDFLAGS": shlex.join([*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]),
    }
    temporary = ["--build-lib", str(folder), "--build-temp", str(folder)]
    _run([sys.executable, "setup.py", "--quiet", "build_ext", *temporary], env=environment)
    library = folder / "keelnorm/engine/kernels/cpu/libkeelnorm.so"
    library.replace(folder / library.name)
    driver = folder / "driver"
    linked = [*sorted(objects.glob("kernels_*.o")), objects / "dispatch.o"]
    if _is_older(driver, [*_sources(), *linked]):
        _run([*command, *FLAGS, *flags, str(HERE / "driver.cpp"), *map(str, linked), "-o", str(driver)])
    return [str(driver)]


def sanitized() -> list[str]:
    """The same, built with sanitizers."""
    return native(BUILD / "sanitize", SANITIZE)


def arm_tools() -> tuple[list[str], list[str]]:
    """The commands of a compiler for aarch64 and of what runs its programs."""
    if platform.machine() == "aarch64":
        return compiler(), []
    emulator = next(filter(None, map(shutil.which, ARM_EMULATORS)), None)
    if shutil.which(ARM_COMPILER) is None or emulator is None:
        raise MissingToolError(
            f"there is no {ARM_COMPILER} or no qemu-aarch64: install {ARM_PACKAGES} (on Debian and Ubuntu)"
        )
    return [ARM_COMPILER], [emulator]


def arm() -> list[str]:
    """The command that runs the driver built for aarch64."""
    command, emulator = arm_tools()
    folder = BUILD / "arm"
    folder.mkdir(parents=True, exist_ok=True)
    kernel = ["-O2", "-fno-math-errno", "-ffp-contract=off", "-DKEELNORM_ISA=baseline"]
    units = [
        *((f"kernels_{dtype}", CSRC / "kernels.cpp", [*kernel, f"-DKEELNORM_DTYPE={dtype}"]) for dtype in DTYPES),
        ("dispatch", CSRC / "dispatch.cpp", []),
        ("driver", HERE / "driver.cpp", []),
    ]

    def compile_(unit: tuple[str, Path, list[str]]) -> str:
        name, source, options = unit
        object_ = folder / f"{name}.o"
        if _is_older(object_, _sources()):
            _run([*command, *FLAGS, *options, "-c", str(source), "-o", str(object_)])
        return str(object_)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, units))
    _run([*command, "-static", "-pthread", *objects, "-o", str(folder / "driver")])
    return [*emulator, str(folder / "driver")]


BUILDS = {"native": native, "sanitize": sanitized, "arm": arm}


def _sources() -> list[Path]:
    return [path for folder in (CSRC, HERE) for suffix in ("*.h", "*.cpp") for path in (ROOT / folder).glob(suffix)]


def _is_older(made: Path, sources: list[Path]) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def _capture(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )


def _run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with status {done.returncode}: {done.stderr[-3000:]}")


def main(which: str, *arguments: str) -> int:
    os.chdir(ROOT)
    print(f"building the driver ({which})", flush=True)
    try:
        command = BUILDS[which]()
    except MissingToolError as missing:
        print(missing, file=sys.stderr)
        return 1
    if "--dtype" in arguments:
        return subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL).returncode
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process for each dtype
        runs = [pool.submit(_capture, [*command, *arguments, "--dtype", dtype]) for dtype in DTYPES]
        for run in runs:
            print(run.result().stdout, end="", flush=True)
    return max(run.result().returncode != 0 for run in runs)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in BUILDS:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
