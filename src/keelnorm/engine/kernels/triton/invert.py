"""The kernel that rebuilds x from y: x = mean + (act⁻¹(y) − bias)/(weight·rstd), value by value."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.elementwise import inverse
from keelnorm.engine.kernels.triton.tile import memory_tile


@triton.jit
def invert_kernel(
    y, x, saved, weight, bias, N, C, S, a,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write one tile of x, computed in float64, since a scale near 0 amplifies rounding.

    x was finite where y is: y's rounding error must not turn the LARGEST values into infinity.
    """
    offsets, _, inside, channels = memory_tile(N, C, S, A, B, LAST, WIDE)
    exists = channels < C
    mean = tl.load(saved + channels, mask=exists, other=0.0)
    scale = tl.load(saved + 2 * C + channels, mask=exists, other=1.0)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight + channels, mask=exists, other=1.0).to(tl.float64)
    v = inverse(tl.load(y + offsets, mask=inside, other=0.0).to(tl.float64), a, ACT)
    if HAS_BIAS:
        v = v - tl.load(bias + channels, mask=exists, other=0.0).to(tl.float64)
    v = mean + v / scale
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # NaN stays
    tl.store(x + offsets, v.to(x.dtype.element_ty), mask=inside)
