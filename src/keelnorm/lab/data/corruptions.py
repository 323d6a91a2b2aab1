"""Corruptions of images in [0, 1], each with severities from 1 to 5, after the idea of Hendrycks and Dietterich (2019).

All take images (n, C, H, W) of any size, a severity s and a generator, and return images in [0, 1]. Lengths are shares
of the image's width, so that a severity means the same at 8 and at 28 pixels.

Source: Hendrycks, Dietterich (2019), "Benchmarking neural network robustness to common corruptions and perturbations",
arXiv:1903.12261. The formulas here are simpler ones of our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]
SEVERITIES = (1, 2, 3, 4, 5)


def noise(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Add noise: x + 0.1·s·N(0, 1)."""
    return x + 0.1 * severity * torch.randn(x.shape, generator=draw)


def blur(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Blur by a Gaussian of standard deviation 0.03·s of the side, each weight its integral over a pixel."""
    deviation = 0.03 * severity * x.shape[-1]
    reach = math.ceil(3 * deviation)
    edges = torch.arange(-reach - 0.5, reach + 1, dtype=x.dtype)
    kernel = torch.special.ndtr(edges / deviation).diff()
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.unsqueeze(2), groups=x.shape[1])
    return F.conv2d(rows, kernel.unsqueeze(3), groups=x.shape[1])


def contrast(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Lower the contrast: m + (1 − 0.17·s)·(x − m), m the image's mean."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1 - 0.17 * severity) * (x - mean)


def brightness(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Brighten: v + (1 − v)·x with v = 0.12·s. Black turns grey, and white stays."""
    veil = 0.12 * severity
    return veil + (1 - veil) * x


def shift(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Move by 0.04·s of the side in a random direction."""
    angle = 2 * math.pi * torch.rand(len(x), generator=draw)
    by = 2 * 0.04 * severity  # the grid's coordinates run from -1 to 1
    return _mapped(x, torch.ones(len(x)), torch.zeros(len(x)), by * angle.cos(), by * angle.sin())


def rotation(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Turn by 10·s degrees, one way or the other."""
    return _mapped(x, torch.ones(len(x)), math.radians(10 * severity) * _sign(len(x), draw))


def scale(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Shrink or enlarge by the factor 1 + 0.12·s."""
    return _mapped(x, (1 + 0.12 * severity) ** _sign(len(x), draw), torch.zeros(len(x)))


def occlusion(x: Tensor, severity: int, draw: torch.Generator) -> Tensor:
    """Cover with a grey square of 0.1·s + 0.1 of the side at a random place."""
    side = max(1, round((0.1 + 0.1 * severity) * x.shape[-1]))
    tops, lefts = (torch.randint(0, size - side + 1, (len(x),), generator=draw) for size in x.shape[-2:])
    rows, columns = (torch.arange(size) for size in x.shape[-2:])
    inside_rows = (rows >= tops[:, None]) & (rows < tops[:, None] + side)
    inside_columns = (columns >= lefts[:, None]) & (columns < lefts[:, None] + side)
    return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.5)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "shift": shift,
    "rotation": rotation,
    "scale": scale,
    "occlusion": occlusion,
}


def corrupted(x: Tensor, name: str, severity: int, draw: torch.Generator) -> Tensor:
    """The images with a corruption; severity 0 leaves them as they are.

    Raises:
        KeyError, ValueError: no such corruption or severity; says which there are.
    """
    if name not in CORRUPTIONS:
        raise KeyError(f"no corruption is named {name!r}; there are {', '.join(CORRUPTIONS)}")
    if severity not in (0, *SEVERITIES):
        raise ValueError(f"severities are 0 to {SEVERITIES[-1]}; got {severity!r}")
    return CORRUPTIONS[name](x, severity, draw).clamp(0, 1) if severity else x


def _sign(count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=draw) * 2.0 - 1.0


def _mapped(
    x: Tensor, factor: Tensor, angle: Tensor, right: Tensor | None = None, down: Tensor | None = None
) -> Tensor:
    """Each image grown by its factor, turned by its angle and moved; what comes in from outside is black."""
    zero = torch.zeros(len(x))
    right, down = (zero if each is None else each for each in (right, down))
    cos, sin = angle.cos() / factor, angle.sin() / factor
    tall = x.shape[2] / x.shape[3]  # both axes of the grid run from -1 to 1, however long the sides are
    rows = torch.stack([torch.stack([cos, -sin * tall, -right], 1), torch.stack([sin / tall, cos, -down], 1)], 1)
    grid = F.affine_grid(rows.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
