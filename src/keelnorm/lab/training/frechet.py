"""The Fréchet distance between two sets of features, each taken as normally distributed."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m₁ − m₂|² + trace(C₁ + C₂ − 2·(C₁C₂)^½), m and C the mean and covariance of each set (Dowson and Landau 1982).

    C₁C₂ is similar to the symmetric C₁^½·C₂·C₁^½, whose eigenvalues are real and at least 0: the trace of its root is
    the sum of theirs. In float64; covariances are those of the samples (n − 1).

    Args:
        first: (n, features); at least two rows.
        second: the same for the other set.
    """
    (m1, c1), (m2, c2) = (_moments(each.double()) for each in (first, second))
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    distance: float = ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()
    return max(0.0, distance)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"a Fréchet distance takes features (n, features) with n >= 2; got {tuple(x.shape)}")
    return x.mean(dim=0), torch.cov(x.t()).view(x.shape[1], x.shape[1])
