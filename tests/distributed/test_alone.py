"""Without other ranks: kn.BatchNorm, torch.nn.SyncBatchNorm's constructor and state, and the conversion of models."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import C, Case, one_process
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn
from keelnorm.distributed import sync_statistics
from keelnorm.nn.sync.sync_batch_norm import SyncBatchNorm

convert = SyncBatchNorm.convert_sync_batchnorm


def test_the_constructor_and_state_are_torchs() -> None:
    ours = list(inspect.signature(SyncBatchNorm).parameters)
    theirs = list(inspect.signature(nn.SyncBatchNorm).parameters)
    assert ours[:8] == theirs[:8]
    layer, other = SyncBatchNorm(4, 1e-3, None, True, True, None), nn.SyncBatchNorm(4, 1e-3, None, True, True, None)
    assert repr(layer) == repr(other)
    layer.load_state_dict(other.state_dict())
    other.load_state_dict(layer.state_dict())
    assert isinstance(layer, _BatchNorm)
    if "bias" in theirs:
        assert SyncBatchNorm(4, bias=False).bias is None


def test_distributed_data_parallel_takes_it_on_the_cpu() -> None:
    # its check in torch, which a subclass of torch.nn.SyncBatchNorm would not pass
    assert not isinstance(SyncBatchNorm(4), nn.SyncBatchNorm)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_alone_it_is_batch_norm_to_the_bit(training: bool, track: bool) -> None:
    ours, plain = (kind(C, track_running_stats=track).train(training) for kind in (SyncBatchNorm, kn.BatchNorm))
    x, residual = torch.randn(2, 6, C, 4, 3)
    found = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, residual, activation="relu")
        y.square().sum().backward()
        found.append([y, leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_alone_it_has_a_second_derivative(masked: bool) -> None:
    """With other ranks it is refused by name, see test_what_has_no_derivative_says_so."""
    layer = SyncBatchNorm(2, dtype=torch.float64)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True]) if masked else None
    assert torch.autograd.gradgradcheck(lambda x: layer(x, activation="silu", mask=mask), (x,))


def test_alone_one_value_is_an_error() -> None:
    layer = nn.Sequential(SyncBatchNorm(2))
    with pytest.raises(ValueError, match=r"SyncBatchNorm '0': one value per channel has no variance"):
        layer(torch.ones(1, 2))
    with pytest.raises(ValueError, match="one value per channel, counted over all ranks"):
        layer[0](torch.ones(3, 2), mask=torch.tensor([True, False, False]))
    assert layer[0].num_batches_tracked == 0


def test_alone_with_a_mask() -> None:
    case = Case("alone, with a mask", (16,), masks=(True,), activation="silu", residual=True)
    batch, right = case.whole(), one_process(case)
    layer = SyncBatchNorm(C, dtype=torch.float64)
    layer.load_state_dict(layer.state_dict() | {key: batch[key] for key in ("weight", "bias")})
    x = batch["x"].requires_grad_()
    y = layer(x, batch["residual"], activation="silu", mask=batch["mask"])
    y.backward(batch["dy"])
    torch.testing.assert_close(y, right["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, right["dx"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, right["dweight"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * right["var_unbiased"], rtol=1e-12, atol=0)


def test_alone_it_compiles_to_one_graph() -> None:
    layer, x = SyncBatchNorm(C), torch.randn(6, C, 4)
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True))
    assert layer.num_batches_tracked == 1


def test_copies_and_pickles() -> None:
    layer = SyncBatchNorm(3)
    layer(torch.randn(5, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other is not layer
        assert other.running_mean.data_ptr() != layer.running_mean.data_ptr()
        assert all(torch.equal(other.state_dict()[name], value) for name, value in layer.state_dict().items())
        other(torch.randn(5, 3))
        assert other.num_batches_tracked == 2
    assert layer.num_batches_tracked == 1


def test_convert_takes_over_everything() -> None:
    shared = nn.BatchNorm1d(4, momentum=None, eps=1e-3).eval()
    model = nn.Sequential(nn.Sequential(kn.BatchNorm2d(3), shared), shared, nn.InstanceNorm1d(4), nn.SyncBatchNorm(2))
    model[0][0](torch.randn(4, 3, 2, 2))
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    assert convert(model) is model
    kinds = [type(module) for module in model.modules() if isinstance(module, _BatchNorm)]
    assert kinds == [SyncBatchNorm] * 3
    assert model[1] is model[0][1]
    assert (model[1].momentum, model[1].eps, model[1].training, model[0][0].training) == (None, 1e-3, False, True)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(not tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_convert_a_layer_itself(options: dict[str, Any]) -> None:
    plain = nn.BatchNorm2d(3, **options)
    layer = convert(plain)
    assert isinstance(layer, SyncBatchNorm)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer(x), plain(x))


class Own(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Own(3), "forward of its own"),
        (hooked, "hooks, parametrizations"),
        (parametrized, "hooks, parametrizations"),
        (nn.LazyBatchNorm2d, "forward of its own|doesn't know its channels"),
    ],
)
def test_convert_refuses_what_would_be_lost(make: Any, why: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(make()))
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"'1\.0', a \w+, .*({why})"):
        convert(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_moments_and_statistics_alone() -> None:
    moments = kn.Moments.from_tensor(torch.randn(5, 3))
    assert moments.all_reduce() is moments
    model = nn.BatchNorm1d(3)
    model(torch.randn(5, 3))
    before = copy.deepcopy(model.state_dict())
    sync_statistics(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got 3 \(int\)"):
        sync_statistics(3)  # type: ignore[arg-type]
