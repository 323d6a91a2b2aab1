"""The papers' equations in plain torch, one sequence a row, one step after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-5


def bn(x: Tensor, gamma: Tensor | float, beta: Tensor | float, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """BN(x; γ, β) over the rows of x, or with the moments given."""
    mean, var = (x.mean(0), x.var(0, correction=0)) if moments is None else moments
    return gamma * (x - mean) / (var + EPS).sqrt() + beta


def moments_at(norm: nn.Module, t: int, count: int, training: bool) -> tuple[Tensor, Tensor] | None:
    """What normalizes at step t: None for the batch. The norm has been trained on all of its steps, or on none."""
    if training and count > 1:
        return None
    row = min(t, norm.running_mean.shape[0] - 1)
    return norm.running_mean[row].clone(), norm.running_var[row].clone()


def direction(layer: nn.Module, end: str, xs: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """One layer in one direction.

    Args:
        xs: The sequences, (L_n, F) each.
        states: (N, H) each: h and, in an LSTM, c.

    Returns:
        The outputs (L_n, H), and the states after each sequence's last step.
    """
    w_ih, w_hh = getattr(layer, "weight_ih" + end), getattr(layer, "weight_hh" + end)
    zero = torch.zeros(w_ih.shape[0], dtype=w_ih.dtype)
    b_ih, b_hh = getattr(layer, "bias_ih" + end, zero), getattr(layer, "bias_hh" + end, zero)
    lstm = len(states) == 2
    recurrent = getattr(layer, "normalize", "recurrent") == "recurrent"
    norm_ih = getattr(layer, "norm_ih" + end)
    if not recurrent:  # one normalization over all steps of all sequences
        given = None if layer.training else (norm_ih.running_mean.clone(), norm_ih.running_var.clone())
        terms = bn(torch.cat(xs) @ w_ih.t(), norm_ih.weight, norm_ih.bias, given)
        inputs = list(terms.split([len(x) for x in xs]))
    now = [list(part.unbind(0)) for part in states]
    outputs: list[list[Tensor]] = [[] for _ in xs]
    for t in range(max(len(x) for x in xs)):
        runs = [n for n, x in enumerate(xs) if len(x) > t]
        h = torch.stack([now[0][n] for n in runs])
        if recurrent:
            norm_hh = getattr(layer, "norm_hh" + end)
            gx = torch.stack([xs[n][t] for n in runs]) @ w_ih.t()
            gx = bn(gx, norm_ih.weight, 0, moments_at(norm_ih, t, len(runs), layer.training))
            gh = bn(h @ w_hh.t(), norm_hh.weight, 0, moments_at(norm_hh, t, len(runs), layer.training))
        else:
            gx, gh = torch.stack([inputs[n][t] for n in runs]), h @ w_hh.t()
        if lstm:
            i, f, g, o = (gx + gh + b_ih + b_hh).chunk(4, 1)
            c = f.sigmoid() * torch.stack([now[1][n] for n in runs]) + i.sigmoid() * g.tanh()
            inside = c
            if recurrent:
                norm_c = getattr(layer, "norm_c" + end)
                inside = bn(c, norm_c.weight, norm_c.bias, moments_at(norm_c, t, len(runs), layer.training))
            new = [o.sigmoid() * inside.tanh(), c]
        else:
            (rx, zx, nx), (rh, zh, nh) = (gx + b_ih).chunk(3, 1), (gh + b_hh).chunk(3, 1)
            z = (zx + zh).sigmoid()
            new = [(1 - z) * (nx + (rx + rh).sigmoid() * nh).tanh() + z * h]
        for row, n in enumerate(runs):
            for part, values in zip(now, new, strict=True):
                part[n] = values[row]
            outputs[n].append(new[0][row])
    empty = states[0].new_zeros(0, states[0].shape[1])
    return [torch.stack(rows) if rows else empty for rows in outputs], [torch.stack(part) for part in now]


def layers(layer: nn.Module, xs: list[Tensor], states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """All layers and directions, states (L·D, N, H) each; without dropout."""
    ends = ["", "_reverse"] if layer.bidirectional else [""]
    finals = []
    for number in range(layer.num_layers):
        both = []
        for d, end in enumerate(ends):
            given = [x.flip(0) for x in xs] if d else xs
            block = number * len(ends) + d
            outputs, final = direction(layer, f"_l{number}{end}", given, [part[block] for part in states])
            both.append([y.flip(0) for y in outputs] if d else outputs)
            finals.append(final)
        xs = [torch.cat(parts, 1) for parts in zip(*both, strict=True)]
    return xs, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def randomize(layer: nn.Module, trained: bool = False) -> nn.Module:
    """Parameters of ordinary size; with ``trained`` also running statistics, as if every step had been trained on."""
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.normal_(std=0.6)
            if "norm" in name and "weight" in name:
                parameter.abs_().add_(0.3)
    if trained:
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
            else:
                buffer.fill_(3)
    return layer


def flat(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def gradients(outputs: Any, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of all outputs, with weights that depend on their place only."""
    total = torch.zeros((), dtype=torch.float64)
    for index, y in enumerate(flat(outputs)):
        place = torch.arange(1, y.numel() + 1, dtype=torch.float64) + index
        total = total + (y.double().flatten() * place.sin()).sum()
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
