"""Layers of other packages and of users: known by exact class, converted, folded, recalibrated and reverted."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
from surgery import packages
from torch import fx, nn

import keelnorm as kn
from keelnorm.cli._shared.inspection import inspect_model
from keelnorm.engine.fusion.call import all_sizes_wait
from keelnorm.surgery import known_layers

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
ACTS = {"relu": nn.ReLU, "silu": nn.SiLU, "prelu": nn.PReLU, "none": nn.Identity}


@pytest.fixture
def kinds(monkeypatch):
    return packages.load(monkeypatch)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(known_layers, "_known", {})


def net(*layers):
    """Convolutions followed by these layers, in float64, with random parameters and statistics."""
    torch.manual_seed(0)
    parts = [part for layer in layers for part in (nn.Conv2d(3, 3, 3, padding=1), layer)]
    model = nn.Sequential(*parts, nn.Conv2d(3, 2, 1)).double()
    with torch.no_grad():
        for layer in layers:
            for name in ("running_mean", "bias"):
                getattr(layer, name).normal_()
            for name in ("running_var", "weight"):
                getattr(layer, name).uniform_(0.5, 2)
    return model


def act_nets(kinds):
    kind = kinds["timm BatchNormAct2d"]
    for name, act in ACTS.items():
        for drop in (None, lambda: nn.Dropout(0.5)):
            yield name, drop, net(kind(3, act_layer=act, drop_layer=drop), kind(3, apply_act=False, drop_layer=drop))


def outcome(model, x):
    """Output, gradients and state after a call."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), *(v.clone() for v in model.state_dict().values())]


def assert_same(model, twin, x=X, calls=3):
    with all_sizes_wait():
        for training in (True, False):
            model.train(training), twin.train(training)
            for _ in range(calls):
                for found, wanted in zip(outcome(model, x), outcome(twin, x), strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_batch_norm_with_dropout_and_activation(kinds):
    """With dropout between, and the same random numbers; the layer is still an instance of its class."""
    for name, drop, model in act_nets(kinds):
        twin = copy.deepcopy(model)
        model, report = kn.convert(model)
        assert report.summary["converted"] == 2
        assert (report.rows[0]["was"], report.rows[0]["is"]) == ("BatchNormAct2d", "BatchNormAct2d (keelnorm)")
        assert isinstance(model[1], kinds["timm BatchNormAct2d"])
        assert isinstance(model[1], kn.BatchNorm2d)
        assert model.state_dict().keys() == twin.state_dict().keys()
        assert_same(model, twin)
        if name in ("relu", "silu") and drop is None:
            assert report.rows[0]["runs with"] == name
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(copied[1]) is type(model[1])
            assert_same(copied, copy.deepcopy(model), calls=1)
        kn.revert(model)
        assert type(model[1]) is kinds["timm BatchNormAct2d"]
        assert vars(model[1]).keys() == vars(twin[1]).keys()
        assert_same(model, twin, calls=1)


FROZEN = ["torchvision FrozenBatchNorm2d", "detectron2 FrozenBatchNorm2d", "timm FrozenBatchNormAct2d"]


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers(kinds, name):
    """Frozen layers stay fixed in training, are not derived from torch.nn's, and keep their class."""
    kind = kinds[name]
    model = net(kind(3, eps=1e-3), kind(3))
    twin = copy.deepcopy(model)
    model, report = kn.convert(model)
    assert report.summary["converted"] == 2
    assert isinstance(model[1], kind)
    assert not isinstance(model[1], nn.modules.batchnorm._BatchNorm)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in twin.named_parameters()]
    assert_same(model, twin)
    if name.startswith("timm"):
        assert report.rows[0]["runs with"] == "relu"
    for x in (X.float(), X.half(), X[0]):  # types and ranks mix as in the layer's own code, or are refused by it
        layers = model[1], twin[1]
        try:
            expected = layers[1](x)
        except Exception as error:
            with pytest.raises(type(error)):
                layers[0](x)
        else:
            assert torch.equal(layers[0](x), expected)
            assert layers[0](x).dtype == expected.dtype
    assert_same(pickle.loads(pickle.dumps(model)), twin, calls=1)
    model.load_state_dict({**twin.state_dict(), "1.num_batches_tracked": torch.tensor(3)})
    _, report = kn.recalibrate(model, [X])
    assert [row["reason"] for row in report.rows] == [f"is a {kind.__name__}, whose statistics are fixed"] * 2
    kn.to_torch(model)
    assert type(model[1]) is kind


