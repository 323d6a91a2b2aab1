"""Models with keelnorm's layers become torch.nn's: what is kept, what is refused, and which tools accept the result."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from surgery.convert_models import a_net
from torch import fx, nn

import keelnorm as kn

X = torch.randn(4, 3, 8, 8)


def built():
    """A model of keelnorm's layers after a few training steps."""
    torch.manual_seed(0)
    model = kn.Sequential(nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model.append(nn.Sequential(kn.BatchNorm2d(5, affine=False), nn.Flatten(), kn.BatchNorm1d(80), nn.Linear(80, 2)))
    model(X)
    return model


def kinds(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_what_is_kept(training):
    model = built().train(training)
    model[1].weight.requires_grad_(False)
    model[4][0].train(not training)
    objects = {id(module) for module in model.modules()}
    tensors = {
        name: id(value) for name, value in (*model.named_parameters(), *model.state_dict(keep_vars=True).items())
    }
    modes = [module.training for module in model.modules()]
    twin = copy.deepcopy(model)
    same, report = kn.to_torch(model)
    assert same is model
    assert not any("keelnorm" in kind.__module__ for kind in kinds(model))
    assert [type(model), type(model[1]), type(model[4][2])] == [nn.Sequential, nn.BatchNorm2d, nn.BatchNorm1d]
    assert {id(module) for module in model.modules()} == objects
    assert {
        name: id(v) for name, v in (*model.named_parameters(), *model.state_dict(keep_vars=True).items())
    } == tensors
    assert [module.training for module in model.modules()] == modes
    assert (model[1].eps, model[1].momentum, model[1].weight.requires_grad) == (1e-3, None, False)
    assert [(row["path"], row["was"], row["is"]) for row in report.rows] == [
        ("", "kn.Sequential", "Sequential"), ("1", "kn.BatchNorm2d", "BatchNorm2d"),
        ("4.0", "kn.BatchNorm2d", "BatchNorm2d"), ("4.2", "kn.BatchNorm1d", "BatchNorm1d"),
    ]  # fmt: skip
    torch.testing.assert_close(model(X), twin(X))
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert list(dict(model.named_buffers())) == [
        name for name in model.state_dict() if "running" in name or "num_" in name
    ]
    assert kn.to_torch(model)[1].rows == []


def test_converted_models_get_their_classes_back():
    model = a_net()
    before = kinds(model)
    model, _ = kn.convert(model, sync=True)
    model, report = kn.to_torch(model)
    assert kinds(model) == before
    assert report.summary["layers"] == len(report.rows) == 6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model = built()  # our own layers, converted to synchronized ones
    model, report = kn.to_torch(kn.convert(model, sync=True)[0])
    assert type(model[1]) is nn.BatchNorm2d
    assert "process_group" not in vars(model[1])


def test_hooks_shared_layers_and_frozen_ones():
    layer, seen = kn.BatchNorm2d(3), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    model = nn.Sequential(layer, nn.Sequential(layer, kn.BatchNorm2d(3)))
    kn.freeze(model, where="1.1")
    model, report = kn.to_torch(model)
    assert model[0] is model[1][0] is layer
    assert len(report.rows) == 2
    model.train()(X)
    assert seen == [1, 1]
    assert kn.assert_frozen(model, where="1.1") == ["1.1"]
    assert model[1][1].num_batches_tracked == 0
    kn.unfreeze(model, where="1.1")
    model(X)
    assert model[1][1].num_batches_tracked == 1


def test_synchronized_and_lazy_layers():
    model, _ = kn.to_torch(nn.Sequential(kn.SyncBatchNorm(3), kn.LazyBatchNorm2d()))
    assert [type(layer) for layer in model] == [nn.SyncBatchNorm, nn.LazyBatchNorm2d]
    assert model.eval()(X).shape == X.shape
    assert type(model[1]) is nn.BatchNorm2d


def test_what_torch_does_not_have_is_noted():
    layer = kn.BatchNorm2d(3, too_few="running")
    layer, report = kn.to_torch(layer)
    assert report.rows[0]["path"] == ""
    assert "no too_few='running'" in report.rows[0]["note"]
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(1, 3, 1, 1))
    layer, _ = kn.convert(layer)
    assert layer(torch.randn(1, 3, 1, 1)).shape == (1, 3, 1, 1)


class Own(kn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: kn.GhostBatchNorm(3, 2), "1, a kn.GhostBatchNorm, has no counterpart"),
        (lambda: kn.BatchRenorm(3), "1, a kn.BatchRenorm, has no counterpart"),
        (lambda: kn.SplitBatchNorm(3), "1, a kn.SplitBatchNorm, has no counterpart in torch.nn. Replace"),
        (lambda: kn.BatchNormLSTM(3, 4), "1, a kn.BatchNormLSTM, has no counterpart in torch.nn. Replace"),
        (lambda: kn.WhiteningBatchNorm(3), "1, a kn.WhiteningBatchNorm, has no counterpart"),
        (lambda: kn.BatchNorm(3), "1, a kn.BatchNorm, takes inputs of any rank"),
        (lambda: Own(3), "1, a Own, is a class of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(kn.BatchNorm1d(3), dim=None), "is parametrized"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused_by_name_before_anything_changes(layer, words):
    model = nn.Sequential(kn.BatchNorm2d(3), layer(), kn.Sequential())
    before, attributes = kinds(model), [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match="to_torch: ") as raised:
        kn.to_torch(model)
    assert words in str(raised.value)
    assert kinds(model) == before
    assert [dict(vars(module)) for module in model.modules()] == attributes
    with pytest.raises(TypeError, match="to_torch: model must be"):
        kn.to_torch({"bn": layer()})  # type: ignore[type-var]


# Graphs.


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), kn.BatchNorm2d(3), kn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.bn(self.conv(x), x, activation="relu"), activation=nn.LeakyReLU(0.3))


