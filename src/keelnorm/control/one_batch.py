"""Gradients of one large batch, from micro-batches that are in memory one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from keelnorm.control.accumulation import count_in
from keelnorm.control.layer_hooks import paused
from keelnorm.control.layer_selection import named, select
from keelnorm.control.micro_batches import Call, Site, Watch
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import describe
from keelnorm.engine.recomputation import is_second_run
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.moments import Moments
from keelnorm.nn.batch_norm import FusedBatchNorm

T = TypeVar("T")


def backward_as_one_batch(model: torch.nn.Module, step: Callable[[T], Tensor], micro_batches: Iterable[T]) -> Tensor:
    """Compute the gradients of one large batch from micro-batches: every batch norm uses the moments of all of them.

    For the total L = Σᵢ step(bᵢ), where each layer normalizes with mean m = Σx/n and variance v = Σ(x − m)²/n over the
    inputs of all micro-batches, the gradient is that of

        Σᵢ [ step(bᵢ) + Σ_layers ( ∂L/∂m · Σx/n + ∂L/∂v · Σ(x − m)²/n ) ]        with m, v, ∂L/∂m, ∂L/∂v held fixed,

    which is a sum over micro-batches. The moments are computed front to back: each pass over all micro-batches, with
    the moments of the last pass, makes those of one more layer exact. The derivatives are computed back to front in the
    same way.

    Args:
        model: A model whose batch norms are torch.nn's or ``kn.BatchNorm*``. Layers in evaluation, frozen ones too,
            normalize with their running statistics as usual. A forward set on a layer instance is used.
        step: Computes the loss of a micro-batch: a scalar, scaled so that the sum over micro-batches is the loss of the
            large batch. It is called once per pass, and must compute the same each time; torch's random numbers are
            repeated (dropout).
        micro_batches: The arguments of ``step``, kept in memory. Sizes may differ; one sample is enough.

    Returns:
        The total loss, detached. Gradients are added to the parameters' ``.grad``, as by ``backward()``.

    State:
        Running statistics are updated once, at the end; not after an error.

    Numerics:
        Moments and their derivatives are float64. Equal to the large batch's up to rounding.

    Cost:
        The memory of one micro-batch. With L batch norms in a row, up to L forwards, L forwards with backward, and one
        of each at the end: about L times the time of the large batch, so it suits models with few batch norms, and
        checks. Compiled models run uncompiled.

    Raises:
        TypeError: ``model`` is not a module; a layer's class normalizes differently (variants, subclasses); or ``step``
            normalizes with the batch outside of the model's layers.
        ValueError: There is no micro-batch; the loss is not a scalar with a gradient; or there is one value per channel
            in all micro-batches together.
        RuntimeError: Gradients are switched off; ``step`` uses activation checkpointing, or uses a layer more often
            when it is called again.

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
        if type(layer).forward not in (BatchNormBase.forward, FusedBatchNorm.forward):
            raise TypeError(
                f"backward_as_one_batch: {named(path)} is a {type(layer).__name__}, which may not normalize as plain "
                "batch norm does. Legal are torch.nn.BatchNorm1d/2d/3d, keelnorm.BatchNorm*, and layers in evaluation"
            )
    passes = _Passes(step, parts)
    with paused(layers.values()), uncompiled(load=True), ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.register_forward_pre_hook(passes.enter).remove)
            stack.callback(layer.register_forward_hook(passes.leave, always_call=True).remove)
        passes.find_moments()
        passes.find_derivatives()
        total = passes.backward()
    for (layer, _), site in passes.sites.items():
        count_in(layer, site.moments)
    return total


