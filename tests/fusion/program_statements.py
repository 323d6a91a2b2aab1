"""The statements that random programs are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

SET_UP = """
class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.bn0, self.bn1 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.bn2 = nn.BatchNorm2d(CHANNELS, affine=False)
        self.bn3 = nn.BatchNorm2d(CHANNELS, momentum=None)
        self.bn4 = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
        self.relu, self.relu_in, self.leaky = nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3)
        self.silu_in, self.elu, self.gelu = nn.SiLU(inplace=True), nn.ELU(0.7), nn.GELU()
        self.swish, self.hard, self.hard_in = Swish(), HardSwish(), HardSwish(inplace=True)
        self.same, self.drop, self.no_drop = nn.Identity(), nn.Dropout(0.5), nn.Dropout(0.0)
        self.branch, self.ends = Branch(), Ends()
        self.seq = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 1))
        self.layers = nn.ModuleList([nn.BatchNorm2d(CHANNELS), nn.Identity(), nn.ReLU()])
        self.named = nn.ModuleDict({"global": nn.BatchNorm2d(CHANNELS), "é'\\"": nn.ReLU()})
        self.steps, self.log, self.feature, self.slope, self.on = 0, [], None, 0.2, True

    def act(self, x):
        return F.relu(x) if self.on else F.silu(x)
"""
NORMS = ["self.bn0", "self.bn1", "self.bn2", "self.bn3", "self.bn4", "self.named['global']", "self.layers[0]"]
ACTIVATIONS = [
    "F.relu({a})",
    "self.relu({a})",
    "self.relu_in({a})",
    "{a}.relu()",
    "{a}.relu_()",
    "torch.relu_({a})",
    "F.relu({a}, inplace=True)",
    "F.relu({a}, True)",
    "F.relu6({a})",
    "F.leaky_relu({a}, self.slope)",
    "self.leaky({a})",
    "F.leaky_relu_({a}, 0.2)",
    "F.silu({a})",
    "self.silu_in({a})",
    "{a} * torch.sigmoid({a})",
    "{a}.mul_({a}.sigmoid())",
    "self.swish({a})",
    "self.hard({a})",
    "self.hard_in({a})",
    "torch.sigmoid({a})",
    "{a}.tanh_()",
    "F.gelu({a})",
    "self.gelu({a})",
    "F.hardtanh({a}, 0.0, 6.0)",
    "F.softplus({a})",
    "self.elu({a})",
    "F.mish({a})",
    "F.hardswish({a})",
    "self.act({a})",
    "self.named['é\\'\"']({a})",
    "{a} * torch.tanh(F.softplus({a}))",
    "F.sigmoid({a})",
]
ADDITIONS = [
    "{a} + {b}",
    "torch.add({a}, {b})",
    "{a}.add({b})",
    "{a}.add_({b})",
    "torch.add({a}, {b}, alpha=0.5)",
    "{a} + 3",
    "{a} + {b} * 0.5",
    "{a}.add_(0.5)",
    "{a} + ({b} > 0)",
    "{a} + {b}.float()",
    "{a} + {b}[:1]",
    "{a}.add({b}).relu()",
]
OTHERS = [
    "{a}",
    "{a}.view({a}.shape)",
    "{a}[...]",
    "{a}.detach()",
    "{a}.clone()",
    "{a}.contiguous()",
    "{a} * {b}",
    "{a} - {b}",
    "{a} / 6",
    "{a} * 0.5",
    "{a}.mul_(1.5)",
    "torch.cat([{a}, {b}])[: {a}.shape[0]]",
    "torch.stack([{a}, {b}]).sum(0)",
    "torch.where({a} > 0, {a}, {b})",
    "F.dropout({a}, 0.5, self.training)",
    "F.dropout({a}, 0.5, False)",
    "self.drop({a})",
    "self.no_drop({a})",
    "self.same({a})",
    "Straight.apply({a})",
    "Saving.apply({a})",
    "Halving.apply({a} * 1.0)",
    "Halving.apply({a})",
    "Turning.apply({a}) + {a} * 2",
    "Turning.apply({a})",
    "F.relu({a} + {b}).add({a})",
    "F.relu({a} + {b}) * {a}",
    "self.branch({a})['y']",
    "self.branch({a}, skip={b})['y']",
    "self.ends({a})",
    "self.seq({a})",
    "self.seq[0]({a})",
    "{a}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)",
    "checkpoint(lambda t: F.relu(self.bn1(t)), {a}, use_reentrant=False)",
    "checkpoint(lambda t: self.bn0(t), {a}, use_reentrant=False)",
    "checkpoint(lambda t: self.bn1(t), {a}, use_reentrant=True)",
    "checkpoint(F.relu, {a}, use_reentrant=False)",
    "checkpoint(F.silu, {a}, use_reentrant=True)",
    "copy.deepcopy(self.bn0)({a})",
    "F.batch_norm({a}, None, None, training=True)",
    "self.conv0.forward({a})",
    "self.bn1.forward({a})",
    "nn.Sequential(self.bn0, self.relu)({a})",
]
STATEMENTS = [
    "{a} += {b}",
    "{a} += 1.5",
    "{a}[0] += 1",
    "{a}[:, 0].mul_(0.5)",
    "{a}.view(-1)[:2].mul_(2)",
    "{a} *= 0.9",
    "self.steps += 1",
    "self.log.append(float({a}.detach().mean()))",
    "self.log.append({a}.detach().numpy().sum())",
    "self.log.append(tuple({a}.shape))",
    "self.log.append(self.bn0.running_mean.clone())",
    "self.log.append({a}.requires_grad)",
    "self.feature = {a}",
    "self.log.append(sum(float(t.sum()) for t in self.state_dict().values()))",
    "self.log.append(int(self.bn1.num_batches_tracked))",
    "mean0 = self.bn0.running_mean; self.log.append(mean0.clone())",
    "with torch.no_grad():\n    self.log.append(float(F.relu({a}).sum()))",
    "with torch.no_grad():\n    {v} = F.silu({a})",
    "with torch.no_grad():\n    {v} = self.bn1({a})",
    "with torch.no_grad():\n    {a}.mul_(1.1)",
    "if {a}.mean() > 0:\n    {v} = F.relu({a})\nelse:\n    {v} = {a} * 2",
    "if {a}.detach().sum() > 1:\n    {b}.add_(0.25)",
    "try:\n    {v} = {a}.view(7, 7, 7)\nexcept RuntimeError:\n    {v} = {a} * 1",
    "try:\n    if {a}.mean() > 0.2:\n        raise KeyError\n    {v} = self.act({a})\nexcept KeyError:\n    {v} = {a}",
    "if {a}.detach().max() > 3:\n    raise ValueError('too large')",
    "for layer in self.layers:\n    {a} = layer({a})",
    "for layer in self.seq:\n    {a} = layer({a})",
    "{v} = [F.relu(t) for t in ({a}, {b})][0]",
    "{v}, _ = {a}, {a}.sum()",
    "grads = torch.autograd.grad({a}.sum(), x, retain_graph=True, allow_unused=True) if {a}.requires_grad else None",
    "if self.on:\n    {v} = self.relu({a})\nelse:\n    {v} = {a}",
    "with torch.no_grad():\n    self.bn0.weight.mul_(1.01)",
    "self.bn1.eval()",
    "self.bn1.train(self.training)",
    "old = self.bn0.running_var\n{v} = self.bn0({a})\nself.log.append(old.clone())",
    "{a}.requires_grad and {a}.register_hook(lambda g: g * 0.5)",
    "first, second = {a}[:1], {a}[1:]",
    "del {a}\n{a} = x * 0.7",
    "{v} = (lambda t: t + {b})({a})",
]
RESULTS = [
    "{a}",
    "({a}, {b})",
    "[{a}, {b}]",
    "{{'a': {a}, 'b': [{b}]}}",
    "OrderedDict(a={a}, b={b})",
    "Pair({a}, {b})",
    "{a}.mean(), {b}",
    "({a}, None, 'text', 3)",
    "{a}.sum() * {b}",
    "self.act({a})",
    "{{'deep': ({a}, {{'er': {b}}})}}",
]
#: torch 2.13 crashes in register_hook of a view whose memory was changed through another one: no hooks beside these.
VIEWS = (".view(", "[...]", "[:1]", "[1:]", ".permute(", ".detach()", "Turning", "self.same(", "copy.")
HOOK = "register_hook(lambda g: g * 0.5)"
#: What happens to the model between two calls.
ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda m: None,
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "a layer in evaluation": lambda m: m.bn0.eval(),
    "load": lambda m: m.load_state_dict({k: v * 1.01 if v.dim() else v for k, v in m.state_dict().items()}),
    "switch": lambda m: setattr(m, "on", not m.on),
    "slope": lambda m: setattr(m.leaky, "negative_slope", m.leaky.negative_slope + 0.1),
    "beta": lambda m: setattr(m.swish, "beta", 1.5),
    "replace": lambda m: setattr(m, "relu", nn.Tanh()),
    "patch": lambda m: setattr(m.branch, "forward", lambda x, skip=None: {"y": F.silu(m.branch.norm(x))}),
    "class": lambda m: setattr(m.relu, "__class__", nn.ReLU6) if hasattr(m.relu, "inplace") else None,
    "probability": lambda m: setattr(m.drop, "p", 0.25),
    "step": lambda m: [p.data.sub_(0.01) for p in m.parameters()],
    "hook": lambda m: m.relu.register_forward_hook(lambda module, args, y: m.log.append(float(y.detach().sum()))),
    "hook on a layer": lambda m: m.bn1.register_forward_hook(lambda module, args, y: y * 2),
    "hook on a block": lambda m: m.ends.register_forward_hook(lambda module, args, y: m.log.append(type(y).__name__)),
    "backward hook": lambda m: m.ends.register_full_backward_hook(lambda *_: m.log.append("backward")),
    "freeze": lambda m: [p.requires_grad_(False) for p in m.bn0.parameters()],
}  # fmt: skip
