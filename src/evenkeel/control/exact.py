"""Gradients of one large batch, from micro-batches that are in memory one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from evenkeel.activations import resolve
from evenkeel.arguments import State, check_arguments
from evenkeel.control.accumulation import enter
from evenkeel.control.selection import named, select
from evenkeel.errors import describe
from evenkeel.functional import moments as moments_of
from evenkeel.layout import per_channel, reduced_dims
from evenkeel.moments import Moments, compute_dtype
from evenkeel.nn.batch_norm import FusedBatchNorm
from evenkeel.nn.variant import normalize
from evenkeel.second_run import is_second_run

T = TypeVar("T")


def backward_as_one_batch(model: torch.nn.Module, step: Callable[[T], Tensor], micro_batches: Iterable[T]) -> Tensor:
    """The backward of one large batch, from micro-batches: every batch norm uses the moments of them all.

    For the total L = Σᵢ step(bᵢ), where each layer normalizes with mean m = Σx/n and variance v = Σ(x − m)²/n over the
    inputs of all micro-batches, the gradient is that of

        Σᵢ [ step(bᵢ) + Σ_layers ( ∂L/∂m · Σx/n + ∂L/∂v · Σ(x − m)²/n ) ]        with m, v, ∂L/∂m, ∂L/∂v held fixed,

    which falls apart into the micro-batches. The moments are found front to back: a pass over all micro-batches with
    those of the last pass makes those of one more layer exact. The derivatives are found in the same way back to front.

    Args:
        model: A model whose batch norms are torch.nn's or ``ek.BatchNorm*``. Those in evaluation, frozen ones too,
            normalize with their running moments as ever.
        step: The loss of a micro-batch, a scalar that is already divided: their sum is the large batch's loss. It is
            called once per pass, and must compute the same each time; torch's random numbers are repeated (dropout).
        micro_batches: What ``step`` takes, kept in memory. Sizes may differ; a single sample is enough.

    Returns:
        The total loss, detached. Gradients are added to the parameters' ``.grad``, as by ``backward()``.

    State:
        Running moments are updated once, at the end, and not after an error.

    Numerics:
        Moments and their derivatives are float64. Equal to the large batch's up to rounding.

    Cost:
        The memory of one micro-batch. With L batch norms in a row, up to L forwards, L forwards with backward, and one
        of each at the end: about L times the large batch's time, which is for models with few batch norms, or for
        checking. Compiled models run uncompiled.

    Raises:
        TypeError: ``model`` is no module, or a layer is of a class that normalizes otherwise (variants, subclasses).
        ValueError: No micro-batch, or a loss that is no scalar with a gradient.
        RuntimeError: Gradients are switched off; activation checkpointing inside ``step``, which has no use here; or a
            step that uses a layer more often when it is called again.

    Example:
        >>> layer, x = torch.nn.BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
        >>> loss = backward_as_one_batch(layer, lambda part: layer(part).pow(3).sum(), x.split(2))
        >>> expected, = torch.autograd.grad(torch.nn.BatchNorm1d(3)(x).pow(3).sum(), x)
        >>> torch.allclose(x.grad, expected, atol=1e-4)
        True
    """
    parts = list(micro_batches)
    if not torch.is_grad_enabled():
        raise RuntimeError("backward_as_one_batch: gradients are switched off (torch.no_grad); call it outside")
    if not parts:
        raise ValueError("backward_as_one_batch: there is no micro-batch")
    layers = {path: layer for path, layer in select("backward_as_one_batch", model, None).items() if layer.training}
    for path, layer in layers.items():
        if type(layer).forward not in (_BatchNorm.forward, FusedBatchNorm.forward):
            raise TypeError(
                f"backward_as_one_batch: {named(path)} is a {type(layer).__name__}, which may not normalize as plain "
                "batch norm does. Legal are torch.nn.BatchNorm1d/2d/3d, evenkeel.BatchNorm*, and layers in evaluation"
            )
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        passes = _Passes(step, parts)
        for layer in layers.values():
            vars(layer)["forward"] = partial(passes.normalize, layer)
            stack.callback(vars(layer).pop, "forward")
        passes.find_moments()
        passes.find_derivatives()
        total = passes.backward()
    for (layer, _), site in passes.sites.items():
        if layer.running_mean is not None and layer.track_running_stats:
            enter(layer, site.moments)
    return total


class _Site:
    """One use of a layer by the step.

    Args:
        moments: Of its inputs in all micro-batches, as far as known; they normalize.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        self.leaves = [moments.mean.clone(), moments.m2 / moments.count.clamp(min=1)]
        self.derivatives = [torch.zeros_like(leaf) for leaf in self.leaves]

    def term(self, x: Tensor) -> Tensor:
        """What a micro-batch adds to the loss by way of mean and variance, save a constant."""
        by_mean, by_var = self.derivatives
        dtype, dims = compute_dtype(x), reduced_dims(x)
        centred = x.to(dtype) - per_channel(self.moments.mean, x).to(dtype)
        return (by_mean * centred.sum(dims) + by_var * centred.square().sum(dims)).sum() / self.moments.count


