"""The activations, their derivatives and inverses in Triton, by the names of keelnorm/engine/activations.py.

exp(v) − 1, log(1 + t) and tanh are rearranged so that small results keep their digits: a GPU's instructions bound the
absolute error only.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Constants of the formulas; Triton reads only globals of this type.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1/√(2π)
_GELU_K, _GELU_C = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)  # √(2/π)


@triton.jit
def sigmoid(v):
    """1/(1 + exp(−v)) without an overflow."""
    t = tl.exp(-tl.abs(v))
    return tl.where(v >= 0, 1.0, t) / (1.0 + t)


@triton.jit
def tanh(v):
    """Compute the hyperbolic tangent, near 0 by a polynomial: 1 − exp(−2|v|) loses digits there."""
    t = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(v < 0, -far, far)
    w = v * v
    near = v * (1.0 + w * (-1 / 3 + w * (2 / 15 + w * (-17 / 315 + w * (62 / 2835 - w * (1382 / 155925))))))
    return tl.where(w < 0.09, near, far)


@triton.jit
def expm1(v):
    """exp(v) − 1 for v ≤ 0, by Kahan's quotient: the rounding of exp(v) cancels."""
    u = tl.exp(v)
    log_u = tl.log(u)
    return tl.where(u == 1.0, v, tl.where(u < 0.5, u - 1.0, (u - 1.0) * v / tl.where(u == 1.0, 1.0, log_u)))


@triton.jit
def log1p(t):
    """log(1 + t) for 0 ≤ t ≤ 1, by the same quotient."""
    u = 1.0 + t
    return tl.where(u == 1.0, t, tl.log(u) * t / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def softplus(v):
    """log(1 + exp(v)) without an overflow."""
    return tl.where(v > 0, v, 0.0) + log1p(tl.exp(-tl.abs(v)))


@triton.jit
def activate(v, a, b, ACT: tl.constexpr):
    """Compute act(v) of the activation named ACT; NaN stays NaN."""
    if ACT == "none":
        y = v
    elif ACT == "relu":
        y = tl.where(v <= 0, 0.0, v)
    elif ACT == "relu6":
        y = tl.where(v <= 0, 0.0, tl.where(v >= 6, 6.0, v))
    elif ACT == "leaky_relu":
        y = tl.where(v > 0, v, v * a)
    elif ACT == "elu":
        y = tl.where(v > 0, v, a * expm1(tl.where(v > 0, 0.0, v)))
    elif ACT == "silu":
        y = v * sigmoid(v)
    elif ACT == "gelu":
        y = v * (0.5 * (1.0 + tl.erf(v * _SQRT_HALF)))
    elif ACT == "gelu_tanh":
        y = 0.5 * v * (1.0 + tanh((v + v * v * v * _GELU_C) * _GELU_K))
    elif ACT == "hardswish":
        y = tl.where(v <= -3, 0.0, tl.where(v >= 3, v, v * (v + 3.0) / 6.0))
    elif ACT == "hardsigmoid":
        y = tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, (v + 3.0) / 6.0))
    elif ACT == "sigmoid":
        y = sigmoid(v)
    elif ACT == "tanh":
        y = tanh(v)
    elif ACT == "mish":
        y = v * tanh(softplus(v))
    elif ACT == "softplus":
        y = tl.where(v * a > b, v, softplus(v * a) / a)
    else:
        tl.static_assert(False, "activate() in kernels/triton/elementwise.py lacks this activation")
    return y


@triton.jit
def gradient(g, v, a, b, ACT: tl.constexpr):
    """Compute g·act′(v) of the activation named ACT."""
    if ACT == "none":
        r = g
    elif ACT == "relu":
        r = tl.where(v <= 0, 0.0, g)
    elif ACT == "relu6":
        r = tl.where((v <= 0) | (v >= 6), 0.0, g)
    elif ACT == "leaky_relu":
        r = tl.where(v > 0, g, g * a)
    elif ACT == "elu":
        r = tl.where(v > 0, g, g * (a * tl.exp(tl.where(v > 0, 0.0, v))))
    elif ACT == "silu":
        s = sigmoid(v)
        r = g * (s * (1.0 + v * (1.0 - s)))
    elif ACT == "gelu":
        r = g * (0.5 * (1.0 + tl.erf(v * _SQRT_HALF)) + v * tl.exp(-0.5 * v * v) * _DENSITY)
    elif ACT == "gelu_tanh":
        w = tl.where(v > 30, 30.0, tl.where(v < -30, -30.0, v))
        t = tanh((w + w * w * w * _GELU_C) * _GELU_K)
        r = g * (0.5 * (1.0 + t) + 0.5 * w * (1.0 - t * t) * ((1.0 + 3.0 * (w * w * _GELU_C)) * _GELU_K))
    elif ACT == "hardswish":
        r = tl.where(v <= -3, 0.0, tl.where(v < 3, g * (v / 3.0 + 0.5), g))
    elif ACT == "hardsigmoid":
        r = tl.where((v > -3) & (v < 3), g * (1 / 6), 0.0)
    elif ACT == "sigmoid":
        s = sigmoid(v)
        r = g * (s * (1.0 - s))
    elif ACT == "tanh":
        t = tanh(v)
        r = g * (1.0 - t * t)
    elif ACT == "mish":
        t = tanh(softplus(v))
        r = g * (t + v * sigmoid(v) * (1.0 - t * t))
    elif ACT == "softplus":
        r = tl.where(v * a > b, g, g * sigmoid(v * a))
    else:
        tl.static_assert(False, "gradient() in kernels/triton/elementwise.py lacks this activation")
    return r


@triton.jit
def inverse(y, a, ACT: tl.constexpr):
    """Find v from y = act(v), in float64, of the activation named ACT."""
    if ACT == "none":
        v = y
    elif ACT == "leaky_relu":
        v = tl.where(y > 0, y, y / a)
    elif ACT == "elu":
        t = tl.where(y > 0, 0.0, y / a)
        u = 1.0 + t  # log(1 + t), by Kahan's quotient
        near = tl.log(u) * t / tl.where(u == 1.0, 1.0, u - 1.0)
        v = tl.where(y > 0, y, tl.where(u == 1.0, t, near))
    else:
        tl.static_assert(False, "inverse() in kernels/triton/elementwise.py lacks this activation")
    return v