@pytest.mark.parametrize("operation", [kn.to_torch, kn.prepare_export], ids=["to_torch", "prepare_export"])
def test_graphs_are_taken_apart(operation):
    model = Fused()
    model(X)
    model.eval()
    graph = fx.symbolic_trace(model)
    expected = model(X)
    graph, _ = operation(graph)
    assert [type(graph.bn), type(graph.last)] == [nn.BatchNorm2d] * 2
    torch.testing.assert_close(graph(X), expected)
    assert kn.fold(graph, X)[1].summary["folded"] == 1


def test_graphs_of_converted_layers_are_taken_apart():
    model: Any = Fused()
    model.bn, model.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    graph = fx.symbolic_trace(kn.convert(model)[0].eval())
    expected = graph(X)
    graph, _ = kn.to_torch(graph)
    torch.testing.assert_close(graph(X), expected)


def test_graphs_with_masks_are_refused():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = kn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x, mask=x[:, 0] > 0)

    graph = fx.symbolic_trace(Masked())
    with pytest.raises(ValueError, match="to_torch: the graph calls bn with mask"):
        kn.to_torch(graph)
    assert type(graph.bn) is kn.BatchNorm2d


# Tools that ask for exact classes.


def test_torch_jit_script():
    """The error of torch.jit.script names to_torch, which works."""
    model = built().eval()
    expected = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"kn\.to_torch\(model\)"):
            torch.jit.script(model)
        with pytest.raises(RuntimeError, match=r"kn\.to_torch\(model\)"):
            torch.jit.trace(model, X)
        scripted = torch.jit.script(kn.to_torch(model)[0])
        traced = torch.jit.trace(model, X)
    torch.testing.assert_close(scripted(X), expected)
    torch.testing.assert_close(traced(X), expected)


def test_eager_quantization():
    """Fuses Conv2d, BatchNorm2d and ReLU by their exact classes."""
    from torch.ao.quantization import fuse_modules

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = kn.to_torch(built().eval())
        expected = model(X)
        fused = fuse_modules(model, [["0", "1", "2"]])
    assert isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(X), expected)


def test_fx_quantization():
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = kn.to_torch(built().eval())
        fused = quantize_fx.fuse_fx(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in list(fused.modules())[:3])
    torch.testing.assert_close(fused(X), model(X))


def test_validators_by_exact_class():
    """A table of exact types, as Opacus has."""
    table = {nn.BatchNorm1d: "not allowed", nn.BatchNorm2d: "not allowed", nn.SyncBatchNorm: "not allowed"}
    model = built()
    assert not [path for path, module in model.named_modules() if type(module) in table]
    kn.to_torch(model)
    assert [path for path, module in model.named_modules() if type(module) in table] == ["1", "4.0", "4.2"]


def test_pickles_have_nothing_of_keelnorm():
    for model in (kn.convert(built())[0], kn.SyncBatchNorm.convert_sync_batchnorm(built())):
        assert b"keelnorm" in pickle.dumps(model)
        assert b"keelnorm" not in pickle.dumps(kn.to_torch(model)[0])
