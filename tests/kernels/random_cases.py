"""Random calls of batch normalization: shape, dtypes, strides, activation, residual, mask, weights and so on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from support.activations import MODULES
from support.cases import laid_out
from support.unaligned import unaligned
from torch import Tensor, nn

import keelnorm as kn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
#: Those that have an inverse; None among them.
INVERTIBLE = (None, *(act for act in MODULES if isinstance(act, nn.LeakyReLU | nn.ELU)))
DENSE = ("contiguous", "channels_last", "unaligned", "unaligned channels_last")
LAYOUTS = (*DENSE, "sliced", "transposed", "expanded")


@dataclass(frozen=True)
class Case:
    """The arguments of a call of batch normalization, and how its tensors are drawn."""

    seed: int
    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    vectors: torch.dtype  # of parameters and running statistics
    layouts: tuple[str, str, str]  # of x, dy and the residual
    activation: nn.Module | None
    training: bool
    inplace: bool
    weight: bool
    bias: bool
    running: bool
    residual: bool
    vector_layout: str
    mask: str | None  # None, "samples", "positions"
    sample_weight: bool
    padding: str
    momentum: float
    eps: float
    spread: float  # of x
    offset: float  # mean of x in standard deviations


def draw(seed: int) -> Case:
    """The same case for the same seed, on machines that have the same kernels."""
    rng = random.Random(seed)
    shape = _shape(rng)
    dtype = rng.choice(DTYPES)
    several = math.prod(shape) // shape[1] > 1
    training = several and rng.random() < 0.7
    masks = several and rng.random() < 0.3
    weighs = several and rng.random() < 0.15
    inplace = not masks and not weighs and rng.random() < 0.3
    kernels = [kernel.name for kernel in kn.kernels.available() if kernel.usable and kernel.name != "triton"]
    return Case(
        seed=seed,
        kernel=rng.choice([*kernels, "auto"]),
        shape=shape,
        dtype=dtype,
        vectors=torch.float64 if dtype == torch.float64 else rng.choice([torch.float32, torch.float32, dtype]),
        layouts=(rng.choice(DENSE if inplace else LAYOUTS[:-1]), rng.choice(LAYOUTS), rng.choice(LAYOUTS)),
        activation=rng.choice(INVERTIBLE if inplace else (None, nn.ReLU(), nn.ReLU(), *MODULES)),
        training=training,
        inplace=inplace,
        weight=rng.random() < 0.8,
        bias=rng.random() < 0.8,
        running=not training or rng.random() < 0.7,
        residual=not inplace and rng.random() < 0.4,
        vector_layout=rng.choice(["contiguous", "contiguous", "unaligned"]),
        mask=None if not masks else rng.choice(["samples", "positions"]) if shape[0] > 1 else "positions",
        sample_weight=weighs,
        padding=rng.choice(["zero", "keep"]) if masks else "zero",
        momentum=rng.choice([0.1, 0.1, 0.9, 1.0, 0.0]),
        eps=rng.choice([1e-5, 1e-5, 1e-3, 1.0]),
        spread=rng.choice([1.0, 1.0, 0.05, 30.0]),
        offset=rng.choice([0.0, 0.0, 1.0, 100.0]),
    )


def _shape(rng: random.Random) -> tuple[int, ...]:
    """Around vectors and tiles, long planes and rows; now and then enough for several tasks."""
    if rng.random() < 0.03:
        return rng.choice([(2, 3, 11000), (40, 1030), (3, 33, 31, 37), (1, 20, 4099), (6, 70, 9, 23)])
    channels = rng.choice([1, 2, rng.randint(1, 20), rng.randint(1, 20), rng.randint(60, 70), 131])
    while True:
        positions = [rng.choice([1, rng.randint(1, 9), rng.randint(1, 40)]) for _ in range(rng.randint(0, 3))]
        shape = (rng.choice([1, 2, rng.randint(1, 9), rng.randint(10, 40)]), channels, *positions)
        if math.prod(shape) <= 20000:
            return shape


@dataclass
class Tensors:
    """The tensors of a case. Masked values are NaN."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mask: Tensor | None
    sample_weight: Tensor | None


def tensors_of(case: Case) -> Tensors:
    """The same for the same case."""
    rng = torch.Generator().manual_seed(case.seed)
    shape, channels = case.shape, case.shape[1]
    per_channel = (1, channels, *[1] * (len(shape) - 2))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    mask = sample_weight = None
    where = (shape[0], *shape[2:])
    if case.mask:
        size = where[:1] if case.mask == "samples" else where
        truth = torch.rand(size, generator=rng) < 0.7
        truth.view(-1)[[0, -1]] = True
        bytes_ = torch.randint(1, 256, size, generator=rng, dtype=torch.uint8)  # any but 0 is True
        mask = torch.where(truth, bytes_, 0).view(torch.bool)
    if case.sample_weight:
        sample_weight = torch.randint(0, 4, where[:1] if mask is None and shape[0] > 1 else where, generator=rng)
        sample_weight = sample_weight.to(torch.float32)
        sample_weight.view(-1)[[0, -1]] = 2.0
    deviations = case.spread * torch.exp2(2 * torch.rand(per_channel, generator=rng, dtype=torch.float64) - 1)
    center = case.offset * normal(*per_channel).sign()
    x = deviations * (center + normal(*shape))
    dy, residual = normal(*shape), normal(*shape) if case.residual else None
    vectors = [normal(channels) for _ in range(3)]
    mean = (deviations * center).flatten() + deviations.flatten() * vectors[2]
    var = (deviations.flatten() * torch.exp2(2 * torch.rand(channels, generator=rng, dtype=torch.float64) - 1)).square()
    weight, bias = vectors[:2]
    given = [laid(t, layout, case.dtype) for t, layout in zip((x, dy), case.layouts, strict=False)]
    given.append(None if residual is None else laid(residual, case.layouts[2], case.dtype))
    if mask is not None:
        holes = ~in_shape_of(x, mask)
        given = [None if t is None else t.clone() if t.stride(0) == 0 else t for t in given]
        for t in given:
            if t is not None:
                t[holes] = torch.nan
    of_vectors = [laid(t, case.vector_layout, case.vectors) for t in (weight, bias, mean, var)]
    wanted = case.weight, case.bias, case.running, case.running
    chosen = (t if want else None for t, want in zip(of_vectors, wanted, strict=True))
    return Tensors(*[*given, *chosen, mask, sample_weight])


def laid(values: Tensor, layout: str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of the values in a dtype and layout; expanded, of the first sample's."""
    values = values.detach().to(dtype or values.dtype)
    if layout == "expanded":
        return values[:1].expand(values.shape)
    if layout.startswith("unaligned"):
        return unaligned(laid_out(values, "channels_last" if layout == "unaligned channels_last" else "contiguous"))
    return laid_out(values.clone(), layout).detach()


def in_shape_of(x: Tensor, mask: Tensor) -> Tensor:
    """A mask or weights, (N,) or (N, *S), in x's shape."""
    if mask.dim() == 1:
        return mask.view(-1, *[1] * (x.dim() - 1)).expand(x.shape)
    return mask.unsqueeze(1).expand(x.shape)
