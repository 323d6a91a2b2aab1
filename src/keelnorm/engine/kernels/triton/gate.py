"""g, the gradient in front of the activation, and the gradients that are written value by value."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.elementwise import gradient


@triton.jit
def gated(
    dy, x_value, centre, scale, shift, y, residual, offsets, counts, a, b,
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """g = dy·act′(v), 0 where nothing counts; v from y, which will do for ReLU, or from x and the residual."""
    g = tl.load(dy + offsets, mask=counts, other=0.0).to(tl.float32)
    if ACT != 0:
        if HAS_Y:
            v = tl.load(y + offsets, mask=counts, other=0.0).to(tl.float32)
        else:
            v = (x_value - centre) * scale + shift
            if HAS_RESIDUAL:
                v += tl.load(residual + offsets, mask=counts, other=0.0).to(tl.float32)
        g = tl.where(counts, gradient(g, v, a, b, ACT), 0.0)
    return g


@triton.jit
def store_gradient(dx, out, dy, offsets, inside, counts, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Write dx; where the mask lets nothing count it is 0, or with KEEP, where y is x, dy."""
    if MASKED:
        left = tl.zeros_like(out)
        if KEEP:
            left = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        out = tl.where(counts, out, left)
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=inside)
