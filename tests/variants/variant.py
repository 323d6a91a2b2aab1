"""What the contract suite asks of a variant: how to make it, and its meaning in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: y of the layer as it is now (training or evaluation, before this forward), by the paper's formula in plain torch,
#: differentiable: (layer, x, **keywords of the call) -> y. Written from the paper, with no code of the layer's.
Oracle = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant:
    """One variant in the contract suite.

    Args:
        name: Shown in the tests' names.
        make: ``make(channels, **keywords)`` builds the layer; keywords are those of ``torch.nn.BatchNorm2d``.
        oracle: See :data:`Oracle`.
        shapes: Legal inputs, the batch first.
        keywords: What a call needs besides x, made from x: class labels, domains. Tensors have a value per sample.
        masks: Whether a mask has a meaning.
        compiles: Whether ``torch.compile(fullgraph=True)`` takes it; else why not, as a sentence.
        buffers: Names of buffers in its state_dict besides torch.nn's.
        dtypes: Legal ones besides float32 and float64.
        unkept: Promises of the suite that the variant does not keep: the name of the test, and why, as a sentence.
            Such a test has to fail.
    """

    name: str
    make: Callable[..., torch.nn.Module]
    oracle: Oracle
    shapes: tuple[tuple[int, ...], ...] = ((6, 3), (4, 3, 5), (4, 5, 3, 4))
    keywords: Callable[[Tensor], dict[str, Any]] = field(default=lambda x: {})
    masks: bool = False
    compiles: bool | str = True
    buffers: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    unkept: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name
