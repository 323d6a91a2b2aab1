"""Stand-ins for layers of packages that are not installed, written from what those layers compute."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's layer: normalization, dropout and activation in one module, with a batch norm's state_dict."""

    def __init__(self, num_features, eps=1e-5, apply_act=True, act_layer=nn.ReLU, inplace=True, drop_layer=None):
        super().__init__(num_features, eps)
        self.drop = drop_layer() if drop_layer is not None else nn.Identity()
        given = {"inplace": True} if inplace and act_layer is not nn.PReLU else {}
        self.act = act_layer(**given) if apply_act else nn.Identity()

    def forward(self, x):
        assert x.ndim == 4
        return self.act(self.drop(super().forward(x)))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """timm's synchronized layer, to which timm's own conversion adds ``drop`` and ``act``."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "drop"):
            x = self.drop(x)
        return self.act(x) if hasattr(self, "act") else x


class FixedByFormula(nn.Module):
    """torchvision's layer: buffers only, and a product and a sum with torch's type promotion."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def affine(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FixedByFunction(FixedByFormula):
    """detectron2's layer: torch's function in evaluation."""

    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class FixedAct(FixedByFormula):
    """timm's frozen layer."""

    def __init__(self, num_features, eps=1e-5, act_layer=nn.ReLU):
        super().__init__(num_features, eps)
        self.drop, self.act = nn.Identity(), act_layer()

    def forward(self, x):
        return self.act(self.drop(self.affine(x)))


#: By module and name of the real ones.
CLASSES = {
    ("timm.layers.norm_act", "BatchNormAct2d"): BatchNormAct2d,
    ("timm.layers.norm_act", "SyncBatchNormAct"): SyncBatchNormAct,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): FixedAct,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): FixedByFormula,
    ("detectron2.layers.batch_norm", "FrozenBatchNorm2d"): FixedByFunction,
}


def load(monkeypatch):
    """Make modules with the packages' names that have the stand-ins, and return these."""
    made = {}
    for (module, name), kind in CLASSES.items():
        parts = module.split(".")
        for package in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        copied = type(name, (kind,), {"__module__": module, "__qualname__": name, "forward": vars(kind)["forward"]})
        monkeypatch.setattr(sys.modules[module], name, copied, raising=False)
        made[f"{module.partition('.')[0]} {name}"] = copied
    return made
