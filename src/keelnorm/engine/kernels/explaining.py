"""Explain which kernels run for a tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias, get_args

import torch

from keelnorm.engine.error_messages import describe, is_count
from keelnorm.engine.kernels import registry, triton

Layout: TypeAlias = Literal["contiguous", "channels_last"]
LAYOUTS = get_args(Layout)
_ASSUMED = 132
"""Multiprocessors of an H100, assumed where there is no GPU."""


@dataclass(frozen=True)
class Explanation:
    """The kernels that run for a shape, dtype and layout.

    Args:
        kernels: The name of the kernels, as :func:`keelnorm.engine.kernels.registry.available` has it.
        why: The reason.
        details: On a GPU, how forward and backward run, a line each.
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
    """Explain which kernels a batch normalization in training runs on, and how.

    Args:
        shape: Of x, (N, C, *S).
        dtype: Of x.
        layout: Of x: "contiguous" or "channels_last".
        device: Default: the GPU where torch finds one, else the CPU. Without a GPU to ask, one of 132
            multiprocessors is assumed.

    Raises:
        ValueError: There is no such layout, or the shape has fewer than two dimensions or a negative one.

    Example:
        >>> print(explain((8, 64, 7, 7), torch.bfloat16, "channels_last", device="cuda").details[0].split(",")[0])
        forward: on chip
    """
    if layout not in LAYOUTS:
        raise ValueError(f"explain: layout must be one of {LAYOUTS}; got {describe(layout)}")
    given, shape = shape, tuple(shape) if isinstance(shape, Sequence) else ()
    if len(shape) < 2 or not all(is_count(size, 0) for size in shape):
        raise ValueError(f"explain: shape must be (N, C, *S), two sizes or more from 0 on; got {describe(given)}")
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
    from keelnorm.engine.kernels.triton import availability  # a light import: not needed until here
    from keelnorm.engine.kernels.triton.tiling import View

    view = View.of(shape, layout == "channels_last")
    processors = _ASSUMED
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    chosen = availability.by_rule(view, dtype.itemsize, processors)
    return Explanation(name, why, tuple(availability.in_words(view, chosen)))


def autotune(enabled: bool = True) -> None:
    """Time tile sizes at the first use of each shape on a GPU, and use the fastest.

    The first forward of a shape then takes some milliseconds more, and memory for two more tensors like x. Results are
    kept for the next process, in the folder that ``KEELNORM_CACHE`` names, by default ``~/.cache/keelnorm``. Nothing is
    timed while a CUDA graph is captured. The environment variable ``KEELNORM_AUTOTUNE=1`` turns timing on, too.

    Args:
        enabled: False turns timing off.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"autotune: enabled is True or False; got {describe(enabled)}")
    if triton.missing() is not None:
        raise RuntimeError(f"autotune: there are no kernels to time: {triton.missing()}")
    from keelnorm.engine.kernels.triton import tuning

    tuning.autotune(enabled)