def test_fold(kinds):
    for _, _, model in act_nets(kinds):
        model.eval()
        expected = model(X)
        for start in (model, kn.convert(copy.deepcopy(model))[0]):
            folded, report = kn.fold(start, X)
            assert [row["into"] for row in report.rows] == ["0", "2"]
            assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
            torch.testing.assert_close(folded(X), expected)
            assert not any(module.training for module in folded.modules())
        learned = [key for key in model.state_dict() if "act" in key]  # a PReLU's weight
        assert [key for key in folded.state_dict() if "act" in key] == learned


@pytest.mark.parametrize("name", FROZEN)
def test_fold_frozen_layers(kinds, name):
    model = net(kinds[name](3), kinds[name](3)).eval()
    folded, report = kn.fold(model, X)
    assert report.summary["folded"] == 2
    torch.testing.assert_close(folded(X), model(X))


def test_a_layer_with_an_activation_folds_into_the_layer_before_it_only(kinds):
    kind = kinds["timm BatchNormAct2d"]
    model = net(kind(3), kind(3))
    del model[0]
    folded, report = kn.fold(model.eval(), X)
    assert "calls drop, act after the normalization" in report.rows[0]["reason"]
    assert [row["into"] for row in report.rows] == ["", "1"]
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3), kind(3)).double().eval()
    folded, report = kn.fold(twice, X)  # an activation is between the two
    assert [row["into"] for row in report.rows] == ["0", ""]
    torch.testing.assert_close(folded(X), twice(X))


def test_recalibrate_adapt_and_inspect(kinds):
    kind = kinds["timm BatchNormAct2d"]
    model = net(kind(3, drop_layer=lambda: nn.Dropout(0.5)))
    twin = copy.deepcopy(model)
    kn.convert(model)
    for each in (model, twin):
        kn.recalibrate(each, [X])
        values = each[0](X).movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(each[1].running_mean, values.mean(0).detach())
        torch.testing.assert_close(each[1].running_var, values.var(0).detach())
        kn.adapt(each.eval(), mode="batch")
    torch.testing.assert_close(model(X + 1), twin(X + 1))
    kn.reset_adaptation(model)
    report = inspect_model(net(kind(3), kinds["torchvision FrozenBatchNorm2d"](3)), X)
    assert [row["kind"] for row in report.rows] == ["BatchNormAct2d", "FrozenBatchNorm2d"]
    assert [row["folds into"] for row in report.rows] == ["0", "2"]
    assert [row["mode"] for row in report.rows] == ["train", "frozen"]


def test_exports_and_graphs(kinds):
    """An activation that is not idempotent is applied once."""
    model = net(kinds["timm BatchNormAct2d"](3, act_layer=nn.SiLU), kinds["torchvision FrozenBatchNorm2d"](3)).eval()
    expected = model(X)
    converted, _ = kn.convert(copy.deepcopy(model))
    traced = fx.symbolic_trace(converted)
    torch.testing.assert_close(traced(X), expected)
    torch.testing.assert_close(torch.export.export(converted, (X,)).module()(X), expected)
    torch.testing.assert_close(torch.compile(converted, backend="eager", fullgraph=True)(X), expected)
    prepared, report = kn.prepare_export(converted)
    assert [row["is"] for row in report.rows] == ["BatchNormAct2d", "FrozenBatchNorm2d"]
    torch.testing.assert_close(prepared(X), expected)
    torch._dynamo.reset()


