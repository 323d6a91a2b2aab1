"""Compiles the Triton kernels for a GPU that is not installed, with the arguments of some cases.

`python -m support.compiling cuda 90` prints a JSON list: each kernel with its cut, registers spilled where ptxas tells.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from keelnorm.engine.kernels.triton import launches, operators

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


class Compiled:
    """Stands in for a kernel: a launch compiles it with the launch's arguments, and runs nothing."""

    def __init__(self, kernel: JITFunction[Any], target: GPUTarget, found: list[dict[str, Any]]) -> None:
        self.kernel, self.target, self.found = kernel, target, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            names = list(self.kernel.arg_names)
            signature: dict[str, str] = {}
            constants: dict[tuple[int, ...], Any] = {}
            attributes: dict[tuple[int, ...], list[list[Any]]] = {}
            for index, (name, given) in enumerate(zip(names, arguments, strict=False)):
                if isinstance(given, torch.Tensor):
                    signature[name] = POINTERS[given.dtype]
                elif isinstance(given, int) and given == 1:  # Triton makes a constant of it
                    signature[name] = "constexpr"
                    constants[(index,)] = 1
                else:
                    wide = "i64" if given >= 2**31 else "i32"
                    signature[name] = "fp32" if isinstance(given, float) else wide
                if isinstance(given, torch.Tensor) or (isinstance(given, int) and given % 16 == 0):
                    attributes[(index,)] = [["tt.divisibility", 16]]
            for name, value in named.items():
                if name in names:
                    signature[name] = "constexpr"
                    constants[(names.index(name),)] = value
            options = {name: value for name, value in named.items() if name not in names}
            made = compile_kernel(
                ASTSource(self.kernel, signature, constants, attributes), target=self.target, options=options
            )
            self.found.append(
                {"kernel": self.kernel.__name__, "a": named.get("A"), "b": named.get("B"), "spilled": spilled(made)}
            )

        return launch


def spilled(made: Any) -> int | None:
    """Bytes of registers that spill into memory, where ptxas tells."""
    programs = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas"))
    if "ptx" not in made.asm or not programs:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        architecture = re.search(r"\.target (\w+)", made.asm["ptx"])
        assert architecture is not None
        asked = [programs[0], "-v", "--gpu-name", architecture[1], file.name, "-o", os.devnull]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    return None if found is None else int(found[1])


def compile_all(kind: str, architecture: int | str) -> list[dict[str, Any]]:
    """The kernels of forwards and backwards of shapes that take every path."""
    found: list[dict[str, Any]] = []
    target = GPUTarget(kind, architecture, 32 if kind == "cuda" else 64)
    for name, kernel in list(vars(launches).items()):
        if isinstance(kernel, JITFunction):
            setattr(launches, name, Compiled(kernel, target, found))
    shapes: list[tuple[int, ...]] = [(8, 64, 14, 14), (256, 64, 28, 28)]
    cases = list(product(shapes, (False, True), (torch.bfloat16, torch.float32)))[::3]
    # Sizes of 1 are constants to Triton.
    cases += [
        ((1, 3, 200, 200), False, torch.float16),
        ((300, 1, 8, 8), True, torch.float16),
        ((64, 1), False, torch.float32),
    ]
    for number, (shape, last, dtype) in enumerate(cases):
        channels = shape[1]
        x = torch.empty(shape, dtype=dtype)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        vector = torch.ones(channels)
        residual = torch.empty_like(x) if number % 2 == 0 else None
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if number % 4 == 3 else None
        activation = 1 if residual is not None else 5
        y, saved = operators.forward_(
            x, residual, vector, vector, vector.clone(), vector.clone(), torch.tensor(0), True, True,
            None if number % 2 else 0.1, 1e-5, activation, 0.0, 0.0, torch.zeros(3, channels, dtype=torch.int64), mask,
            False,
        )  # fmt: skip
        operators.backward(
            x, x, saved, vector, vector, y if residual is not None else None, None, True, activation, 0.0, 0.0, True,
            residual is not None, True, True, mask, False,
        )  # fmt: skip
        operators.forward_(
            x, None, vector, vector, vector, vector, None, False, False, 0.1, 1e-5, activation, 0.0, 0.0
        )  # fmt: skip
        operators.grad_input(x, x, saved[0], saved[2], vector, vector, None, None, saved[:2], activation, 0.0, 0.0)
        operators.invert(x, saved, vector, vector, 4, 1.0, 0.0)
    return found


if __name__ == "__main__":
    kind, architecture = sys.argv[1:]
    print(json.dumps(compile_all(kind, int(architecture) if architecture.isdigit() else architecture)))
