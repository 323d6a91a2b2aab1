"""Inverse square roots of symmetric positive definite matrices (..., D, D), differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def newton(matrix: Tensor, iterations: int) -> Tensor:
    """Approximate Σ^(−1/2) by Newton's iteration, which only multiplies matrices.

    P₀ = I, Pₖ = (3·Pₖ₋₁ − Pₖ₋₁³·Σ/tr Σ) / 2, and the result is P_T / √tr Σ. Convergence is quadratic once it starts;
    for an eigenvalue that is the share s of the trace, starting takes about log(1/√s) / log 1.5 iterations.

    Numerics:
        Pₖ³·Σ is computed as Pₖ·(Pₖ·Σ)·Pₖ, where Pₖ·Σ is updated along with Pₖ (the coupled iteration). In exact
        arithmetic that is the same; but iterated beyond convergence, the form above amplifies rounding errors.

    Source:
        Huang et al. (2019), arXiv:1904.03441, algorithm 1. Higham (2008), "Functions of Matrices", chapter 6, on the
        stability of coupled iterations.
    """
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    root, inverse = matrix / trace, identity.expand_as(matrix)
    for _ in range(iterations):
        factor = 1.5 * identity - 0.5 * (inverse @ root)
        root, inverse = root @ factor, factor @ inverse
    return inverse * trace.rsqrt()


def zca(matrix: Tensor, least: float) -> Tensor:
    """Compute Σ^(−1/2) = U·Λ^(−1/2)·Uᵀ by eigendecomposition. A matrix that is not finite gives NaN without an error.

    Args:
        matrix: Σ, shape (..., D, D).
        least: A lower bound of the eigenvalues; those that rounding has made smaller are raised to it.

    Numerics:
        The derivative of an eigendecomposition divides by differences of eigenvalues. So the decomposition is taken as
        a constant, and Newton steps on W·Σ·W = I from there make the result depend on Σ:
        W ← W − U·[Uᵀ(W·Σ·W − I)U / (√λᵢ + √λⱼ)]·Uᵀ. They change the value by rounding only, and step k makes the
        derivative of order k exact, for equal eigenvalues too. There are two steps; third derivatives are wrong.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
    matrix = torch.where(finite, matrix, identity)
    values, vectors = torch.linalg.eigh(matrix.detach())
    raised = values.clamp(min=max(least, torch.finfo(values.dtype).tiny))
    matrix = matrix + (vectors * (raised - values).unsqueeze(-2)) @ vectors.mT
    root = raised.sqrt()
    sums = root.unsqueeze(-1) + root.unsqueeze(-2)
    inverse = (vectors / root.unsqueeze(-2)) @ vectors.mT
    for _ in range(2):
        residual = inverse @ matrix @ inverse - identity
        inverse = inverse - vectors @ ((vectors.mT @ residual @ vectors) / sums) @ vectors.mT
    return torch.where(finite, inverse, torch.nan)
