"""What faults need to be put in: a model's batch norms, passes in training mode, what stands in front of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.doctor.fault import Batch, Patient


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model and their paths, in the order of registration."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}


def norm_at(patient: Patient, path: str) -> _BatchNorm:
    """The batch norm at a path."""
    norm = patient.model.get_submodule(path)
    assert isinstance(norm, _BatchNorm)
    return norm


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@torch.no_grad()
def track(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Passes batches through a model in its present mode, so that its batch norms update their statistics."""
    for images, _ in batches:
        model(images)


def refit(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Estimates the statistics anew, as long training on such batches would: the mean over the batches."""
    norms = norms_of(model)
    momenta = {path: norm.momentum for path, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    track(model, batches)
    for path, norm in norms.items():
        norm.momentum = momenta[path]


def sgd(patient: Patient, params: Iterable[nn.Parameter], weight_decay: float | None = None) -> torch.optim.SGD:
    """An optimizer with the settings of the patient's for other parameters."""
    group = patient.optimizer.param_groups[0]
    decay = group.get("weight_decay", 0.0) if weight_decay is None else weight_decay
    return torch.optim.SGD(params, lr=group["lr"], momentum=group.get("momentum", 0.9), weight_decay=decay)


def step_loss(patient: Patient) -> Callable[[nn.Module, Batch], Tensor]:
    """The patient's loss as a function of the model and a batch."""
    loss = patient.loss
    if not isinstance(loss, nn.Module):
        return loss
    return lambda model, batch: loss(model(batch[0]), batch[1])


def beginning_at(path: str, model: nn.Module) -> Iterator[str]:
    """The paths of all batch norms, beginning at one of them and going round."""
    paths = list(norms_of(model))
    start = paths.index(path)
    yield from paths[start:] + paths[:start]


def feeding_conv(patient: Patient, path: str) -> tuple[str, nn.Conv2d]:
    """The path of a batch norm whose input is the output of a convolution, and that; the given path if it is one."""
    model = patient.model
    feeds: dict[str, nn.Conv2d] = {}
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    names = {id(norm): name for name, norm in norms_of(model).items()}

    def after_conv(conv: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        outputs[id(output)] = (conv, output)  # the output is kept, so that its id stays its own

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            feeds[names[id(norm)]] = outputs[id(inputs[0])][0]

    handles = [m.register_forward_hook(after_conv) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms_of(model).values()]
    model.eval()
    track(model, [(patient.batches[0][0][:2], patient.batches[0][1][:2])])
    model.train()
    for handle in handles:
        handle.remove()
    found = next(candidate for candidate in beginning_at(path, model) if candidate in feeds)
    return found, feeds[found]


def pair_of(patient: Patient, path: str) -> tuple[str, str]:
    """Two batch norms of the same size: that at the path if there is such a pair, and the one that differs most."""
    norms = norms_of(patient.model)
    for first in beginning_at(path, patient.model):
        size = norms[first].num_features
        others = [other for other in norms if other != first and norms[other].num_features == size]
        if others:
            return first, max(others, key=lambda other: _difference(norms[first], norms[other]))
    raise ValueError("the model has no two batch norms of the same size")


def _difference(one: _BatchNorm, other: _BatchNorm) -> float:
    """How much the logarithms of two batch norms' variances differ."""
    assert one.running_var is not None and other.running_var is not None
    return float((one.running_var.clamp_min(1e-8).log() - other.running_var.clamp_min(1e-8).log()).abs().mean())


def dull(images: Tensor) -> Tensor:
    """Images of another domain: grey, of low contrast and brighter, as X-rays or pictures in fog."""
    return images.mean(1, keepdim=True).expand_as(images) * 0.4 + 0.8
