"""The activation at both ends: y, g (the gradient before the activation) and dx, value by value."""

from __future__ import annotations

import triton
import triton.language as tl

from keelnorm.engine.kernels.triton.elementwise import activate, gradient


@triton.jit
def store_y(
    y, v, given, offsets, inside, counts, a, b, ACT: tl.constexpr, MASKED: tl.constexpr, KEEP: tl.constexpr
):  # fmt: skip
    """Write y = act(v); for masked values 0, or x with KEEP."""
    out = activate(v, a, b, ACT).to(y.dtype.element_ty)
    if MASKED:
        left = given.to(y.dtype.element_ty) if KEEP else tl.zeros_like(out)
        out = tl.where(counts, out, left)
    tl.store(y + offsets, out, mask=inside)


@triton.jit
def gradient_before(
    dy, x_value, center, scale, shift, y, residual, offsets, counts, a, b,
    ACT: tl.constexpr, HAS_Y: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Compute g = dy·act′(v), 0 for masked values; v is y (ReLU needs no more), or found from x and the residual."""
    g = tl.load(dy + offsets, mask=counts, other=0.0).to(tl.float32)
    if ACT != "none":
        if HAS_Y:
            v = tl.load(y + offsets, mask=counts, other=0.0).to(tl.float32)
        else:
            v = (x_value - center) * scale + shift
            if HAS_RESIDUAL:
                v += tl.load(residual + offsets, mask=counts, other=0.0).to(tl.float32)
        g = tl.where(counts, gradient(g, v, a, b, ACT), 0.0)
    return g


@triton.jit
def store_dx(dx, out, dy, offsets, inside, counts, MASKED: tl.constexpr, KEEP: tl.constexpr):
    """Write dx; for masked values 0, or dy with KEEP, where y is x."""
    if MASKED:
        left = tl.zeros_like(out)
        if KEEP:
            left = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        out = tl.where(counts, out, left)
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=inside)
