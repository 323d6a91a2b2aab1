"""Record what goes into a model's batch norms, and what comes out, while the model runs on batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.passing_hook import PassingHook
from keelnorm.doctor.evidence.sampled_moments import SampledMoments, Samples, SamplesSum

#: Calls of a layer in one batch that are told apart; those after them count as the last of these.
MOST_CALLS = 8
#: Where the derivative of a sigmoid, or of tanh, is a hundredth of its largest.
_SATURATED = {"sigmoid": 5.293, "tanh": 2.993}


@dataclass(frozen=True)
class Outputs:
    """What comes out of a layer in front of an activation, per channel.

    Args:
        highest: The largest value.
        saturated: The share of values at which the activation's derivative is less than a hundredth of its largest;
            None for other activations than sigmoid and tanh.
        activation: The activation: "relu", "sigmoid" or "tanh".
    """

    highest: Tensor
    saturated: Tensor | None
    activation: str


@dataclass(frozen=True)
class Padding:
    """Positions at the end of samples, (N, C, L), that are equal in all of them, and counted.

    Args:
        share: How many of all positions.
        without: The moments of the others.
    """

    share: float
    without: SampledMoments


class _OutputSum:
    def __init__(self, activation: str) -> None:
        self.activation = activation
        self._highest: Tensor | None = None
        self._saturated: Tensor | None = None
        self._number = 0

    def add(self, y: Tensor) -> None:
        y = y.detach().flatten(2) if y.ndim > 2 else y.detach().unsqueeze(2)
        highest = y.amax(2).amax(0).cpu().double()  # in two steps, of which each is quick
        self._highest = highest if self._highest is None else torch.maximum(self._highest, highest)
        if self.activation in _SATURATED:
            far = (y.abs() > _SATURATED[self.activation]).sum((0, 2)).cpu().double()
            self._saturated = far if self._saturated is None else self._saturated + far
            self._number += y.shape[0] * y.shape[2]

    def outputs(self) -> Outputs | None:
        if self._highest is None:
            return None
        share = None if self._saturated is None else self._saturated / self._number
        return Outputs(self._highest, share, self.activation)


class _PaddingSum:
    """Looks for a vector that ends some samples of a call, and in different lengths."""

    def __init__(self) -> None:
        self.counts, self.positions = 0, 0
        self.without = SamplesSum()

    def add(self, x: Tensor) -> None:
        lengths = _lengths(x.detach())
        self.positions += x.shape[0] * x.shape[2]
        padded = int((x.shape[2] - lengths).sum())
        self.counts += padded
        mask = None if not padded else torch.arange(x.shape[2], device=x.device) < lengths.unsqueeze(1)
        self.without.add(Samples.of(x, mask))

    def padding(self) -> Padding | None:
        without = self.without.moments()
        if not self.counts or without is None:
            return None
        return Padding(self.counts / self.positions, without)


def _lengths(x: Tensor) -> Tensor:
    """The length of each sample of (N, C, L) without its padding, where that is seen; else L.

    Padding is a run of at least two equal vectors at the end, with the same vector in two samples or more, in runs of
    different lengths: sequences of one length are not padded.
    """
    full = torch.full((x.shape[0],), x.shape[2], device=x.device)
    if x.shape[2] < 3 or x.shape[0] < 2:
        return full
    last = x[:, :, -1:]
    equal = (x == last).all(1)
    run = equal.flip(1).long().cumprod(1).sum(1)
    runs = run > 1
    if int(runs.sum()) < 2:
        return full
    ends = x[runs][:, :, -1]
    same = bool((ends == ends[0]).all())
    ended = run[runs]
    if not same or (bool(runs.all()) and int(ended.min()) == int(ended.max())):
        return full
    # A sample whose one last vector is the same as the others' padding has one padded position, or none: left as it is.
    return torch.where(runs, x.shape[2] - run, full)


@dataclass(frozen=True)
class LayerInputs:
    """What one run over the batches has shown of a layer.

    Args:
        moments: Of all its inputs.
        calls: Of each call in a batch, if there are several.
        outputs: What comes out, in front of an activation.
        padding: Padding that is counted.
    """

    moments: SampledMoments
    calls: tuple[SampledMoments, ...] = ()
    outputs: Outputs | None = None
    padding: Padding | None = None


class _Layer:
    def __init__(self, channels: int | None, activation: str | None) -> None:
        self._channels = channels
        self._sum, self._calls = SamplesSum(), [SamplesSum() for _ in range(MOST_CALLS)]
        self._batch: list[Samples] = []
        self._outputs = None if activation is None else _OutputSum(activation)
        self._padding = _PaddingSum()
        self._is_known = True

    @property
    def looks_at_outputs(self) -> bool:
        return self._outputs is not None

    def take(self, module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """A hook in front of the layer."""
        x = args[0] if args else keywords.get("input")
        if not isinstance(x, Tensor) or not self._is_legal(x) or keywords.get("sample_weight") is not None:
            self._is_known = False
        elif x.numel():
            self._channels = x.shape[1]
            mask = keywords.get("mask")
            self._batch.append(Samples.of(x, mask if isinstance(mask, Tensor) else None))
            if x.ndim == 3 and mask is None:
                self._padding.add(x)

    def _is_legal(self, x: Tensor) -> bool:
        return x.is_floating_point() and x.ndim > 1 and self._channels in (None, x.shape[1])

    def give(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        """A hook behind the layer."""
        if self._outputs is not None and isinstance(y, Tensor) and y.ndim > 1 and y.numel():
            self._outputs.add(y)

    def end_batch(self) -> None:
        made, self._batch = self._batch, []
        if not made:
            return
        for index, samples in enumerate(made):
            self._calls[min(index, MOST_CALLS - 1)].add(samples)
        whole = made[0]
        for samples in made[1:]:
            whole = whole.with_other(samples)
        self._sum.add(whole)

    def inputs(self) -> LayerInputs | None:
        moments = self._sum.moments()
        if moments is None or not self._is_known:
            return None
        calls = tuple(found for call in self._calls if (found := call.moments()) is not None)
        return LayerInputs(
            moments,
            calls if len(calls) > 1 else (),
            None if self._outputs is None else self._outputs.outputs(),
            self._padding.padding(),
        )


class Recorder:
    """Hooks on layers for one run over the batches.

    Args:
        layers: The layers by path.
        activations: "relu", "sigmoid" or "tanh" for those layers whose outputs are looked at.
    """

    def __init__(self, layers: Mapping[str, nn.Module], activations: Mapping[str, str]) -> None:
        self._modules = layers
        self._layers = {path: _Layer(_channels(layer), activations.get(path)) for path, layer in layers.items()}

    def take(self, path: str, module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Record a call of a layer whose hooks were not there yet when it began."""
        self._layers[path].take(module, args, keywords)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls of the layers inside the block."""
        with ExitStack() as stack:
            for path, module in self._modules.items():
                one = self._layers[path]
                # The last of the hooks: it sees what others make of the arguments.
                stack.callback(module.register_forward_pre_hook(PassingHook(one.take), with_kwargs=True).remove)
                if one.looks_at_outputs:
                    stack.callback(module.register_forward_hook(PassingHook(one.give)).remove)
            yield

    def end_batch(self) -> None:
        """Add what was recorded of a batch."""
        for one in self._layers.values():
            one.end_batch()

    def inputs(self) -> dict[str, LayerInputs]:
        """What was seen of each layer; a layer that was not called, or in an unknown way, is left out."""
        return {path: found for path, one in self._layers.items() if (found := one.inputs()) is not None}


def _channels(layer: nn.Module) -> int | None:
    for name in ("running_mean", "weight"):
        value = getattr(layer, name, None)
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[-1]
    return None
