"""Random modules: Python forwards as people write them, made from a seed."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 3
Pair = namedtuple("Pair", "first second")


class Straight(torch.autograd.Function):
    """Rounds, and hands the gradient on."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.5


class Saving(torch.autograd.Function):
    """Squares, from what it has saved of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


class Turning(torch.autograd.Function):
    """Looks at its argument, hands it on, and turns the gradient round."""

    @staticmethod
    def forward(ctx, x):
        ctx.least = float(x.min())
        return x

    @staticmethod
    def backward(ctx, dy):
        return -dy


class Halving(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(0.5)

    @staticmethod
    def backward(ctx, dy):
        return dy * 0.5


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x) if self.beta != 1.0 else x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x * F.relu6(x + 3.0, inplace=self.inplace) / 6.0


class Branch(nn.Module):
    """A block of its own, with an answer in a dictionary."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        self.calls = 0

    def forward(self, x, skip=None):
        self.calls += 1
        y = self.norm(self.conv(x))
        if skip is not None:
            y += skip
        return {"y": self.act(y), "calls": self.calls}


class Ends(nn.Module):
    """Ends with a batch norm, which whoever calls it fuses."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.features = None

    def forward(self, x):
        self.features = self.body(x)
        return self.features


NAMESPACE = {
    "torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint, "OrderedDict": OrderedDict, "Pair": Pair,
    "Swish": Swish, "HardSwish": HardSwish, "Branch": Branch, "Ends": Ends, "Straight": Straight,
    "Saving": Saving, "Halving": Halving, "Turning": Turning,
    "CHANNELS": CHANNELS, "copy": __import__("copy"),
}  # fmt: skip

_SET_UP = """
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

_NORMS = ["self.bn0", "self.bn1", "self.bn2", "self.bn3", "self.bn4", "self.named['global']", "self.layers[0]"]
_ACTIVATIONS = [
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
_ADDITIONS = [
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
_OTHERS = [
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
_STATEMENTS = [
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
_RESULTS = [
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
_VIEWS = (".view(", "[...]", "[:1]", "[1:]", ".permute(", ".detach()", "Turning", "self.same(", "copy.")
_HOOK = "register_hook(lambda g: g * 0.5)"
#: What happens to the model between two calls.
_ACTIONS: dict[str, Callable[[nn.Module], Any]] = {
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


@dataclass
class Program:
    """A random module and what is done to it.

    Args:
        seed: What it was made from.
        source: The class, as text.
        actions: Before each call.
        graph: Whether each call records gradients.
    """

    seed: int
    source: str
    actions: list[str] = field(default_factory=list)
    graph: list[bool] = field(default_factory=list)

    def make(self) -> nn.Module:
        """The module, equal at every call."""
        space = dict(NAMESPACE)
        exec(self.source, space)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = space["Program"]().double()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.3)
        return model

    def act(self, model: nn.Module, call: int) -> None:
        """Do what is done before a call."""
        _ACTIONS[self.actions[call]](model)

    def __str__(self) -> str:
        return f"seed {self.seed}\n{self.source}\nbefore the calls: {self.actions}\nrecorded: {self.graph}"


def program(seed: int, calls: int = 7) -> Program:
    """The program of a seed."""
    chance = random.Random(seed)
    names = ["x"]
    lines: list[str] = []

    def indented(text: str) -> None:
        lines.extend("        " + line for line in text.split("\n"))

    for _ in range(chance.randint(3, 9)):
        # What was made last is what is most often used next.
        a = names[-1] if chance.random() < 0.65 else chance.choice(names)
        b, v = chance.choice(names), f"v{len(names)}"
        kind = chance.random()
        if kind < 0.12:
            text = f"{v} = {chance.choice(['self.conv0', 'self.conv1'])}({a})"
        elif kind < 0.5:
            text = f"{v} = {chance.choice(_NORMS)}({a})"
            follows = chance.random()
            if follows < 0.7:  # and at once what may be fused
                names.append(v)
                indented(text)
                a, v = v, f"v{len(names)}"
                form = chance.choice(_ACTIVATIONS if follows < 0.45 else _ADDITIONS)
                text = f"{v} = " + form.format(a=a, b=chance.choice(names))
                if follows > 0.6:
                    names.append(v)
                    indented(text)
                    a, v = v, f"v{len(names)}"
                    text = f"{v} = " + chance.choice(_ACTIVATIONS).format(a=a)
        elif kind < 0.6:
            text = f"{v} = " + chance.choice(_ACTIVATIONS).format(a=a)
        elif kind < 0.7:
            text = f"{v} = " + chance.choice(_ADDITIONS).format(a=a, b=b)
        elif kind < 0.84:
            text = f"{v} = " + chance.choice(_OTHERS).format(a=a, b=b)
        else:
            text = chance.choice(_STATEMENTS).format(a=a, b=b, v=v)
        indented(text)
        if f"{v} = " in text or f"{v}, " in text:
            names.append(v)
        if chance.random() < 0.03:
            indented(f"if {names[-1]}.detach().mean() > 0.3:\n    return {names[-1]}")
    a, b = names[-1], chance.choice(names)
    indented("return " + chance.choice(_RESULTS).format(a=a, b=b))
    start = "        x = x * 1.0\n" if chance.random() < 0.8 else ""
    if any(view in line for view in _VIEWS for line in lines):
        lines = [line.replace(_HOOK, "is_leaf") for line in lines]
    source = _SET_UP + "\n    def forward(self, x):\n" + start + "\n".join(lines) + "\n"
    actions = ["nothing"] * 3 + [chance.choice(list(_ACTIONS)) for _ in range(calls - 3)]
    if chance.random() < 0.3:
        actions[0] = "eval"
    return Program(seed, source, actions, [chance.random() < 0.85 for _ in range(calls)])
