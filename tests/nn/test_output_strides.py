"""Results and gradients have the strides of torch's, whatever the strides of the input.

The stride of a dimension of one value, and those of a tensor without values, address nothing and may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import keelnorm as kn

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = {
    "2d": (4, 3),
    "2d, one channel": (4, 1),
    "3d": (4, 3, 5),
    "3d, one position": (4, 3, 1),
    "3d, one channel": (4, 1, 5),
    "3d, one sample": (1, 3, 5),
    "4d": (4, 3, 5, 6),
    "4d, one position": (4, 3, 1, 1),
    "4d, one channel": (4, 1, 5, 6),
    "4d, one sample": (1, 3, 5, 6),
    "4d, one column": (4, 3, 5, 1),
    "5d": (2, 3, 4, 5, 6),
    "5d, one position": (2, 3, 1, 1, 1),
    "6d": (2, 3, 2, 2, 3, 2),
}


def views(shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """x of a shape, in every order of memory and with gaps and repetitions in every dimension."""
    generator = torch.Generator().manual_seed(0)

    def given(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    rank = len(shape)
    yield "contiguous", given(*shape)
    yield "channels innermost", given(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    yield "reversed", given(*shape[::-1]).permute(*range(rank - 1, -1, -1))
    yield "channels first", given(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    if rank > 3:
        yield "planes transposed", given(*shape[:-2], shape[-1], shape[-2]).mT
    for dim in range(rank):
        sizes = [size * (2 if d == dim else 1) for d, size in enumerate(shape)]
        gaps = (*[slice(None)] * dim, slice(None, None, 2))
        yield f"gaps in {dim}", given(*sizes)[gaps]
        inner = given(sizes[0], *sizes[2:], sizes[1]).movedim(-1, 1)
        yield f"channels innermost, gaps in {dim}", inner[gaps]
        yield f"repeated in {dim}", given(*[1 if d == dim else size for d, size in enumerate(shape)]).expand(shape)
        repeated = given(*[1 if d == dim else size for d, size in enumerate(shape)])
        if rank in LAST:
            yield f"channels last, repeated in {dim}", repeated.contiguous(memory_format=LAST[rank]).expand(shape)


def addressing(values: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(values.stride(), values.shape, strict=True) if size != 1)


def results(function: object, x: Tensor, training: bool, **keywords: object) -> tuple[Tensor, Tensor]:
    """y and the gradient of x."""
    channels, leaf = x.shape[1], x.detach().requires_grad_()
    weight = torch.ones(channels)
    y = function(leaf, torch.zeros(channels), weight.clone(), weight, weight, training, **keywords)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y, dx


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_strides_are_torchs(shape: tuple[int, ...], training: bool, backend: str) -> None:
    for name, x in views(shape):
        expected = [addressing(values) for values in results(F.batch_norm, x, training)]
        for keywords in ({}, {"mask": torch.ones(len(x), dtype=torch.bool)}):
            y, dx = results(kn.functional.batch_norm, x, training, **keywords)
            assert [addressing(y), addressing(dx)] == expected, (name, x.stride(), keywords)
        assert torch.equal(y.detach().reshape(len(x), -1), y.detach().contiguous().view(len(x), -1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [SHAPES[name] for name in ("2d", "3d", "4d", "5d")], ids=str)
def test_forward_mode(shape: tuple[int, ...], training: bool) -> None:
    for name, x in views(shape):
        if "repeated" in name:  # torch makes no dual of those
            continue
        expected = addressing(results(F.batch_norm, x, training)[0])
        with forward_ad.dual_level():
            moments = torch.zeros(shape[1]), torch.ones(shape[1])
            y = kn.functional.batch_norm(forward_ad.make_dual(x, torch.ones_like(x)), *moments, training=training)
            primal, tangent = forward_ad.unpack_dual(y)
            assert addressing(primal) == expected, (name, x.stride())
            assert tangent.shape == primal.shape


#: Variants whose calls need nothing but x.
PLAIN = (
    kn.SyncBatchNorm,
    kn.L1BatchNorm,
    kn.RangeBatchNorm,
    kn.BatchRenorm,
    lambda channels: kn.CrossIterationBatchNorm(channels, compensate=False),
    kn.MovingAverageBatchNorm,
    kn.WhiteningBatchNorm,
    kn.SplitBatchNorm,
    lambda channels: kn.GhostBatchNorm(channels, 2),
    lambda channels: kn.DomainBatchNorm(channels, 1),
    lambda channels: kn.BatchNorm(channels),
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make(2).__class__.__name__)
def test_variants(make: object, training: bool, backend: str) -> None:
    for shape in (SHAPES["2d"], SHAPES["3d"], SHAPES["4d"]):
        for name, x in views(shape):
            expected = addressing(results(F.batch_norm, x, training)[0])
            layer = make(shape[1]).train(training)
            keywords = {"domain": 0} if isinstance(layer, kn.DomainBatchNorm) else {}
            for activation in (None, "relu"):
                y = layer(x, activation=activation, **keywords)
                assert addressing(y) == expected, (name, x.stride(), activation)


def test_a_transposed_sequence_can_be_viewed(backend: str) -> None:
    """What a transformer does: (N, L, C) there and back."""
    x = torch.randn(4, 5, 3).transpose(1, 2)
    assert kn.BatchNorm1d(3)(x).view(4, -1).shape == (4, 15)
