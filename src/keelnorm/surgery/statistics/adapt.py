"""Adapt running statistics to data of another domain, blended with those of the source domain, and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import Where
from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.functional import moments as moments_of
from keelnorm.surgery.report import Report
from keelnorm.surgery.snapshot import all_or_nothing, copy_values, in_evaluation, put_back
from keelnorm.surgery.statistics.collect import (
    PooledInput,
    check_finite,
    in_one_pass,
    layer_by_layer,
    name_of,
    reason_to_leave,
)
from keelnorm.surgery.statistics.entropy import MakeOptimizer, minimize_entropy
from keelnorm.surgery.statistics.model_inputs import Forward, check_loader, passes_over, run_batch
from keelnorm.surgery.statistics.recalibrate import BUFFERS, drift
from keelnorm.surgery.target_layers import batch_norms_in, notes_on

Model = TypeVar("Model", bound=nn.Module)
#: The attribute in which an adapted layer keeps copies of its values before the adaptation.
_SOURCE = "_before_adaptation"
_ADAPTED = (*BUFFERS, "weight", "bias")


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

    The statistics of the source domain are blended with those of n samples of the target domain; ``prior`` N is the
    number of samples that the source's statistics count for:

        mean = N/(N + n)·mean_source + n/(N + n)·mean_target        var = N/(N + n)·var_source + n/(N + n)·var_target

    Args:
        model: Any module; it is changed.
        loader: Batches of the target domain, as for :func:`recalibrate`. None with ``mode="batch"``.
        prior: N, at least 0. 0 takes the target's statistics alone (AdaBN); infinity keeps the source's.
        mode: "cumulative" pools the whole loader once. "batch" takes no data now: from then on each forward in
            evaluation blends the statistics of its own batch with the source's, until :func:`reset_adaptation`.
        entropy: Whether to train γ and β too, one step for each batch, for low entropy of the predictions (TENT). True
            uses Adam with a learning rate of 0.001; or a function that makes an optimizer for a list of parameters. The
            model must return logits (N, classes, *), alone, first in a tuple or list, or as ``.logits``.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        sequential: Whether to adapt layer after layer, each with those before it adapted; else all in one pass, in
            which layers normalize with the batch. See :func:`recalibrate`.
        forward: ``forward(model, batch)``, for batches of another kind; with ``entropy`` it returns the logits.
        max_batches: The largest number of batches to take from the loader; None for all.
        progress: Whether to show a progress bar; None shows it in a terminal if rich is installed.

    Returns:
        The model itself, and a report: per layer the number of samples, the source's weight, the largest drift of the
        mean in standard deviations, the largest ratio of variances; or the reason why it was left.

    State:
        A layer keeps copies of its former values, also in copies and pickles of the model, until
        :func:`reset_adaptation` puts them back bit for bit. A second adaptation starts from the same source. After an
        error the model is as before.

    Raises:
        TypeError: ``model`` is no module, ``loader`` gives no batches, or the model returns no logits for ``entropy``.
        ValueError: An option is not legal, or a layer gets no values.
        RuntimeError: A layer's moments are not finite, or too large for its buffers.

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
    layers = batch_norms_in("adapt", model, where)
    _check(loader, prior, mode, bool(entropy))
    left = {path: reason_to_leave(layer) for path, layer in layers.items()}
    targets = {path: layer for path, layer in layers.items() if left[path] is None}
    passes = (len(targets) if sequential else 1) + bool(entropy)
    if mode == "cumulative":
        check_loader("adapt", loader, passes)
    pooled: dict[BatchNormBase, PooledInput] = {}
    values = [getattr(layer, name, None) for layer in targets.values() for name in _ADAPTED]
    with all_or_nothing(targets.values(), values):
        for layer in targets.values():
            vars(layer).setdefault(_SOURCE, copy_values(layer, _ADAPTED))
            _stop_adapting_batches(layer)
            if mode == "batch":
                vars(layer)["forward"] = AdaptedForward(layer, prior)
        if loader is not None:
            run, collect = partial(forward or run_batch, model), layer_by_layer if sequential else in_one_pass
            with (
                in_evaluation(model),
                uncompiled(),
                passes_over(loader, max_batches, progress, "adapt", passes) as start,
            ):
                if entropy:
                    minimize_entropy(model, list(targets.values()), run, start, entropy)
                pooled = collect(list(targets.values()), run, start, partial(_set_blended, prior=prior))
        rows = [_row(path, layer, pooled.get(layer), prior, left[path]) for path, layer in layers.items()]
    summary = {"layers": len(targets), "left": len(layers) - len(targets), "mode": mode, "prior": prior}
    return model, Report("adapt", summary, rows, notes_on(model))


def reset_adaptation(model: Model) -> tuple[Model, Report]:
    """Undo :func:`adapt`: put back running statistics, γ and β, bit for bit.

    Args:
        model: A model that was adapted, or any other.

    Returns:
        The model itself, and a report with a row for each layer that was put back.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> reset_adaptation(torch.nn.BatchNorm1d(3))[1].summary
        {'layers': 0}
    """
    rows = []
    for path, layer in batch_norms_in("reset_adaptation", model).items():
        source = vars(layer).pop(_SOURCE, None)
        if source is not None:
            put_back(layer, source)
            _stop_adapting_batches(layer)
            rows.append({"path": path, "kind": type(layer).__name__})
    return model, Report("reset_adaptation", {"layers": len(rows)}, rows)


class AdaptedForward:
    """The attribute ``layer.forward`` with ``mode="batch"``: blends each batch's statistics, then calls the forward.

    A forward that someone else has set on the layer is kept, and called.
    """

    def __init__(self, layer: BatchNormBase, prior: float) -> None:
        self.layer, self.prior = layer, prior
        self.patch: Callable[..., Any] | None = vars(layer).get("forward")

    def _forward(self, *args: Any, **keywords: Any) -> Any:
        return (self.patch or partial(type(self.layer).forward, self.layer))(*args, **keywords)

    def __call__(self, x: Tensor, *args: Any, **keywords: Any) -> Any:
        """Normalize x with the blended statistics, in evaluation."""
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


def _stop_adapting_batches(layer: BatchNormBase) -> None:
    """Undo ``mode="batch"``, if the layer has it."""
    forward = vars(layer).get("forward")
    if isinstance(forward, AdaptedForward):
        del vars(layer)["forward"]
        if forward.patch is not None:
            vars(layer)["forward"] = forward.patch


def blended(source: Tensor, target: Tensor, prior: float, samples: int) -> Tensor:
    """Compute N/(N + n)·source + n/(N + n)·target."""
    share = source_weight(prior, samples)
    return source.to(target.dtype) * share + target * (1 - share) if share < 1 else source.to(target.dtype)


def source_weight(prior: float, samples: int) -> float:
    """Compute N/(N + n), the source's share."""
    return 1.0 if prior == float("inf") else prior / (prior + samples)