class _Passes:
    """Passes of the step over all micro-batches."""

    def __init__(self, step: Callable[[Any], Tensor], parts: list[Any]) -> None:
        self.sites: dict[tuple[BatchNormBase, int], Site] = {}
        self._step, self._parts = step, parts
        self._random = [_RandomState() for _ in parts]
        self._uses: Counter[BatchNormBase] = Counter()
        self._pooled: dict[tuple[BatchNormBase, int], Moments] | None = None
        self._terms: list[Tensor] = []
        #: The layers that are being called, with the batch normalizations of each call so far.
        self._running: list[tuple[BatchNormBase, list[Call]]] = []

    def enter(self, layer: Any, _: Any) -> None:
        """The forward pre-hook of the layers."""
        if is_second_run():
            raise RuntimeError(
                "backward_as_one_batch: a checkpoint runs a forward again inside the backward. Leave checkpointing "
                "out: there is only one micro-batch in memory at a time"
            )
        self._running.append((layer, []))

    def leave(self, layer: Any, _: Any, result: Any) -> None:
        """The forward hook of the layers."""
        calls = self._running.pop()[1] if self._running else []
        if result is not None and layer.training and not calls:
            raise TypeError(
                f"backward_as_one_batch: the forward set on a {type(layer).__name__} does not end in batch "
                "normalization by torch.nn.functional.batch_norm or the layer's own forward, so all micro-batches "
                "together can't normalize it"
            )

    def find_moments(self) -> None:
        """Run passes until the moments of all sites are exact: one per site, or fewer for parallel layers."""
        with torch.no_grad():
            self._pool()
            for _ in range(len(self.sites) - 1):
                if not self._pool():
                    break

    def _pool(self) -> bool:
        """Run a pass with the known moments, and pool again; return whether anything changed."""
        pooled: dict[tuple[BatchNormBase, int], Moments] = {}
        self._pooled = pooled
        for _ in self._losses():
            pass
        self._pooled = None
        changed = pooled.keys() != self.sites.keys() or not all(
            torch.equal(new.mean, self.sites[key].moments.mean) and torch.equal(new.m2, self.sites[key].moments.m2)
            for key, new in pooled.items()
        )
        self.sites = {key: Site(moments) for key, moments in pooled.items()}
        return changed

    def find_derivatives(self) -> None:
        """Run passes until the derivatives by all moments are exact, from the last site to the first."""
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
        """Run the pass that adds to the parameters' gradients; return the total loss."""
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
            self._running.clear()
            with Watch(self.normalize):
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

    def normalize(self, call: Call) -> Tensor:
        """Normalize with the moments of all micro-batches. ``inplace`` has no effect."""
        if not self._running:
            raise TypeError(
                "backward_as_one_batch: step normalizes by the batch outside of the model's layers, by "
                "torch.nn.functional.batch_norm or another model's layer in training, so it would use the micro-batch "
                "alone. Pass a model that contains all layers, and replace the function by a layer"
            )
        layer, calls = self._running[-1]
        what = type(layer).__name__
        call = call._replace(state=call.state._replace(what=what)).checked()
        calls.append(call)
        key = layer, self._uses[layer]
        self._uses[layer] += 1
        site = self.sites.get(key)
        if self._pooled is not None:
            moments = call.moments()
            self._pooled[key] = moments if key not in self._pooled else self._pooled[key].merge(moments)
            site = site or Site(moments)
        if site is None:
            raise RuntimeError(f"backward_as_one_batch: step used a {what} more often when it was called again")
        single = call.options.sample_weight is None and call.too_few != "skip"
        if self._pooled is None and single and bool((site.moments.count == 1).any()):
            raise ValueError(f"{what}: one value per channel, in all micro-batches together, has no variance")
        if torch.is_grad_enabled() and call.x.requires_grad:
            self._terms.append(site.term(call))
        return call.normalized(*site.leaves)


class _RandomState:
    """Keeps the state of torch's random numbers at the first call, and restores it at each later one."""

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._cuda: list[Tensor] = []

    def repeat(self) -> None:
        """Save the state, or restore it."""
        if self._state is None:
            self._state = torch.get_rng_state()
            self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            return
        torch.set_rng_state(self._state)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
