"""Random batches, parts and masks for hypothesis."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import torch

shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5)


@st.composite
def values(draw, shape=None, *, offset=1e6):
    """Values of a random shape (N, C, *S), with standard deviation about 1 and channel means up to ``offset``."""
    shape = draw(shapes) if shape is None else shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mean = rng.uniform(-offset, offset, (1, shape[1], *(1 for _ in shape[2:])))
    return torch.from_numpy(mean + rng.standard_normal(shape))


@st.composite
def cuts(draw, size, most=5):
    """How ``size`` samples are cut into parts, empty ones among them: where each part begins and ends."""
    inner = sorted(draw(st.lists(st.integers(0, size), max_size=most)))
    edges = [0, *inner, size]
    return list(itertools.pairwise(edges))


@st.composite
def masks(draw, shape):
    """A boolean mask of one of the legal shapes for a batch of ``shape``."""
    without_channels = (shape[0], *shape[2:])
    broadcast = tuple(draw(st.sampled_from(sorted({1, size}))) for size in shape)
    legal = draw(st.sampled_from([(shape[0],), without_channels, shape, broadcast]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(rng.random(legal) < draw(st.sampled_from([0.1, 0.5, 0.9])))


def full_mask(mask, shape):
    """The mask in the shape of the batch, by the definition of what its shape means."""
    if mask.shape == (shape[0],) and len(shape) != 1:
        mask = mask.reshape(-1, *(1 for _ in shape[1:]))
    elif mask.shape == (shape[0], *shape[2:]):
        mask = mask.unsqueeze(1)
    return mask.expand(shape)
