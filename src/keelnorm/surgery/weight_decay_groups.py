"""Parameter groups for an optimizer: with weight decay and without."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from keelnorm.engine.error_messages import check_module, describe
from keelnorm.engine.torch_internals import NormBase

_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
#: Class names of normalizations that are not derived from torch's, such as LlamaRMSNorm and LayerNorm2d.
_NAMED_NORM = re.compile(r"Norm(\dd)?$")


def param_groups(
    model: nn.Module, weight_decay: float, *, norm: bool = False, bias: bool = False
) -> list[dict[str, Any]]:
    """Split the parameters into two groups for an optimizer: with weight decay and without.

    γ and β of normalizations and all biases go without. The scale of a layer before a batch norm does not matter, so
    decay of its weights changes only the effective step size; decay of γ and β pulls the function itself towards zero.

    A normalization is a batch, instance, layer, group or RMS norm of ``torch.nn``, a subclass of one (as all of
    keelnorm's layers are), or a module whose class name ends with ``Norm``, ``Norm1d``, ``Norm2d`` or ``Norm3d``. Its
    own parameters count, parametrized ones included, and not its children's. A bias is a parameter with the word "bias"
    in its name: ``bias``, ``bias_ih_l0``, ``in_proj_bias``.

    Args:
        model: Any module, also wrapped (``DistributedDataParallel``, ``torch.compile``).
        weight_decay: Weight decay of the first group, a finite number of at least 0; the second has 0.
        norm: Whether γ and β of normalizations decay too.
        bias: Whether all other biases decay too.

    Returns:
        One or two dicts, with "params", "param_names" (their paths, which optimizers keep in their state_dict) and
        "weight_decay"; an empty group is left out. Each parameter that requires a gradient is in one of them, once,
        under its first path, in the model's order.

    Differs:
        A group that is added to the optimizer later needs names as well, as torch demands: ``[("path", parameter)]``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``weight_decay`` is not legal, or a parameter of a lazy module has no shape yet.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> groups = param_groups(model, weight_decay=0.05)
        >>> [(group["param_names"], group["weight_decay"]) for group in groups]
        [(['0.weight'], 0.05), (['0.bias', '1.weight', '1.bias'], 0.0)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    Source:
        van Laarhoven (2017), "L2 Regularization versus Batch and Weight Normalization", arXiv:1706.05350; He, Zhang,
        Zhang, Zhang, Xie, Li (2018), "Bag of Tricks for Image Classification with Convolutional Neural Networks",
        arXiv:1812.01187, section 3.1 ("No bias decay").
    """
    what = "param_groups"
    check_module(what, model)
    is_number = isinstance(weight_decay, int | float) and not isinstance(weight_decay, bool)
    if not is_number or not 0 <= weight_decay < math.inf:
        raise ValueError(f"{what}: weight_decay must be a finite number of at least 0; got {describe(weight_decay)}")
    groups: list[dict[str, Any]] = [
        {"params": [], "param_names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)
    ]
    for path, parameter in model.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ValueError(f"{what}: {path!r} has no shape yet; run the lazy model once first")
        if parameter.requires_grad:
            module, name = _owner(model, path)
            decays = norm if _is_norm(module) else bias or "bias" not in name.split("_")
            group = groups[0 if decays else 1]
            group["params"].append(parameter)
            group["param_names"].append(path)
    return [group for group in groups if group["params"]]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that uses a parameter, and the parameter's name there, also if it is parametrized."""
    owner, parametrized, rest = f".{path}".rpartition(".parametrizations.")
    if parametrized:
        return model.get_submodule(owner.removeprefix(".")), rest.partition(".")[0]
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or _NAMED_NORM.search(type(module).__name__) is not None
