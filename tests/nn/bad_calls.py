"""Random calls of every public layer and function with wrong arguments, settings and buffers."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion.expectations import ATTRIBUTE
from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm

C, N, STEPS = 3, 4, 5
#: What a call may raise.
USUAL = (TypeError, ValueError, RuntimeError)
INF, NAN = float("inf"), float("nan")

#: How each layer is made.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: kn.BatchNorm(C),
    "BatchNorm1d": lambda: kn.BatchNorm1d(C),
    "BatchNorm2d": lambda: kn.BatchNorm2d(C, too_few="running"),
    "BatchNorm3d": lambda: kn.BatchNorm3d(C, too_few="skip"),
    "SyncBatchNorm": lambda: kn.SyncBatchNorm(C),
    "BatchRenorm": lambda: kn.BatchRenorm(C, r_max=2.0, d_max=1.0),
    "classes": lambda: kn.ConditionalBatchNorm(C, num_classes=2),
    "embedding": lambda: kn.ConditionalBatchNorm(
        C, embedding_dim=2, modulation=nn.Sequential(nn.Linear(2, 2 * C), nn.BatchNorm1d(2 * C))
    ),
    "CrossIterationBatchNorm": lambda: kn.CrossIterationBatchNorm(C, compensate=False),
    "compensating": lambda: kn.CrossIterationBatchNorm(C).attach(nn.Linear(2, C)),
    "DomainBatchNorm": lambda: kn.DomainBatchNorm(C, ["a", "b"], share_affine=False),
    "pooled ghosts": lambda: kn.GhostBatchNorm(C, 2),
    "ghosts in sequence": lambda: kn.GhostBatchNorm(C, 3, update="sequential"),
    "L1BatchNorm": lambda: kn.L1BatchNorm(C),
    "MovingAverageBatchNorm": lambda: kn.MovingAverageBatchNorm(C, burn_in=0),
    "RangeBatchNorm": lambda: kn.RangeBatchNorm(C),
    "SplitBatchNorm": lambda: kn.SplitBatchNorm(C),
    "VirtualBatchNorm": lambda: kn.VirtualBatchNorm(C),
    "WhiteningBatchNorm": lambda: kn.WhiteningBatchNorm(C, group_size=1),
    "StepwiseBatchNorm": lambda: StepwiseBatchNorm(C, max_length=2),
    "LSTM": lambda: kn.BatchNormLSTM(C, 2, num_layers=2, max_length=2),
    "GRU": lambda: kn.BatchNormGRU(C, 2, num_layers=2, normalize="input", batch_first=True),
    "LSTMCell": lambda: kn.BatchNormLSTMCell(C, 2, max_length=2),
    "GRUCell": lambda: kn.BatchNormGRUCell(C, 2),
    "Sequential": lambda: kn.Sequential(kn.BatchNorm(C), nn.ReLU()),
}
FUNCTIONS = ("batch_norm", "moments", "length_mask")


class Draw(random.Random):
    """Random values, many of them wrong."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Seeded by this generator, whatever the dtype."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        return torch.randn(shape, generator=generator).to(dtype)

    def spoiled(self, x: Tensor) -> Any:
        """Something else in the place of a tensor."""
        kinds: list[Callable[[], Any]] = [
            lambda: None,
            lambda: 1.5,
            lambda: "x",
            lambda: [1.0, 2.0],
            lambda: x.numpy(),
            lambda: x[:, :1] if x.dim() > 1 else x[:1],
            lambda: x[:1],
            lambda: x[:0],
            lambda: x.unsqueeze(-1),
            lambda: x.flatten(),
            lambda: torch.tensor(1.0),
            lambda: x.double(),
            lambda: x.half(),
            lambda: x.int(),
            lambda: x.bool(),
            lambda: x + 0j,
            lambda: x.to("meta"),
            lambda: x.to_sparse(),
            lambda: x.to_mkldnn(),
            lambda: torch.nested.nested_tensor([x[:1], x[:1]]),
            lambda: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged) if x.dim() > 1 else x,
            lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            lambda: x.expand(2, *x.shape),
            lambda: x[..., :1].expand(x.shape) if x.dim() else x,
            lambda: x.T if x.dim() == 2 else x.movedim(0, -1),
            lambda: torch.full_like(x, NAN),
            lambda: torch.full_like(x, 1e38),
            lambda: -x,
            lambda: x.clone().requires_grad_(),
            lambda: x.clone().requires_grad_() * 1,
            lambda: _inference(x),
            lambda: nn.Parameter(x.clone()),
            lambda: np.float64(2.0),
        ]
        with warnings.catch_warnings():
            # A complex tensor that is spoiled again loses its imaginary part here; a layer may not do so in silence.
            warnings.simplefilter("ignore")
            try:
                return self.choice(kinds)()
            except (RuntimeError, IndexError, TypeError):  # torch makes no such tensor of this dtype
                return None

    def maybe_spoiled(self, x: Tensor, chance: float) -> Any:
        return self.spoiled(x) if self.random() < chance else x


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def arguments_of(draw: Draw, name: str, shape: tuple[int, ...], bad: float) -> dict[str, Any]:
    """The keywords of a call. ``bad``: how probable it is that an argument is spoiled."""
    x = draw.maybe_spoiled(draw.tensor(*shape), bad)
    keywords: dict[str, Any] = {"input": x}

    def sometimes(key: str, chance: float, legal: Callable[[], Any], wrong: list[Any]) -> None:
        if draw.random() < chance:
            keywords[key] = draw.choice(wrong) if wrong and draw.random() < 2 * bad else legal()

    tokens = [None, "x", -1, 7, 1.5, NAN, True, [], {}, torch.ones(2)]
    if name in ("LSTM", "GRU", "LSTMCell", "GRUCell"):
        sizes = (N, 2) if "Cell" in name else (2, N, 2)
        state = (draw.tensor(*sizes), draw.maybe_spoiled(draw.tensor(*sizes), bad))
        sometimes("hx", 0.5, lambda: state if "LSTM" in name else state[1], tokens)
        if "Cell" in name:
            sometimes("step", 0.95, lambda: draw.randrange(4), tokens)
        else:
            steps = (N, STEPS) if name == "GRU" else (STEPS, N)
            sometimes("lengths", 0.2, lambda: [draw.randrange(STEPS + 1) for _ in range(N)], tokens)
            sometimes("mask", 0.2, lambda: draw.maybe_spoiled(draw.tensor(*steps), bad), [draw.tensor(*steps) > 0])
        return keywords
    if name == "Sequential":
        return keywords
    positions = (shape[0], *shape[2:])
    sometimes("residual", 0.3, lambda: draw.maybe_spoiled(draw.tensor(*shape), 2 * bad), [])
    sometimes("activation", 0.4, lambda: draw.choice(["relu", "silu", nn.ELU(), "leaky_relu"]), [*tokens, nn.PReLU()])
    sometimes("inplace", 0.15, lambda: True, [])
    masks = [draw.tensor(*shape) > 0, draw.tensor(*positions), torch.zeros(positions, dtype=torch.bool), "x"]
    masks.append(torch.arange(N) == 1)
    sometimes("mask", 0.25, lambda: draw.tensor(*draw.choice([positions, shape[:1]])) > 0, masks)
    weights = [torch.full(positions, value) for value in (-1.0, NAN, INF, 0.0)]
    sometimes("sample_weight", 0.15, lambda: draw.tensor(*positions).abs() + 1, [*tokens, *weights])
    sometimes("padding", 0.15, lambda: draw.choice(["zero", "keep"]), tokens)
    labels = torch.tensor([0, 1, 1, 0][: shape[0]])
    extra = {
        "classes": ("condition", [labels, draw.tensor(shape[0], 2)], [labels + 1, labels - 1, labels.int(), *tokens]),
        "embedding": ("condition", [draw.tensor(shape[0], 2)], [draw.tensor(shape[0], 3), labels, *tokens]),
        "DomainBatchNorm": ("domain", ["a", 1, labels], ["c", 2, labels + 1, labels[:1], *tokens]),
        "StepwiseBatchNorm": ("step", [0, 1, 3], tokens),
        "compensating": ("producer_weight", [draw.tensor(C, 2)], [draw.tensor(2, C), *tokens]),
    }.get(name)
    if extra is not None:
        key, legal, wrong = extra
        sometimes(key, 0.9, lambda: draw.choice(legal), wrong)
    if draw.random() < bad / 4:
        keywords[draw.choice(["x", "domains", "too_few", "hx"])] = 1
    return keywords