def test_synchronized_ones(kinds):
    layer = kinds["timm SyncBatchNormAct"](3)
    layer.act = nn.ReLU()  # without drop
    model = net(layer).eval()
    expected = model(X)
    model, report = kn.convert(model)
    assert isinstance(model[1], kn.SyncBatchNorm)
    torch.testing.assert_close(model(X), expected)
    assert model.train()(X).isfinite().all()  # torch's layer does not run on the CPU
    kn.revert(model)
    assert type(model[1]) is kinds["timm SyncBatchNormAct"]
    for sync, kind in ((False, "timm SyncBatchNormAct"), (True, "timm BatchNormAct2d")):
        model, report = kn.convert(net(kinds[kind](3)), sync=sync)
        assert "which only its own package can" in report.rows[0]["reason"]
        assert type(model[1]) is kinds[kind]


def test_state_from_and_for_elsewhere(kinds):
    """Fixed statistics are not pooled; they are exported like others."""
    model = net(kinds["torchvision FrozenBatchNorm2d"](3), nn.BatchNorm2d(3))
    merged, report = kn.merge_statistics([model.state_dict()] * 2, [8, 8])
    assert [row["path"] for row in report.rows] == ["1", "3"]
    assert all(torch.equal(merged[f"1.{name}"], value) for name, value in model[1].named_buffers())
    assert merged["1.running_var"].data_ptr() != model[1].running_var.data_ptr()
    assert list(kn.to_flax(model)["batch_stats"]) == ["1", "3"]


def test_nothing_is_imported_and_other_classes_of_the_same_name_are_not_taken(monkeypatch):
    """A class is known only if its module has it under its name."""
    made = packages.load(monkeypatch)
    other = type("BatchNormAct2d", (packages.BatchNormAct2d,), {"__module__": "timm.layers.norm_act", "forward": None})
    assert known_layers.known(made["timm BatchNormAct2d"]) is not None
    assert known_layers.known(other) is None
    before = set(sys.modules)
    kn.convert(nn.Sequential(packages.BatchNormAct2d(3)))
    assert set(sys.modules) == before


# What users register.


class Behind(nn.BatchNorm1d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.last = nn.Tanh()

    def forward(self, x):
        return self.last(super().forward(x))


class Fixed(packages.FixedByFormula):
    def forward(self, x):
        return self.affine(x)


class Named(nn.BatchNorm2d):
    """A batch norm with another name."""


def test_what_nobody_registered_is_listed_by_name_with_what_to_do():
    model = nn.Sequential(nn.BatchNorm2d(3), Named(3), nn.Sequential(Fixed(3), Fixed(3), Fixed(3), Fixed(3)))
    model, report = kn.convert(model)
    assert [type(model[0]), type(model[1])] == [kn.BatchNorm2d, Named]
    assert "kn.surgery.register(Named, ...)" in report.rows[1]["reason"]
    words = f"2.0, 2.1, 2.2 and 1 more: {__name__}.Fixed is not known, and may compute more than a batch norm"
    for notes in (report.notes, kn.fold(model.eval(), X.float())[1].notes, kn.recalibrate(model, [X.float()])[1].notes):
        assert [note.partition(";")[0] for note in notes] == [words]
    _, report = kn.recalibrate(nn.Sequential(Behind(3)), [torch.randn(9, 3)])
    assert "kn.surgery.register(Behind, ...)" in report.notes[0]
    model = nn.Sequential(nn.Linear(3, 3), Behind(3)).eval()
    assert "kn.surgery.register(Behind, ...)" in kn.fold(model, torch.randn(9, 3))[1].rows[0]["reason"]
    assert kn.convert(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)))[1].notes == []