class _Passes:
    """Passes of the step over all micro-batches."""

    def __init__(self, step: Callable[[Any], Tensor], parts: list[Any]) -> None:
        self.sites: dict[tuple[_BatchNorm, int], _Site] = {}
        self._step, self._parts = step, parts
        self._random = [_RandomState() for _ in parts]
        self._uses: Counter[_BatchNorm] = Counter()
        self._pooled: dict[tuple[_BatchNorm, int], Moments] | None = None
        self._terms: list[Tensor] = []

    def find_moments(self) -> None:
        """As many passes as there are sites make all exact; fewer, where layers stand side by side."""
        with torch.no_grad():
            self._pool()
            for _ in range(len(self.sites) - 1):
                if not self._pool():
                    return

    def _pool(self) -> bool:
        """A pass that normalizes with the moments known, and pools anew; whether that changed anything."""
        pooled: dict[tuple[_BatchNorm, int], Moments] = {}
        self._pooled = pooled
        for _ in self._losses():
            pass
        self._pooled = None
        changed = pooled.keys() != self.sites.keys() or not all(
            torch.equal(new.mean, self.sites[key].moments.mean) and torch.equal(new.m2, self.sites[key].moments.m2)
            for key, new in pooled.items()
        )
        self.sites = {key: _Site(moments) for key, moments in pooled.items()}
        return changed

    def find_derivatives(self) -> None:
        """As :meth:`find_moments`, from the last site to the first."""
        leaves = [leaf.requires_grad_() for site in self.sites.values() for leaf in site.leaves]
        for _ in self.sites:
            totals = [torch.zeros_like(leaf) for leaf in leaves]
            for loss in self._losses():
                found = torch.autograd.grad([loss, *self._terms], leaves, allow_unused=True)
                totals = [total if one is None else total + one for total, one in zip(totals, found, strict=True)]
            changed = False
            for number, site in enumerate(self.sites.values()):
                new = totals[2 * number : 2 * number + 2]
                changed = changed or not all(map(torch.equal, new, site.derivatives))
                site.derivatives = new
            if not changed:
                break
        for leaf in leaves:
            leaf.requires_grad_(False)

    def backward(self) -> Tensor:
        """The pass that adds to the parameters' gradients; the total loss."""
        losses = []
        for loss in self._losses():
            torch.autograd.backward([loss, *self._terms])
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _losses(self) -> Iterator[Tensor]:
        for random, part in zip(self._random, self._parts, strict=True):
            self._uses.clear()
            self._terms = []
            random.repeat()
            loss = self._step(part)
            if (
                not isinstance(loss, Tensor)
                or loss.numel() != 1
                or (torch.is_grad_enabled() and not loss.requires_grad)
            ):
                raise ValueError(
                    "backward_as_one_batch: step must return the loss, one value that requires a gradient; got "
                    f"{describe(loss)}"
                )
            yield loss

    def normalize(
        self,
        layer: _BatchNorm,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        activation: str | torch.nn.Module | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """The forward of the layers meanwhile. In place has no effect."""
        if not layer.training:  # since the step began
            if isinstance(layer, FusedBatchNorm):
                return FusedBatchNorm.forward(layer, x, residual, activation=activation, inplace=inplace)
            return _BatchNorm.forward(layer, x)
        if is_second_run():
            raise RuntimeError(
                "backward_as_one_batch: a checkpoint runs a forward again inside the backward. Leave checkpointing "
                "out: there is only one micro-batch in memory at a time"
            )
        what = type(layer).__name__
        layer._check_input_dim(x)
        if x.numel() != x.shape[1]:  # one value per channel is enough here
            state = State(None, None, None, True, False, layer.momentum, layer.eps)
            check_arguments(what, x, residual, layer.weight, layer.bias, state, getattr(layer, "_ranks", None))
        key = layer, self._uses[layer]
        self._uses[layer] += 1
        site = self.sites.get(key)
        if self._pooled is not None:
            moments = moments_of(x)
            self._pooled[key] = moments if key not in self._pooled else self._pooled[key].merge(moments)
            site = site or _Site(moments)
        if site is None:
            raise RuntimeError(f"backward_as_one_batch: step used a {what} more often when it was called again")
        if torch.is_grad_enabled() and x.requires_grad:
            self._terms.append(site.term(x))
        mean, var = site.leaves
        act = resolve(what, activation)
        return normalize(x, mean, var, layer.weight, layer.bias, layer.eps, residual, act)


class _RandomState:
    """The state of torch's random numbers at the first call, and the same again at each later one."""

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._cuda: list[Tensor] = []

    def repeat(self) -> None:
        if self._state is None:
            self._state = torch.get_rng_state()
            self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            return
        torch.set_rng_state(self._state)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
