"""Domains of a whole model: choose one for all layers, and convert the batch normalizations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from keelnorm.engine.error_messages import check_module
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.nn._shared.replace_layers import replace_layers
from keelnorm.nn._shared.take_over import options_of
from keelnorm.nn.domain.domain_batch_norm import DomainBatchNorm
from keelnorm.nn.domain.domain_names import Domain, rows_of


@contextmanager
def use_domain(model: torch.nn.Module, domain: Domain) -> Iterator[torch.nn.Module]:
    """Let all domain layers of a model normalize with this domain inside the block.

    Blocks may be nested and end in any order. The layers hold the choice (``layer.domain``), so it applies in every
    thread; threads that need different domains of one model pass ``domain=`` to the layers. It ends with the block, by
    an exception too, and a copy of the model made inside has none. Activation checkpointing runs the forward again in
    the backward, which therefore belongs inside the block; outside of every block it is an error.

    Args:
        model: A model with at least one :class:`DomainBatchNorm`.
        domain: A name, a number, or an int64 tensor with a number for each sample of the batch.

    Raises:
        TypeError, ValueError: ``model`` is not a module; it has no domain layer, or one has no such domain. Nothing is
            changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), DomainBatchNorm(8, ["real", "generated"]))
        >>> with use_domain(model, "generated"):
        ...     y = model(torch.randn(4, 3))
        >>> model[1].domain is None
        True
    """
    check_module("use_domain", model)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, DomainBatchNorm)}
    if not layers:
        raise ValueError(
            f"use_domain: the {type(model).__name__} has no DomainBatchNorm; convert_domains(model, domains) puts one "
            "in the place of each batch normalization"
        )
    for path, layer in layers.items():
        rows_of(f"use_domain: {path or type(layer).__name__}", layer.domains, domain)
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(layer._choices.choosing(domain))
        yield model


def convert_domains(
    model: torch.nn.Module, domains: Sequence[str] | int, *, share_affine: bool = True
) -> torch.nn.Module:
    """Put a :class:`DomainBatchNorm` in the place of each batch normalization of a model, and return the model.

    Every domain starts with the present running statistics. A shared weight and bias stay the model's parameters; with
    ``share_affine=False`` there are new ones. A layer in several places stays one layer; a DomainBatchNorm stays.

    Args:
        model: Changed in place; if it is itself a batch normalization, use the returned layer instead.
        domains: As for :class:`DomainBatchNorm`.
        share_affine: As for :class:`DomainBatchNorm`.

    Raises:
        TypeError: ``model`` is not a module; or a batch normalization is not torch.nn's or keelnorm's drop-in layer, or
            has hooks (the message names its path).
        ValueError: The model has no batch normalization. It is then as before.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(convert_domains(model, ["real", "generated"])[1]).__name__
        'DomainBatchNorm'
    """
    check_module("convert_domains", model)
    new: dict[BatchNormBase, torch.nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, BatchNormBase) and not isinstance(module, DomainBatchNorm):
            options_of(f"convert_domains: {path or 'the model'}", module)
            new[module] = DomainBatchNorm.from_batch_norm(module, domains, share_affine=share_affine)
    if not new:
        raise ValueError(f"convert_domains: the {type(model).__name__} has no batch normalization to convert")
    return replace_layers(model, new)
