"""What convert leaves alone, and says so; and how a converted model notices that it has changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from surgery.convert_models import REFUSED, Block, Checked, OneLayer, a_net
from surgery.test_convert import calls_of
from torch import nn

import evenkeel as ek
from evenkeel.surgery import convert as module_of_convert

X = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_forwards_that_no_graph_can_stand_for(kind):
    model = kind()
    before, seen = dict(model.__dict__), list(model.seen)
    random_state = torch.get_rng_state()
    model, report = ek.convert(model)
    assert REFUSED[kind] in report.rows[0]["reason"]
    assert kind.__name__ in report.rows[0]["reason"]
    assert "forward" not in model.__dict__
    assert type(model.bn) is ek.BatchNorm2d  # the layer is still faster
    assert all(model.__dict__[name] is value for name, value in before.items())
    assert model.seen == seen
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model(X).shape == X.shape


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Own(3), "whose own forward or state"),
        (nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None), "ParametrizedBatchNorm1d"),
    ],
    ids=["subclass", "parametrized"],
)
def test_layers_that_are_more_than_batch_norm(layer, words):
    kind = type(layer)
    model, report = ek.convert(nn.Sequential(layer, nn.ReLU()))
    assert words in report.rows[0]["reason"]
    assert type(model[0]) is kind
    assert "forward" not in model.__dict__


def test_a_layer_with_a_forward_of_its_own():
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    model, report = ek.convert(nn.Sequential(layer, nn.ReLU()))
    assert report.rows[0]["reason"] == "has a forward of its own"
    assert type(model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("part", ["bn", "act"])
def test_hooked_neighbours_are_not_fused(part):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    calls = []
    model[0 if part == "bn" else 1].register_forward_hook(lambda *_: calls.append(1))
    model, report = ek.convert(model)
    assert report.rows[0]["runs with"] is None
    assert "has a hook" in report.rows[0]["reason"]
    model(X)
    assert calls == [1]


def test_an_output_that_is_read_twice():
    _, report = ek.convert(OneLayer(lambda y, x: F.relu(y) + y))
    assert report.rows[0]["reason"] == "its output is read by another besides the activation"


def test_an_input_that_may_change_before_the_addition():
    def then(y, x):
        return y

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.then = nn.BatchNorm2d(3), then

        def forward(self, x):
            x = x + 0
            y = self.bn(x)
            residual = x.mul_(2)
            return F.relu(y + residual)

    original = InPlace()
    model, report = ek.convert(copy.deepcopy(original))
    assert "read again before the addition" in report.rows[0]["reason"]
    torch.testing.assert_close(model(X), original(X))


class TestAfterwards:
    """Whatever is done to a converted model, it computes what the plain one would."""

    @staticmethod
    def both(change, x=X, fused=0):
        plain = a_net().eval()
        model, _ = ek.convert(copy.deepcopy(plain))
        assert len([c for c in calls_of(model, x) if c[1]]) == 5
        change(plain), change(model)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert len([c for c in calls_of(model, x) if c[1]]) == fused

    def test_an_activation_is_replaced(self):
        self.both(lambda m: setattr(m[3], "act", nn.Tanh()), fused=4)

    def test_a_batch_norm_is_replaced(self):
        self.both(lambda m: m[3].body.__setitem__(4, nn.BatchNorm2d(4).eval()), fused=3)

    def test_a_layer_is_put_in_between(self):
        self.both(lambda m: m[3].body.append(nn.Hardtanh()), fused=3)

    def test_a_child_is_taken_away(self):
        self.both(lambda m: setattr(m[4], "down", None), fused=4)

    def test_hooks(self):
        seen = []
        self.both(lambda m: m[3].act.register_forward_hook(lambda *_: seen.append("act")), fused=4)
        self.both(lambda m: m[3].body[4].register_forward_pre_hook(lambda *_: seen.append("bn")), fused=4)
        self.both(lambda m: m[3].body.register_forward_hook(lambda *_: seen.append("body")), fused=4)
        assert {"act", "bn", "body"} == set(seen)

    def test_a_hook_of_all_modules(self):
        names = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: names.append(type(m).__name__))
        try:
            plain = a_net().eval()
            model, _ = ek.convert(copy.deepcopy(plain))
            names.clear()
            model(X)
            found = list(names)
            names.clear()
            plain(X)
            assert found == names
        finally:
            handle.remove()

    def test_another_argument(self):
        plain = Block().eval()
        model, _ = ek.convert(copy.deepcopy(plain))
        x, scale = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(model(x, scale), plain(x, scale))
        torch.testing.assert_close(model(x, scale=scale), plain(x, scale=scale))
        torch.testing.assert_close(model(x=x), plain(x=x))
        assert ("body.4", "relu", True) in calls_of(model, x)

    def test_an_attribute_has_another_value(self):
        class Switch(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act, self.steps = nn.BatchNorm2d(3), nn.ReLU(), [1, 2]
                self.on = True

            def forward(self, x):
                y = self.bn(x)
                y = self.act(y) if self.on else y
                for _ in self.steps:
                    y = y + 1
                return y

        plain = Switch().eval()
        model, _ = ek.convert(copy.deepcopy(plain))
        assert calls_of(model, X) == [("bn", "relu", False)]
        plain.steps.append(3), model.steps.append(3)
        torch.testing.assert_close(model(X), plain(X))
        assert calls_of(model, X) == [("bn", None, False)]
        plain.steps.pop(), model.steps.pop()
        assert calls_of(model, X) == [("bn", "relu", False)]
        plain.on = model.on = False
        torch.testing.assert_close(model(X), plain(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_parts():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    compiled = torch.compile(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), backend="aot_eager")
    plain = nn.Sequential(scripted, compiled, nn.BatchNorm2d(3), nn.ReLU()).eval()
    with torch.no_grad():
        expected = plain(X)
        model, report = ek.convert(plain)
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert [row["path"] for row in report.rows if row["runs with"]][-1] == "2"


def test_a_check_of_the_input_still_raises():
    model, report = ek.convert(Checked())
    assert report.rows[0]["reason"] is None
    assert calls_of(model, X) == [("bn", "relu", False)]
    with pytest.raises(KeyError, match="5 channels"):
        model(torch.randn(2, 5, 4, 4))
    with pytest.raises(AssertionError, match="four dimensions"):
        model(torch.randn(2, 3, 4))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = a_net()
    before = [(type(m), dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    put, calls = module_of_convert.__globals__["_put_forward"], []

    def fail(module, forward):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("injected")
        put(module, forward)

    monkeypatch.setitem(module_of_convert.__globals__, "_put_forward", fail)
    with pytest.raises(RuntimeError, match="injected"):
        ek.convert(model)
    for module, (kind, attributes, buffers) in zip(model.modules(), before, strict=True):
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys()
        assert module._buffers == buffers


def test_wrong_arguments():
    with pytest.raises(TypeError, match="convert: model must be"):
        ek.convert(3)
    with pytest.raises(ValueError, match="matches no batch norm"):
        ek.convert(a_net(), where="nowhere")
