"""A batch normalization's node in autograd's graph, in C++: the interpreter's cost is most of a small tensor's.

The module of C++ fits one torch and one Python, and is optional: what it does not take runs in Python, with the same
kernels and the same results. ``KEELNORM_NODE=0`` leaves it out.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from keelnorm.engine.kernels import cpu

ENVIRONMENT_VARIABLE = "KEELNORM_NODE"
_REASON = Path(__file__).with_name("no_autograd_node.txt")
_NAME = f"{cpu.__name__}.native_node"  # as PyInit_native_node in C++
_module: Any = None

#: Takes a call as the layers have it: x, residual, weight, bias, running mean and variance, num_batches_tracked, the
#: update counts, the legal ranks, training, update, momentum, eps, and a row of activations. Returns y, or
#: NotImplemented where Python has to look at the call; nothing was written then. None where the module is missing.
run: Callable[..., Any] | None = None


def file_name(torch_version: str) -> str:
    """Return the name of the file that fits a torch and the Python that runs."""
    return f"autograd_node-torch-{torch_version}{EXTENSION_SUFFIXES[0]}"


def missing() -> str | None:
    """Return why the node in C++ does not run; None if it does."""
    return _missing


def connect(backward: Callable[..., Any]) -> None:
    """Let the node call a function for gradients that one operator does not compute."""
    if _module is not None:
        _module.connect(backward)


def _load() -> str | None:
    global _module, run
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0":
        return f"{ENVIRONMENT_VARIABLE}=0 leaves it out"
    lacking = cpu.load()
    if lacking is not None:
        return f"the native CPU library is missing: {lacking}"
    path = Path(__file__).with_name(file_name(torch.__version__))
    if not path.exists():
        built = sorted(each.name for each in path.parent.glob("autograd_node-torch-*"))
        detail = _REASON.read_text().strip() if _REASON.exists() else f"there is {', '.join(built) or 'none'}"
        return f"none was built for torch {torch.__version__} and this Python ({detail})"
    loader = ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    try:
        _module = importlib.util.module_from_spec(spec)
        loader.exec_module(_module)
    except ImportError as error:
        _module = None
        return f"it does not load into this torch: {error}"
    run = _module.run
    return None


_missing = _load()
