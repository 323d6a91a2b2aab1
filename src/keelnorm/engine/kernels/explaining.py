"""What would run for a tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias, get_args

import torch

from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.kernels import triton

Layout: TypeAlias = Literal["contiguous", "channels_last"]
LAYOUTS = get_args(Layout)
_ASSUMED = 132
"""Multiprocessors where no GPU is there to ask: an H100's."""


@dataclass(frozen=True)
class Explanation:
    """What runs for tensors of one kind.

    Args:
        kernels: The name of the kernels, as :func:`keelnorm.engine.kernels.registry.available` has it.
        why: Why these.
        details: On a GPU, how forward and backward go, a line each.
    """

    kernels: str
    why: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.kernels}: {self.why}", *self.details])


def explain(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    layout: Layout = "contiguous",
    device: torch.device | str | None = None,
) -> Explanation:
    """Which kernels a batch normalization of such a tensor in training runs on, and how.

    Args:
        shape: (N, C, *S).
        dtype: Of the values.
        layout: "contiguous" or "channels_last".
        device: Default: the GPU where torch finds one, else the CPU. A GPU that is not there is taken to have 132
            multiprocessors.

    Raises:
        ValueError: there is no such layout, or the shape has fewer than two dimensions or a negative one.

    Example:
        >>> print(explain((8, 64, 7, 7), torch.bfloat16, "channels_last", device="cuda").details[0].split(",")[0])
        forward: on chip
    """
    if layout not in LAYOUTS:
        raise ValueError(f"explain: layout must be one of {LAYOUTS}; got {describe(layout)}")
    given, shape = shape, tuple(shape) if isinstance(shape, Sequence) else ()
    if len(shape) < 2 or not all(is_count(size, 0) for size in shape):
        raise ValueError(f"explain: shape must be (N, C, *S), two sizes or more from 0 on; got {describe(given)}")
    from keelnorm.engine.kernels import registry

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, why = registry.active(device), registry.chosen_by(device)
    legal = triton.DTYPES if name == "triton" else registry.DTYPES
    if name != "reference" and prod(shape) == 0:
        return Explanation("reference", "it has no values")
    if name != "reference" and dtype not in legal:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in legal))
        return Explanation("reference", f"{name} takes {names}, not {str(dtype).removeprefix('torch.')}")
    if name != "triton":
        return Explanation(name, why)
    from keelnorm.engine.kernels.triton import availability  # whoever only imports the package needs no rules for GPUs
    from keelnorm.engine.kernels.triton.tiling import View

    view = View.of(shape, layout == "channels_last")
    processors = _ASSUMED
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    chosen = availability.by_rule(view, dtype.itemsize, processors)
    return Explanation(name, why, tuple(availability.in_words(view, chosen)))


def autotune(enabled: bool = True) -> None:
    """Time tile sizes at the first use of each shape on a GPU and keep what was fastest, or (False) stop doing so.

    The first forward of a shape then takes some milliseconds more, and memory for two more tensors like x. Results are
    kept for the next process, in the folder that ``KEELNORM_CACHE`` names, by default ``~/.cache/keelnorm``; while a
    CUDA graph is captured nothing is timed. ``KEELNORM_AUTOTUNE=1`` does the same from the outside.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"autotune: enabled is True or False; got {describe(enabled)}")
    if triton.missing() is not None:
        raise RuntimeError(f"autotune: it times Triton's kernels, and {triton.missing()}")
    from keelnorm.engine.kernels.triton import tuning

    tuning.autotune(enabled)
