"""Helpers for folding: random models, and the comparison of a folded model with the unfolded one in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn

LAYERS = {
    "Conv1d": (nn.Conv1d, 1),
    "Conv2d": (nn.Conv2d, 2),
    "Conv3d": (nn.Conv3d, 3),
    "ConvTranspose1d": (nn.ConvTranspose1d, 1),
    "ConvTranspose2d": (nn.ConvTranspose2d, 2),
    "ConvTranspose3d": (nn.ConvTranspose3d, 3),
    "Linear": (nn.Linear, 0),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomize(model: nn.Module) -> nn.Module:
    """Put the model in evaluation, with random running statistics and affine parameters."""
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -1.5, 1.5)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model.eval()


def output(model: nn.Module, *args: Any) -> Tensor:
    with torch.no_grad():
        return model(*args)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def bits(model: nn.Module) -> dict[str, Any]:
    """Everything that folding could change in a model: its tree, the identity of its parts, and its tensors' values."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = (id(module), type(module), module.training, list(module._modules))
        found[f"{path} hooks"] = tuple(len(part) for name, part in vars(module).items() if name.endswith("_hooks"))
        found[f"{path} attributes"] = set(vars(module))
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = (id(value), value.requires_grad, value.stride(), bytes(raw.tolist()))
    return found


def check_folds(model: nn.Module, *args: Tensor, into: dict[str, tuple[str, str]] | None = None) -> kn.Report:
    """Check that a float64 model folds into the layers ``into``, and that its output stays."""
    expected, before = output(copy.deepcopy(model), *args), bits(model)
    new, report = kn.fold(model, args)
    assert bits(model) == before
    assert relative(output(new, *args), expected) <= 1e-10
    folded = {row["path"]: (row["into"], row["where"]) for row in report.rows if row["into"]}
    left = {path for path, module in new.named_modules() if isinstance(module, _BatchNorm)}
    assert left == {row["path"] for row in report.rows} - set(folded)
    if into is None:
        assert not left, report
    else:
        assert folded == into, report
    assert all(bool(row["reason"]) != bool(row["into"]) for row in report.rows)
    assert report.summary["folded"] == len(folded)
    assert report.summary["left"] == len(left)
    assert type(new) is type(model)
    return report


def reason(model: nn.Module, *args: Any, path: str | None = None) -> str:
    """The reason why a batch norm is left, after checking that the model and its outputs stay."""
    expected = output(model, *args)
    before = bits(model)
    new, report = kn.fold(model, args)
    assert bits(model) == before
    [row] = [row for row in report.rows if path is None or row["path"] == path]
    assert row["into"] == ""
    assert row["where"] == ""
    assert row["difference"] is None
    assert relative(output(new, *args), expected) <= 1e-5
    return row["reason"]
