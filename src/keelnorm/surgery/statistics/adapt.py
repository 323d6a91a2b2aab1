"""Running statistics for data of another domain than the training's, blended with the source's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import describe
from keelnorm.functional import moments as moments_of
from keelnorm.surgery.known_layers import notes_on
from keelnorm.surgery.report import Report
from keelnorm.surgery.statistics.collect import Seen, in_one_pass, layer_by_layer, modes_kept, reason_to_leave
from keelnorm.surgery.statistics.entropy import MakeOptimizer, minimize_entropy
from keelnorm.surgery.statistics.model_inputs import Forward, check_loader, passes_over, run_batch
from keelnorm.surgery.statistics.recalibrate import buffers_of, drift, put_back
from keelnorm.surgery.target_layers import chosen

Model = TypeVar("Model", bound=nn.Module)
#: Where an adapted layer keeps what it was.
_SOURCE = "_before_adaptation"


def adapt(
    model: Model,
    loader: Iterable[Any] | None = None,
    *,
    prior: float = 0.0,
    mode: Literal["cumulative", "batch"] = "cumulative",
    entropy: bool | MakeOptimizer = False,
    where: Where = None,
    sequential: bool = False,
    forward: Forward | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> tuple[Model, Report]:
    """Adapt the running statistics of a model's batch norms to unlabelled data of a shifted domain, in place.

    With the source's moments, the target's over n samples, and ``prior`` N, which says how many samples the source's
    are worth:

        mean = N/(N + n)·mean_source + n/(N + n)·mean_target        var = N/(N + n)·var_source + n/(N + n)·var_target

    Args:
        model: Any module; it is changed.
        loader: Batches of the target, as :func:`recalibrate` takes them. None with ``mode="batch"``.
        prior: N, at least 0. 0 takes the target's moments alone (AdaBN); infinity keeps the source's.
        mode: "cumulative" pools the whole loader once. "batch" looks at no data now: from then on each forward in
            evaluation blends its own batch's moments with the source's, until :func:`reset_adaptation`.
        entropy: Also train γ and β, one step for each batch, so that predictions have low entropy (TENT): True for
            Adam with a learning rate of 0.001, or a function that makes an optimizer of a list of parameters. The model
            must return logits (N, classes, *), alone, first in a tuple or list, or as ``.logits``.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        sequential: Adapt layer after layer, each with those before it adapted; else all in one pass, in which layers
            normalize with the batch's moments. See :func:`recalibrate`.
        forward: ``forward(model, batch)``, for batches of another kind; with ``entropy`` it returns the logits.
        max_batches: Take no more of the loader.
        progress: Whether a bar is shown; None shows it in a terminal, where rich is installed.

    Returns:
        The model itself, and a report: per layer the samples, the source's weight, the largest drift of the mean in
        deviations, the largest ratio of variances; or why it was left.

    State:
        What a layer was is kept beside it, in copies and pickles too, until :func:`reset_adaptation` puts it back, bit
        for bit; a second adaptation starts from the same source. An exception leaves everything as it was.

    Raises:
        TypeError, ValueError: for what is no model, no batches, no prior, or a model whose output can't be logits.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1).eval()
        >>> layer, report = adapt(layer, [torch.tensor([[2.0], [4.0]])], prior=2)
        >>> layer.running_mean.item(), reset_adaptation(layer)[0].running_mean.item()
        (1.5, 0.0)

    Source:
        Schneider, Rusak, Eck, Bringmann, Brendel, Bethge (2020), "Improving robustness against common corruptions by
        covariate shift adaptation", arXiv:2006.16971, section 3; Li, Wang, Shi, Liu, Hou (2016), AdaBN,
        arXiv:1603.04779; Wang, Shelhamer, Liu, Olshausen, Darrell (2021), TENT, arXiv:2006.10726.
    """
    layers = chosen("adapt", model, where)
    _check(loader, prior, mode, bool(entropy))
    left = {path: reason_to_leave(layer) for path, layer in layers.items()}
    targets = {path: layer for path, layer in layers.items() if left[path] is None}
    if mode == "cumulative":
        check_loader("adapt", loader, (len(targets) if sequential else 1) + bool(entropy))
    with ExitStack() as undo:
        for layer in targets.values():
            undo.callback(_restore, layer, dict(vars(layer)))
            vars(layer).setdefault(_SOURCE, buffers_of(layer) | _affine_of(layer))
            _by_its_own_forward(layer)  # no longer by that of an earlier adaptation by the batch
        undo.callback(put_back, {layer: buffers_of(layer) | _affine_of(layer) for layer in targets.values()})
        if mode == "batch":
            for layer in targets.values():
                vars(layer)["forward"] = ByTheBatch(layer, prior)
            rows = [_row(path, layer, None, prior, left[path]) for path, layer in layers.items()]
        else:
            assert loader is not None
            seen = _cumulate(model, loader, list(targets.values()), prior, entropy, sequential, forward, max_batches,
                             progress)  # fmt: skip
            rows = [_row(path, layer, seen.get(layer), prior, left[path]) for path, layer in layers.items()]
        undo.pop_all()
    summary = {"layers": len(targets), "left": len(layers) - len(targets), "mode": mode, "prior": prior}
    return model, Report("adapt", summary, rows, notes_on(model))


def reset_adaptation(model: Model) -> tuple[Model, Report]:
    """Put back what :func:`adapt` has changed: running statistics, and γ and β, bit for bit.

    Returns:
        The model itself, and a report with a row for each layer that was put back.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> reset_adaptation(torch.nn.BatchNorm1d(3))[1].summary
        {'layers': 0}
    """
    rows = []
    for path, layer in chosen("reset_adaptation", model).items():
        source = vars(layer).pop(_SOURCE, None)
        if source is not None:
            put_back({layer: source})
            _by_its_own_forward(layer)
            rows.append({"path": path, "kind": type(layer).__name__})
    return model, Report("reset_adaptation", {"layers": len(rows)}, rows)


class ByTheBatch:
    """What ``layer.forward`` is while each batch adapts: an attribute of the instance, in front of the class's own.

    One that someone else has set there is kept, and called.
    """

    def __init__(self, layer: _BatchNorm, prior: float) -> None:
        self.layer, self.prior = layer, prior
        self.patch: Callable[..., Any] | None = vars(layer).get("forward")

    def _forward(self, *args: Any, **keywords: Any) -> Any:
        return (self.patch or partial(type(self.layer).forward, self.layer))(*args, **keywords)

    def __call__(self, x: Tensor, *args: Any, **keywords: Any) -> Any:
        layer = self.layer
        if layer.training or x.numel() == 0:
            return self._forward(x, *args, **keywords)
        asked = {name: keywords[name] for name in ("mask", "sample_weight", "weighting") if name in keywords}
        found = moments_of(x.detach(), **asked)
        buffers, source = layer._buffers, vars(layer)[_SOURCE]
        before = {name: buffers[name] for name in ("running_mean", "running_var")}
        try:
            for (name, old), new in zip(before.items(), (found.mean, found.var.nan_to_num()), strict=True):
                assert old is not None
                buffers[name] = blended(source[name].to(old.device), new, self.prior, x.shape[0]).to(old.dtype)
            return self._forward(x, *args, **keywords)
        finally:
            buffers.update(before)


def _by_its_own_forward(layer: _BatchNorm) -> None:
    """Take the adaptation by the batch away, if there is one."""
    forward = vars(layer).get("forward")
    if isinstance(forward, ByTheBatch):
        del vars(layer)["forward"]
        if forward.patch is not None:
            vars(layer)["forward"] = forward.patch


def blended(source: Tensor, target: Tensor, prior: float, samples: int) -> Tensor:
    """N/(N + n)·source + n/(N + n)·target."""
    share = source_weight(prior, samples)
    return source.to(target.dtype) * share + target * (1 - share) if share < 1 else source.to(target.dtype)


def source_weight(prior: float, samples: int) -> float:
    """N/(N + n)."""
    return 1.0 if prior == float("inf") else prior / (prior + samples)


def _check(loader: Any, prior: Any, mode: Any, entropy: bool) -> None:
    if isinstance(prior, bool) or not isinstance(prior, int | float) or not prior >= 0:
        raise ValueError(f"adapt: prior is a number of samples, 0 or more; got {describe(prior)}")
    if mode not in ("cumulative", "batch"):
        raise ValueError(f"adapt: mode must be 'cumulative' or 'batch'; got {describe(mode)}")
    if mode == "batch" and (loader is not None or entropy):
        raise ValueError(
            "adapt: mode='batch' adapts to each batch as it comes, so it takes no loader and no entropy; leave them "
            "out, or use mode='cumulative'"
        )


def _cumulate(
    model: nn.Module,
    loader: Iterable[Any],
    targets: list[_BatchNorm],
    prior: float,
    entropy: bool | MakeOptimizer,
    sequential: bool,
    forward: Forward | None,
    max_batches: int | None,
    progress: bool | None,
) -> dict[_BatchNorm, Seen]:
    passes = (len(targets) if sequential else 1) + bool(entropy)

    def call(batch: Any) -> Any:
        return (forward or run_batch)(model, batch)

    def put(layer: _BatchNorm, seen: Seen) -> None:
        if seen.samples == 0:
            raise ValueError(f"adapt: a {type(layer).__name__} was given no values; give where= to leave layers out")
        if not bool((seen.moments.mean.isfinite() & seen.moments.m2.isfinite()).all()):
            raise RuntimeError(f"adapt: the input of a {type(layer).__name__} is not finite; the model is as before")
        source = vars(layer)[_SOURCE]
        single = seen.moments.count <= 1
        var = torch.where(single, torch.zeros_like(seen.moments.m2), seen.moments.var_unbiased)
        new = {
            name: blended(source[name].to(target.device), target, prior, seen.samples).to(source[name].dtype)
            for name, target in (("running_mean", seen.moments.mean), ("running_var", var))
        }
        if not all(bool(values.isfinite().all()) for values in new.values()):
            raise RuntimeError(
                f"adapt: the moments of a {type(layer).__name__} are too large for its buffers of "
                f"{source['running_var'].dtype}; the model is as before"
            )
        for name, values in new.items():
            layer._buffers[name].copy_(values)  # type: ignore[union-attr]

    with modes_kept(model), uncompiled(), passes_over(loader, max_batches, progress, "adapt", passes) as begin:
        if entropy:
            minimize_entropy(model, targets, call, begin, entropy)
        collect = layer_by_layer if sequential else in_one_pass
        return collect(targets, call, begin, put)


def _affine_of(layer: _BatchNorm) -> dict[str, Tensor]:
    named = {"weight": layer.weight, "bias": layer.bias}
    return {name: p.detach().clone() for name, p in named.items() if p is not None}


def _restore(layer: _BatchNorm, attributes: dict[str, Any]) -> None:
    vars(layer).clear()
    vars(layer).update(attributes)


def _row(path: str, layer: _BatchNorm, seen: Seen | None, prior: float, reason: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": path, "kind": type(layer).__name__, "samples": None, "source weight": None, "mean drift": None,
        "variance ratio": None, "reason": reason,
    }  # fmt: skip
    if seen is not None:
        source = vars(layer)[_SOURCE]
        assert layer.running_mean is not None and layer.running_var is not None
        row |= {"samples": seen.samples, "source weight": source_weight(prior, seen.samples)}
        row |= drift(layer.running_mean, layer.running_var, source["running_mean"], source["running_var"])
    return row
