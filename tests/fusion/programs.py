"""Random modules: Python forwards as people write them, made from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from fusion.program_parts import NAMESPACE
from fusion.program_statements import (
    ACTIONS,
    ACTIVATIONS,
    ADDITIONS,
    HOOK,
    NORMS,
    OTHERS,
    RESULTS,
    SET_UP,
    STATEMENTS,
    VIEWS,
)
from torch import nn


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
        ACTIONS[self.actions[call]](model)

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
            text = f"{v} = {chance.choice(NORMS)}({a})"
            follows = chance.random()
            if follows < 0.7:  # and at once what may be fused
                names.append(v)
                indented(text)
                a, v = v, f"v{len(names)}"
                form = chance.choice(ACTIVATIONS if follows < 0.45 else ADDITIONS)
                text = f"{v} = " + form.format(a=a, b=chance.choice(names))
                if follows > 0.6:
                    names.append(v)
                    indented(text)
                    a, v = v, f"v{len(names)}"
                    text = f"{v} = " + chance.choice(ACTIVATIONS).format(a=a)
        elif kind < 0.6:
            text = f"{v} = " + chance.choice(ACTIVATIONS).format(a=a)
        elif kind < 0.7:
            text = f"{v} = " + chance.choice(ADDITIONS).format(a=a, b=b)
        elif kind < 0.84:
            text = f"{v} = " + chance.choice(OTHERS).format(a=a, b=b)
        else:
            text = chance.choice(STATEMENTS).format(a=a, b=b, v=v)
        indented(text)
        if f"{v} = " in text or f"{v}, " in text:
            names.append(v)
        if chance.random() < 0.03:
            indented(f"if {names[-1]}.detach().mean() > 0.3:\n    return {names[-1]}")
    a, b = names[-1], chance.choice(names)
    indented("return " + chance.choice(RESULTS).format(a=a, b=b))
    start = "        x = x * 1.0\n" if chance.random() < 0.8 else ""
    if any(view in line for view in VIEWS for line in lines):
        lines = [line.replace(HOOK, "is_leaf") for line in lines]
    source = SET_UP + "\n    def forward(self, x):\n" + start + "\n".join(lines) + "\n"
    actions = ["nothing"] * 3 + [chance.choice(list(ACTIONS)) for _ in range(calls - 3)]
    if chance.random() < 0.3:
        actions[0] = "eval"
    return Program(seed, source, actions, [chance.random() < 0.85 for _ in range(calls)])
