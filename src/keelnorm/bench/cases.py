"""The cases that are measured: shapes, layouts, variants, modes, and the bytes each has to move."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

LAYOUTS = ("contiguous", "channels_last")
VARIANTS = ("bn", "bn_relu", "bn_add_relu")
MODES = ("forward", "backward", "both", "inference")
DTYPES = ("float32", "bfloat16")

#: How the gradient arrives: in the input's memory format, in the other format, or as one value per plane
#: expanded with strides of 0, as from global average pooling.
GRADIENTS = ("matching", "other", "expanded")

#: The allocator's setting: its default, which gives large tensors fresh pages, or `keelnorm.reuse_memory`.
#: Fresh is measured first, because reuse leaves a large heap behind.
PAGES = ("fresh", "reused")

#: ResNet-50 with 224x224 input and the stride in the 3x3 convolution: (C, H, W) of every distinct
#: batch norm, and how many of the network's 53 layers have it, by what follows the layer. `bn`
#: is on the projection shortcut, `bn_add_relu` closes a block, `bn_relu` is the rest.
RESNET50: dict[tuple[int, ...], dict[str, int]] = {
    (64, 112, 112): {"bn_relu": 1},
    (64, 56, 56): {"bn_relu": 6},
    (256, 56, 56): {"bn": 1, "bn_add_relu": 3},
    (128, 56, 56): {"bn_relu": 1},
    (128, 28, 28): {"bn_relu": 7},
    (512, 28, 28): {"bn": 1, "bn_add_relu": 4},
    (256, 28, 28): {"bn_relu": 1},
    (256, 14, 14): {"bn_relu": 11},
    (1024, 14, 14): {"bn": 1, "bn_add_relu": 6},
    (512, 14, 14): {"bn_relu": 1},
    (512, 7, 7): {"bn_relu": 5},
    (2048, 7, 7): {"bn": 1, "bn_add_relu": 3},
}

#: Small shapes (N, C, *S), where the cost of a call outweighs the cost of the data; the batch is part of them.
SMALL: tuple[tuple[int, ...], ...] = (
    (8, 16, 4, 4),
    (2, 64, 14, 14),
    (64, 128),
    (16, 32, 100),
)

#: `--quick`: a large, two middle and the small planes of ResNet-50, then the cost of a call.
QUICK_RESNET50 = ((64, 56, 56), (512, 28, 28), (256, 14, 14), (2048, 7, 7))
QUICK_SMALL = ((8, 16, 4, 4), (64, 128))


def variant_label(variant: str, gradient: str, dtype: str) -> str:
    """The variant, with the gradient's format and the dtype where they are not the usual ones."""
    return " ".join([variant, *(one for one in (gradient, dtype) if one not in ("matching", "float32"))])


@dataclass(frozen=True)
class Shape:
    """The dimensions (N, C, *S) of a batch and the suite they come from."""

    suite: str
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        """The dimensions as `NxCxHxW`."""
        return "x".join(map(str, self.dims))

    @property
    def samples(self) -> int:
        """M, the samples per channel."""
        return self.dims[0] * math.prod(self.dims[2:])

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts that differ for this rank: only four dimensions have a channels-last form."""
        return LAYOUTS if len(self.dims) == 4 else LAYOUTS[:1]

    @property
    def uses(self) -> dict[str, int]:
        """How many of the network's layers have this shape, by variant; empty outside a network."""
        return RESNET50.get(self.dims[1:], {}) if self.suite == "resnet50" else {}


@dataclass(frozen=True)
class Case:
    """One problem that every peer solves; its modes are timed in the same rounds."""

    shape: Shape
    layout: str
    variant: str
    gradient: str = "matching"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """A label for progress and messages."""
        return f"{self.shape.name} {self.layout} {variant_label(self.variant, self.gradient, self.dtype)}"

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that differ for this case: the gradient's format changes no forward."""
        return MODES if self.gradient == "matching" else ("backward", "both")

    @property
    def has_residual(self) -> bool:
        """Whether a second tensor is added before the activation."""
        return self.variant == "bn_add_relu"

    @property
    def activation(self) -> str | None:
        """The activation's name as keelnorm's layers take it."""
        return None if self.variant == "bn" else "relu"


def shapes(batch: int, *, quick: bool = False, contains: tuple[str, ...] = ()) -> list[Shape]:
    """The shapes to measure.

    Args:
        batch: N for the shapes of ResNet-50.
        quick: take the short list.
        contains: keep shapes whose `NxCxHxW` or suite contains one of these; all, if empty.
    """
    planes = QUICK_RESNET50 if quick else tuple(RESNET50)
    listed = [Shape("resnet50", (batch, *plane)) for plane in planes]
    listed += [Shape("small", dims) for dims in (QUICK_SMALL if quick else SMALL)]
    if not contains:
        return listed
    return [s for s in listed if any(part in s.name or part in s.suite for part in contains)]


def cases(
    listed: list[Shape],
    layouts: tuple[str, ...] = LAYOUTS,
    variants: tuple[str, ...] = VARIANTS,
    gradients: tuple[str, ...] = GRADIENTS[:1],
    dtypes: tuple[str, ...] = DTYPES[:1],
) -> Iterator[Case]:
    """Every combination; the shape changes slowest, so that its tensors are drawn once.

    Only four-dimensional shapes have a second memory format and planes that can be expanded.
    """
    for shape in listed:
        for layout in (one for one in shape.layouts if one in layouts):
            for variant, dtype, gradient in product(variants, dtypes, gradients):
                if gradient == "matching" or len(shape.dims) == 4:
                    yield Case(shape, layout, variant, gradient, dtype)


def least_bytes(elements: int, itemsize: int, variant: str, mode: str, gradient: str = "matching") -> int:
    """The bytes no implementation can avoid, each tensor read or written once.

    The pass over x for the statistics is not counted: a channel's block can stay in cache between
    the two passes. The sign of BN + ReLU follows from x and the channel's scale and shift; with a
    residual it does not, so that variant stores one bit per element. Channel vectors are not
    counted, nor is a gradient with one value per plane.

    Args:
        elements: Elements of x.
        itemsize: Bytes of an element.
        variant: One of `VARIANTS`.
        mode: One of `MODES`.
        gradient: One of `GRADIENTS`.
    """
    tensor = elements * itemsize
    residual = variant == "bn_add_relu"
    mask = elements // 8 if residual else 0
    forward = tensor * (3 if residual else 2)  # x (and the residual) in, y out
    backward = tensor * (4 if residual else 3) + mask  # x and dy in, dx (and the residual's) out
    if gradient == "expanded":
        backward -= tensor
    return {
        "inference": forward,
        "forward": forward + mask,
        "backward": backward,
        "both": forward + mask + backward,
    }[mode]