def spoil(draw: Draw, layer: nn.Module) -> None:
    """Change a setting or a tensor of a layer, or of one inside it, to what it should not be."""
    norms = [module for module in layer.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norm = draw.choice(norms)
    name = draw.choice(
        ["eps", "momentum", "running_mean", "running_var", "num_batches_tracked", "weight", "bias", "mode"]
    )
    if name == "mode":
        if draw.random() < 0.5:
            layer.eval()
        else:
            norm.track_running_stats = False
        return
    if name in ("eps", "momentum"):
        setattr(norm, name, draw.choice([-1.0, 0.0, NAN, INF, None, "x", 1, torch.tensor(0.1), True]))
        return
    value = getattr(norm, name)
    if value is None:
        return
    new = draw.spoiled(value.detach().clone())
    if isinstance(value, nn.Parameter):
        legal = isinstance(new, Tensor) and new.is_floating_point() and not new.is_nested and not new.is_inference()
        new = nn.Parameter(new) if legal else None
    if new is None or isinstance(new, Tensor):
        setattr(norm, name, new)


def state_of(*roots: Any) -> list[Any]:
    """All that a call might have changed in modules and tensors: values bit by bit, and attributes."""
    found: list[Any] = []
    for root in roots:
        if isinstance(root, nn.Module):
            for path, module in root.named_modules():
                owned = (vars(module), module._parameters, module._buffers)
                kept = [(name, value) for part in owned for name, value in part.items() if name != ATTRIBUTE]
                found += [(path, name, _frozen(value)) for name, value in kept]
        else:
            found.append(_frozen(root))
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout is not torch.strided or value.is_quantized:
            return id(value)
        packed = value.detach().clone(memory_format=torch.contiguous_format).view(-1)
        return id(value), value.requires_grad, tuple(value.shape), packed.view(torch.uint8).tolist()
    if isinstance(value, deque | list | tuple):
        return [_frozen(item) for item in value]
    if isinstance(value, kn.Moments):
        return [_frozen(item) for item in vars(value).values()]
    if isinstance(value, dict):
        return [(name, id(item)) for name, item in value.items()]
    return id(value)


def shape_of(draw: Draw, name: str) -> tuple[int, ...]:
    ranks = {"BatchNorm1d": (2, 3), "BatchNorm2d": (4,), "BatchNorm3d": (5,), "StepwiseBatchNorm": (2,)}
    if name in ("LSTM", "GRU"):
        return (N, STEPS, C) if name == "GRU" else (STEPS, N, C)
    if "Cell" in name:
        return (N, C)
    rank = draw.choice(ranks.get(name, (2, 3, 4)))
    return (draw.choice([N, N, N, 1]), C, *[draw.choice([1, 2]) for _ in range(rank - 2)])


def layer_call(seed: int) -> tuple[str, Callable[[], Any], list[Any]]:
    """What is called, the call, and what it may not change if it raises."""
    draw = Draw(seed)
    name = draw.choice(list(LAYERS))
    layer = LAYERS[name]()
    bad = draw.choice([0.0, 0.1, 0.4])
    shape = shape_of(draw, name)
    _warm_up(draw, name, layer, shape)
    for _ in range(draw.choice([0, 1, 1, 2])):
        spoil(draw, layer)
    keywords = arguments_of(draw, name, shape, bad)
    told = f"{name}: {layer}, { ({key: _short(value) for key, value in keywords.items()}) }"
    return told, _in_mode(draw, lambda: layer(**keywords)), [layer, keywords["input"], keywords.get("residual")]


def function_call(seed: int) -> tuple[str, Callable[[], Any], list[Any]]:
    """As :func:`layer_call`, of a function."""
    draw = Draw(seed)
    name = draw.choice(FUNCTIONS)
    shape, bad = shape_of(draw, "BatchNorm"), draw.choice([0.1, 0.4])
    if name == "length_mask":
        given = [draw.maybe_spoiled(torch.tensor([1, 3, 0]), bad), draw.choice([3, 2, -1, "x", None])]
        return f"{name}{given}", lambda: kn.functional.length_mask(*given), []
    if name == "moments":
        given = [draw.maybe_spoiled(draw.tensor(*shape), bad), draw.choice([None, draw.tensor(*shape) > 0, "x"])]
        return f"{name}{given}", lambda: kn.functional.moments(*given), []
    keywords = arguments_of(draw, "function", shape, bad)
    for key in ("running_mean", "running_var", "weight", "bias"):
        keywords[key] = draw.maybe_spoiled(draw.tensor(C).abs() + 0.5, bad / 2)
    keywords["training"] = draw.random() < 0.7
    for key in ("momentum", "eps"):
        if draw.random() < bad:
            keywords[key] = draw.choice([-1.0, 0.0, NAN, INF, None, "x", 1])
    told = f"{name}: { ({key: _short(value) for key, value in keywords.items()}) }"
    return told, _in_mode(draw, lambda: kn.functional.batch_norm(**keywords)), list(keywords.values())


def _warm_up(draw: Draw, name: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    """A layer that has seen a batch has more to lose."""
    if isinstance(layer, kn.VirtualBatchNorm) and draw.random() < 0.9:
        layer.set_reference(draw.tensor(N, *shape[1:]))
    if name != "compensating" and draw.random() < 0.5:
        keywords = arguments_of(Draw(draw.randrange(2**31)), name, shape, 0.0)
        try:
            layer(**keywords)
        except USUAL:
            return


def _in_mode(draw: Draw, call: Callable[[], Any]) -> Callable[[], Any]:
    mode, kernels = draw.choice([None, None, None, torch.no_grad, torch.inference_mode]), draw.random() < 0.2

    def run() -> Any:
        with ExitStack() as stack:
            if kernels:
                stack.enter_context(kn.kernels.use("reference"))
            if mode is not None:
                stack.enter_context(mode())
            return call()

    return run


def _short(value: Any) -> Any:
    if isinstance(value, Tensor):
        kind = "nested" if value.is_nested else f"{tuple(value.shape)}"
        flags = "".join(flag for flag, on in (("g", value.requires_grad), ("i", value.is_inference())) if on)
        return f"<{value.dtype} {value.layout} {kind} {flags}>"
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value
