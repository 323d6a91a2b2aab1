"""A call that raises leaves everything as it was, whatever was wrong; and it raises what a caller expects.

``CALL_FUZZ=100000`` makes that many calls; ``CALL_FUZZ_SEED`` begins at a seed, such as that of a failure.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter

import pytest
import torch
from nn.bad_calls import LAYERS, USUAL, function_call, layer_call, state_of
from torch import nn

import keelnorm as kn
from keelnorm.engine.rollback import Unchanged

CALLS = int(os.environ.get("CALL_FUZZ", "1600"))
FRESH = int(os.environ.get("CALL_FUZZ_SEED") or random.SystemRandom().randrange(10**9))
#: What torch warns of when such tensors are made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


def told_of(make: object, seed: int, seen: Counter[str]) -> str | None:
    """What is wrong with one call; None where nothing is."""
    what, call, watched = make(seed)
    before = state_of(*watched)
    try:
        call()
    except USUAL as error:
        seen[type(error).__name__] += 1
        if state_of(*watched) != before:
            return f"{what}\nchanged something, and raised {type(error).__name__}: {error}"
    except Exception as error:
        return f"{what}\nraised {type(error).__name__}: {error}"
    else:
        seen["answered"] += 1
    return None


@pytest.mark.parametrize("first", [0, FRESH], ids=["the same seeds", "fresh seeds"])
@pytest.mark.parametrize("make", [layer_call, function_call], ids=["layers", "functions"])
def test_calls(make: object, first: int) -> None:
    seen: Counter[str] = Counter()
    number = CALLS // (2 if make is layer_call else 8)
    for seed in range(first, first + number):
        told = told_of(make, seed, seen)
        assert told is None, f"CALL_FUZZ_SEED={seed}\n{told}"
    assert min(seen["answered"], seen["TypeError"], seen["ValueError"]) > number / 20


def test_the_fuzz_sees_what_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unchanged, "__exit__", lambda *_: None)
    assert any(told_of(layer_call, seed, Counter()) for seed in range(100))


def refused(layer: torch.nn.Module, call: object, words: str) -> None:
    before = state_of(layer)
    with pytest.raises(RuntimeError, match=words):
        call()
    assert state_of(layer) == before


#: Ways of a call through the engine: with the kernels, with a mask, with weights in plain torch.
WAYS = {
    "plain": {}, "mask": {"mask": torch.tensor([True, True, True, False])}, "weights": {"sample_weight": torch.ones(4)},
    "both": {"mask": torch.tensor([True, True, True, False]), "sample_weight": torch.ones(4)},
    "importance": {"sample_weight": torch.ones(4), "weighting": "importance"},
}  # fmt: skip
SPOILED = {
    "short": lambda value: value[:1].clone(), "column": lambda value: value.unsqueeze(-1).clone(),
    "integers": torch.Tensor.int, "bool": torch.Tensor.bool, "complex": lambda value: value + 0j,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_vectors_are_checked_on_every_way(way: str, name: str, training: bool, backend: str) -> None:
    """A vector of another shape would broadcast, and one of another kind would be converted, without a word."""
    for kind, spoil in SPOILED.items():
        layer = kn.BatchNorm1d(3).train(training)
        value = spoil(getattr(layer, name).detach())
        setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in ("weight", "bias") else value)
        before = state_of(layer)
        with pytest.raises((TypeError, ValueError), match=f"BatchNorm1d: .*{name}"):
            layer(torch.randn(4, 3), **WAYS[way])
        assert state_of(layer) == before, kind


@pytest.mark.parametrize("update", ["pooled", "sequential"])
@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_ghosts_on_inference_tensors(name: str, update: str, backend: str) -> None:
    """The backward can't keep them, which is known before anything is counted."""
    layer = kn.GhostBatchNorm(3, 2, update=update)
    with torch.inference_mode():
        made = torch.randn(4, 3)
    x, residual = torch.randn(4, 3, requires_grad=name != "x"), None
    if name == "x":
        x = made
    elif name == "residual":
        residual = made
    else:
        layer.weight = torch.nn.Parameter(made[0], requires_grad=False)
    refused(layer, lambda: layer(x, residual, activation="silu"), "inference")


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("kind", sorted(LAYERS.keys() - {"Sequential", "VirtualBatchNorm"}))
def test_moments_that_cannot_be_written(kind: str, name: str, backend: str) -> None:
    """Expanded ones, which is found when the others have been written."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    norms = [module for module in layer.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    last = norms[0] if kind == "embedding" else norms[-1]
    value = getattr(last, name)
    setattr(last, name, value.flatten()[:1].expand(value.shape))
    keywords = {
        "classes": {"condition": torch.tensor([0, 1, 1, 0])},
        "embedding": {"condition": torch.randn(4, 2)},
        "DomainBatchNorm": {"domain": torch.tensor([0, 1, 1, 0])},
        "StepwiseBatchNorm": {"step": 0},
        "LSTMCell": {"step": 1},
        "GRUCell": {"step": 1},
        "compensating": {"producer_weight": torch.randn(3, 2)},
    }.get(kind, {})
    shape = {"BatchNorm2d": (4, 3, 2, 2), "BatchNorm3d": (4, 3, 1, 2, 2), "LSTM": (5, 4, 3), "GRU": (4, 5, 3)}
    x = torch.randn(shape.get(kind, (4, 3)))
    refused(layer, lambda: layer(x, **keywords), "more than one element")


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_parameter_in_the_place_of_a_statistic(name: str, backend: str) -> None:
    """It is written to as a buffer is, and put back."""
    layer = kn.BatchNormLSTM(3, 2, max_length=2)
    norm = layer.norm_ih_l0
    value = getattr(norm, name).clone()
    delattr(norm, name)
    setattr(norm, name, nn.Parameter(value, requires_grad=False))
    last = layer.norm_c_l0
    last.running_var = last.running_var[:, :1].expand(last.running_var.shape)
    refused(layer, lambda: layer(torch.randn(5, 4, 3)), "more than one element")


def test_parts_that_fail_late(backend: str) -> None:
    """The first parts have been counted by then."""
    layer = kn.SplitBatchNorm(3, 3)
    layer.aux_bn[1].running_var = torch.ones(1).expand(3)
    refused(layer, lambda: layer(torch.randn(6, 3)), "more than one element")
    recurrent = kn.BatchNormGRU(3, 4, num_layers=2, normalize="input")
    recurrent.norm_ih_l1.running_var = torch.ones(1).expand(12)
    refused(recurrent, lambda: recurrent(torch.randn(5, 2, 3)), "more than one element")


def test_windows_that_fail_late() -> None:
    for make in (kn.MovingAverageBatchNorm, lambda channels: kn.CrossIterationBatchNorm(channels, compensate=False)):
        layer = make(3)
        layer._burning_in = False
        layer(torch.randn(4, 3))
        twin = copy.deepcopy(layer)
        layer.running_var = torch.ones(1).expand(3)
        refused(layer, lambda layer=layer: layer(torch.randn(4, 3)), "more than one element")
        layer.running_var = twin.running_var.clone()
        x = torch.randn(4, 3)
        assert torch.equal(layer(x), twin(x))


def test_an_exception_of_the_users_module() -> None:
    """In the middle of a call: what the user's own layers had counted is put back, too."""

    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("the user's")

    modulation = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.BatchNorm1d(6), Fails())
    layer = kn.ConditionalBatchNorm(3, embedding_dim=2, modulation=modulation)
    refused(layer, lambda: layer(torch.randn(4, 3), condition=torch.randn(4, 2)), "the user's")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_under_transforms() -> None:
    """What was written is put back outside of torch.func, which would let nobody write there."""
    layer = kn.BatchNorm(3)
    layer.running_var = torch.ones(1).expand(3)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x, mask=torch.tensor([True, True, True, False])).sum()

    before = state_of(layer)
    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(torch.randn(4, 3))
    assert state_of(layer) == before
