"""x = mean + (act⁻¹(y) − bias)/(weight·rstd), value by value: none, leaky_relu and elu."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.tile import lay


@triton.jit
def invert_kernel(
    y, x, saved, weight, bias, N, C, S, a,
    A: tl.constexpr, B: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One tile, in float64: a scale near 0 leaves few digits to lose.

    x was finite where y is: what y's rounding adds to the LARGEST values must not turn them into infinity.
    """
    offsets, _, inside, channels = lay(N, C, S, A, B, LAST, WIDE)
    exists = channels < C
    mean = tl.load(saved + channels, mask=exists, other=0.0)
    scale = tl.load(saved + 2 * C + channels, mask=exists, other=1.0)
    if HAS_WEIGHT:
        scale = scale * tl.load(weight + channels, mask=exists, other=1.0).to(tl.float64)
    v = tl.load(y + offsets, mask=inside, other=0.0).to(tl.float64)
    if ACT == 3:
        v = tl.where(v > 0, v, v / a)
    elif ACT == 4:
        t = tl.where(v > 0, 0.0, v / a)
        u = 1.0 + t  # log(1 + t), by Kahan's quotient
        near = tl.log(u) * t / tl.where(u == 1.0, 1.0, u - 1.0)
        v = tl.where(v > 0, v, tl.where(u == 1.0, t, near))
    if HAS_BIAS:
        v = v - tl.load(bias + channels, mask=exists, other=0.0).to(tl.float64)
    v = mean + v / scale
    v = tl.where(v > LARGEST, LARGEST, tl.where(v < -LARGEST, -LARGEST, v))  # NaN stays
    tl.store(x + offsets, v.to(x.dtype.element_ty), mask=inside)