def test_register():
    assert kn.surgery.register(Named) is Named
    kn.surgery.register(Behind, then=["last"])
    kn.surgery.register(Fixed, frozen=True)
    x = torch.randn(16, 3).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), Behind(3)).double()
    twin = copy.deepcopy(model)
    model, report = kn.convert(model)
    assert_same(model, twin, x)
    assert report.rows[0]["runs with"] == "tanh"
    folded, report = kn.fold(model, x)
    assert report.summary["folded"] == 1
    torch.testing.assert_close(folded(x), twin(x))
    model = net(Named(3), Fixed(3))
    twin = copy.deepcopy(model)
    model, report = kn.convert(model)
    assert report.summary["converted"] == 2
    assert report.notes == []
    assert_same(model, twin)
    saved = pickle.dumps(model)
    known_layers._known.clear()
    with pytest.raises(TypeError, match=r"is not known here; call kn\.surgery\.register"):
        pickle.loads(saved)


def test_registered_layers_are_called_as_before():
    kn.surgery.register(Named)
    model, twin = net(Named(3)), net(Named(3))
    kn.convert(model)
    torch.testing.assert_close(model[1](input=X), twin[1](input=X))
    with pytest.raises(TypeError):
        model[1](X, None)


def test_what_is_registered_and_not_there_is_a_reason():
    """With a wrong name an activation would be left out."""
    x = torch.randn(9, 3)
    for then, change, words in (
        (["lats"], lambda layer: None, "has no 'lats', which is registered for its class (Behind)"),
        (["last"], lambda layer: layer.__dict__.update(last=torch.tanh), "has a 'last' that is no module"),
    ):
        kn.surgery.register(Behind, then=then)
        model = nn.Sequential(nn.Linear(3, 3), Behind(3)).eval()
        if change(model[1]) is None and then == ["last"]:
            del model[1]._modules["last"]
        expected = model(x)
        model, report = kn.convert(model)
        assert words in report.rows[0]["reason"]
        folded, report = kn.fold(model, x)
        assert words in report.rows[0]["reason"]
        torch.testing.assert_close(folded(x), expected)
    kn.surgery.register(Behind, then=["last"])  # registering again replaces the entry
    layer = Behind(3).eval()
    torch.testing.assert_close(kn.convert(copy.deepcopy(layer))[0](x), layer(x))
    layer.last = None
    torch.testing.assert_close(kn.convert(copy.deepcopy(layer))[0](x), nn.BatchNorm1d.forward(layer, x))


def test_scripts_are_refused_with_the_way_out(kinds):
    for name in ("timm BatchNormAct2d", "torchvision FrozenBatchNorm2d"):
        model, _ = kn.convert(net(kinds[name](3)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match=r"kn\.to_torch\(model\)"):
                torch.jit.script(model)


@pytest.mark.parametrize(
    ("kind", "keywords", "error", "words"),
    [
        (nn.BatchNorm2d, {}, ValueError, "torch.nn's or keelnorm's own class"),
        (kn.GhostBatchNorm, {}, ValueError, "torch.nn's or keelnorm's own class"),
        (nn.Linear, {}, ValueError, "must be derived from a batch norm of torch.nn"),
        (Named(3), {}, TypeError, "kind must be a class"),
        ("Named", {}, TypeError, "kind must be a class"),
        (Behind, {"then": "last"}, TypeError, "then must be a list of names"),
        (Behind, {"then": [nn.Tanh()]}, TypeError, "then must be a list of names"),
    ],
)
def test_what_can_not_be_registered(kind, keywords, error, words):
    with pytest.raises(error, match=f"register: .*{words}"):
        kn.surgery.register(kind, **keywords)
    assert known_layers._known == {}


# A layer that asks what it was given.


class DenseLayer(nn.Module):
    """A layer that accepts one tensor or a list of them, as in torchvision's DenseNet."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 4, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, input):
        features = [input] if isinstance(input, torch.Tensor) else input
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(y)))


class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__({f"layer{i}": DenseLayer(3 + 2 * i) for i in range(3)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def test_every_layer_of_a_densenet_fuses():
    model = nn.Sequential(DenseBlock(), nn.BatchNorm2d(9), nn.ReLU(inplace=True)).double()
    twin = copy.deepcopy(model)
    model, report = kn.convert(model)
    assert_same(model, twin)
    assert report.summary["fused"] == report.summary["batch norms"] == 7
