"""Conditional and domain-specific batch normalization, by their papers' formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from variants.variant import Variant

from keelnorm.nn.conditional import ConditionalBatchNorm
from keelnorm.nn.domain.domain_batch_norm import DomainBatchNorm

DOMAINS = ("source", "target")


def spread(values: Tensor, x: Tensor) -> Tensor:
    """(C,) or (N, C) in a shape that broadcasts against x."""
    return values.view(-1, values.shape[-1], *[1] * (x.dim() - 2))


def normalized(x: Tensor, eps: float, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """(x − mean)/√(var + eps) with the given moments, or with x's own."""
    dims = [0, *range(2, x.dim())]
    if moments is None:
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    else:
        mean, var = (spread(values, x) for values in moments)
    return (x - mean) / (var + eps).sqrt()


def whole_batch(layer: torch.nn.Module, x: Tensor) -> Tensor:
    batch = layer.training or layer.running_mean is None
    return normalized(x, layer.eps, None if batch else (layer.running_mean, layer.running_var))


def by_class(layer: torch.nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    """Dumoulin, Shlens, Kudlur (2017), eq. 5, with batch moments: γ_s and β_s are rows of tables."""
    y = whole_batch(layer, x)
    if layer.weight is None:
        return y
    one_hot = torch.zeros(len(x), len(layer.weight), dtype=x.dtype)
    one_hot[range(len(x)), condition.tolist()] = 1
    return y * spread(one_hot @ layer.weight, x) + spread(one_hot @ layer.bias, x)


def by_embedding(layer: torch.nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    """De Vries et al. (2017), section 3: Δγ and Δβ are predicted, here linearly, and added to γ and β."""
    matrix, offset = layer.modulation.weight, layer.modulation.bias
    change = condition.to(x.dtype) @ matrix.T + offset
    C = x.shape[1]
    base = (torch.ones(C), torch.zeros(C)) if layer.weight is None else (layer.weight, layer.bias)
    return whole_batch(layer, x) * spread(base[0] + change[:, :C], x) + spread(base[1] + change[:, C:], x)


def by_domain(layer: torch.nn.Module, x: Tensor, domain: str | Tensor) -> Tensor:
    """Chang et al. (2019), section 3: each domain is normalized as if it were alone."""
    if isinstance(domain, str):
        domain = torch.full((len(x),), DOMAINS.index(domain))
    samples = []
    for n, d in enumerate(domain.tolist()):
        own = domain == d
        if layer.training or layer.running_mean is None:
            y = normalized(x[own], layer.eps, None)[int(own[:n].sum())]
        else:
            y = normalized(x[n : n + 1], layer.eps, (layer.running_mean[d], layer.running_var[d]))[0]
        if layer.weight is not None:
            weight, bias = (v if v.dim() == 1 else v[d] for v in (layer.weight, layer.bias))
            y = y * spread(weight, x)[0] + spread(bias, x)[0]
        samples.append(y)
    return torch.stack(samples)


def one_class(channels: int, **keywords: Any) -> torch.nn.Module:
    return ConditionalBatchNorm(channels, num_classes=4, **keywords)


def embedded(channels: int, **keywords: Any) -> torch.nn.Module:
    return ConditionalBatchNorm(channels, embedding_dim=5, **keywords)


def shared(channels: int, **keywords: Any) -> torch.nn.Module:
    return DomainBatchNorm(channels, DOMAINS, **keywords)


def separate(channels: int, **keywords: Any) -> torch.nn.Module:
    return DomainBatchNorm(channels, DOMAINS, share_affine=False, **keywords)


def labels(x: Tensor) -> dict[str, Any]:
    return {"condition": torch.arange(len(x)) * 3 % 4}


def embedding(x: Tensor) -> dict[str, Any]:
    return {"condition": torch.linspace(-1, 1, len(x) * 5, dtype=x.dtype).sin().view(-1, 5)}


def alternating(x: Tensor) -> dict[str, Any]:
    return {"domain": torch.arange(len(x)) % 2}


ROWS = "num_batches_tracked has a counter for each domain, which the suite compares as one number."
BANKS = "There is a row of running statistics for each domain, which learns from that domain's samples alone."
UNKEPT = {
    "test_training_updates_once": ROWS,
    "test_momentum_none_averages": ROWS,
    "test_running_statistics_are_the_batchs": BANKS,
}
HALF = (torch.bfloat16, torch.float16)

VARIANTS = [
    Variant("conditional-classes", one_class, by_class, keywords=labels, masks=True, dtypes=HALF),
    Variant(
        "conditional-embedding",
        embedded,
        by_embedding,
        keywords=embedding,
        masks=True,
        buffers=("modulation.weight", "modulation.bias"),
        dtypes=HALF,
    ),
    Variant(
        "domain",
        shared,
        by_domain,
        keywords=lambda x: {"domain": "target"},
        masks=True,
        dtypes=HALF,
        unkept=UNKEPT,
    ),
    Variant(
        "domain-by-sample",
        separate,
        by_domain,
        keywords=alternating,
        masks=True,
        compiles="The samples are grouped by values of a tensor, on which the shapes then depend.",
        dtypes=HALF,
        unkept={**UNKEPT, "test_a_poisoned_channel_keeps_its_running_statistics": BANKS},
    ),
]