def _check(loader: Any, prior: Any, mode: Any, entropy: bool) -> None:
    if isinstance(prior, bool) or not isinstance(prior, int | float) or not prior >= 0:
        raise ValueError(f"adapt: prior must be a number of samples, at least 0; got {describe(prior)}")
    if mode not in ("cumulative", "batch"):
        raise ValueError(f"adapt: mode must be 'cumulative' or 'batch'; got {describe(mode)}")
    if mode == "batch" and (loader is not None or entropy):
        raise ValueError(
            "adapt: mode='batch' adapts to each batch as it comes, so it takes no loader and no entropy; leave them "
            "out, or use mode='cumulative'"
        )


def _set_blended(layer: BatchNormBase, pooled: PooledInput, prior: float) -> None:
    """Set a layer's running statistics to the source's, blended with those of its inputs."""
    if pooled.samples == 0:
        raise ValueError(f"adapt: {name_of(layer)} got no values; use where= to leave layers out")
    moments, source = pooled.moments, vars(layer)[_SOURCE]
    var = torch.where(moments.count <= 1, torch.zeros_like(moments.m2), moments.var_unbiased)
    new = {
        name: blended(source[name].to(target.device), target, prior, pooled.samples).to(source[name].dtype)
        for name, target in (("running_mean", moments.mean), ("running_var", var))
    }
    check_finite("adapt", layer, moments, *new.values())
    put_back(layer, new)


def _row(
    path: str, layer: BatchNormBase, pooled: PooledInput | None, prior: float, reason: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path": path, "kind": type(layer).__name__, "samples": None, "source weight": None, "mean drift": None,
        "variance ratio": None, "reason": reason,
    }  # fmt: skip
    if pooled is not None:
        source = vars(layer)[_SOURCE]
        assert layer.running_mean is not None and layer.running_var is not None
        row |= {"samples": pooled.samples, "source weight": source_weight(prior, pooled.samples)}
        row |= drift(layer.running_mean, layer.running_var, source["running_mean"], source["running_var"])
    return row
