"""Forwards that can't be recorded fuse and stay right; the report says which layers are left."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from surgery.convert_models import HARD, AnyNumber, Block, Checked, Checkpointing, OneLayer, WithoutGradients, a_net
from surgery.test_convert import assert_same_outcomes, fused_in, trained
from torch import nn

import keelnorm as kn
from keelnorm.engine.fusion import pending as fusion
from keelnorm.surgery.conversion import convert as module_of_convert

X = torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("kind", HARD, ids=lambda kind: kind.__name__)
def test_hard_forwards_run_as_they_are(kind):
    """The same side effects and random numbers as before, and fused."""
    original = trained(kind().double())
    model, report = kn.convert(copy.deepcopy(original))
    x = X.double()
    for training in (True, False):
        model.train(training), original.train(training)
        for count in (0, HARD[kind], HARD[kind]):
            random.seed(3), torch.manual_seed(3)
            before = fusion.completed
            y = model(x)
            assert fusion.completed - before == count
            states = random.getstate(), torch.get_rng_state()
            random.seed(3), torch.manual_seed(3)
            torch.testing.assert_close(y, original(x), rtol=1e-10, atol=1e-10)
            assert random.getstate() == states[0]
            assert torch.equal(torch.get_rng_state(), states[1])
            assert (model.count, model.seen) == (original.count, original.seen)
    if kind is Checkpointing:  # torch.nn's layers count a batch twice there
        original = AnyNumber().double()
        original.load_state_dict(model.state_dict())
    assert_same_outcomes(model, original, x)
    if HARD[kind]:
        assert report.rows[0]["runs with"] == "relu"
    other = torch.randn(2, 3, 5, 5, dtype=torch.float64)  # another branch of ByShape
    for _ in range(3):
        torch.testing.assert_close(model(other), original(other), rtol=1e-10, atol=1e-10)


def test_the_grad_mode_that_changes_behind_a_layer_is_a_reason():
    model, report = kn.convert(WithoutGradients())
    for _ in range(8):
        model(X)
    assert report.rows[0]["runs with"] is None
    assert report.rows[0]["reason"]


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Own(3), "which may have a forward or state"),
        (nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None), "ParametrizedBatchNorm1d"),
    ],
    ids=["subclass", "parametrized"],
)
def test_layers_that_are_more_than_batch_norm(layer, words):
    kind = type(layer)
    model, report = kn.convert(nn.Sequential(layer, nn.ReLU()))
    assert words in report.rows[0]["reason"]
    assert type(model[0]) is kind
    assert words in report.rows[0]["reason"]
    assert report.summary["left with a reason"] == 1


def test_a_layer_with_a_forward_of_its_own():
    layer = nn.BatchNorm2d(3)
    vars(layer)["forward"] = lambda x: x
    model, report = kn.convert(nn.Sequential(layer, nn.ReLU()))
    assert report.rows[0]["reason"] == "has a forward of its own"
    assert type(model[0]) is nn.BatchNorm2d


class SubclassOfOurs(kn.BatchNorm2d):
    def forward(self, x):  # type: ignore[override]
        return super().forward(x) * 2


def patched():
    layer = kn.BatchNorm2d(3)
    original = layer.forward
    vars(layer)["forward"] = lambda x: original(x) * 2
    return layer


@pytest.mark.parametrize("make", [lambda: SubclassOfOurs(3), patched], ids=["subclass", "patched"])
def test_layers_of_ours_that_are_more_than_batch_norm(make):
    x = X.double()
    model, _ = kn.convert(nn.Sequential(make(), nn.ReLU()).double())
    layer = nn.BatchNorm2d(3).double()
    for training in (True, True, True, False, False, False):
        model.train(training), layer.train(training)
        torch.testing.assert_close(model(x), F.relu(layer(x) * 2))


@pytest.mark.parametrize("part", ["bn", "act"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooked_neighbours_see_plain_tensors(part, when):
    original = trained(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double())
    seen = []

    def hook(net):
        module = net[1 if part == "bn" else 2]
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        module.register_forward_hook(lambda _, args, y: seen.append(y))

    if when == "before":
        hook(original)
    model = copy.deepcopy(original)
    seen.clear()
    model, report = kn.convert(model)
    if when == "after":
        assert_same_outcomes(model, original, X.double())
        assert report.rows[0]["runs with"] == "relu"
        hook(model), hook(original)
    assert assert_same_outcomes(model, original, X.double()) == ([0, 0, 0], [0, 0, 0])
    assert len(seen) == 24
    assert {type(value) for value in seen} == {torch.Tensor}
    for i in range(0, 24, 4):
        torch.testing.assert_close(seen[i], seen[i + 2])
        torch.testing.assert_close(seen[i + 1], seen[i + 3])


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_again_once_the_hook_is_gone(when):
    model, _ = kn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    if when == "after":
        fused_in(model, X), fused_in(model, X)
    handle = model[1].register_forward_hook(lambda *_: None)
    assert [fused_in(model, X) for _ in range(5)] == [0] * 5
    handle.remove()
    fused_in(model, X)
    assert fused_in(model, X) == 1


def test_an_output_that_is_read_twice():
    original = trained(OneLayer(lambda y, x: F.relu(y) + y).double())
    model, report = kn.convert(copy.deepcopy(original))
    assert assert_same_outcomes(model, original, X.double(), runs=4)[0][-1] == 0
    assert report.rows[0]["reason"] == "add reads its result, besides the operation that runs with it"


def test_an_input_that_changes_before_the_addition():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            x = x + 0
            y = self.bn(x)
            residual = x.mul_(2)
            return F.relu(y + residual)

    original = trained(InPlace().double())
    model, _ = kn.convert(copy.deepcopy(original))
    with torch.no_grad():  # autograd itself refuses the backward
        for training in (True, False):
            for _ in range(3):
                torch.testing.assert_close(model.train(training)(X.double()), original.train(training)(X.double()))
    for name, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


class TestAfterwards:
    """A converted model that is changed computes what the plain one computes."""

    @staticmethod
    def both(change, x=X, fused=0):
        plain = a_net().eval()
        model, _ = kn.convert(copy.deepcopy(plain))
        assert [fused_in(model, x) for _ in range(2)] == [0, 5]
        change(plain), change(model)
        for _ in range(4):  # the layers learn again
            torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
        assert fused_in(model, x) == fused

    def test_an_activation_is_replaced(self):
        self.both(lambda m: setattr(m[3], "act", nn.Tanh()), fused=5)  # the addition is still fused

    def test_a_batch_norm_is_replaced(self):
        self.both(lambda m: m[3].body.__setitem__(4, nn.BatchNorm2d(4).eval()), fused=4)

    def test_a_layer_is_put_in_between(self):
        self.both(lambda m: m[3].body.append(nn.Hardtanh()), fused=4)

    def test_a_child_is_taken_away(self):
        self.both(lambda m: setattr(m[4], "down", None), fused=5)

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
            model, _ = kn.convert(copy.deepcopy(plain))
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
        model, _ = kn.convert(copy.deepcopy(plain))
        x, scale = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(model(x, scale), plain(x, scale))
        torch.testing.assert_close(model(x, scale=scale), plain(x, scale=scale))
        torch.testing.assert_close(model(x=x), plain(x=x))
        assert fused_in(model, x) == 2

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
        model, _ = kn.convert(copy.deepcopy(plain))
        assert [fused_in(model, X) for _ in range(2)] == [0, 1]
        plain.steps.append(3)
        model.steps.append(3)
        torch.testing.assert_close(model(X), plain(X))
        assert fused_in(model, X) == 1
        plain.on = model.on = False
        torch.testing.assert_close(model(X), plain(X))
        assert fused_in(model, X) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_compiled_parts():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    compiled = torch.compile(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), backend="aot_eager")
    plain = nn.Sequential(scripted, compiled, nn.BatchNorm2d(3), nn.ReLU()).eval()
    with torch.no_grad():
        expected = plain(X)
        model, _ = kn.convert(plain)
        for _ in range(3):
            torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_a_check_of_the_input_still_raises():
    model, report = kn.convert(Checked())
    assert [fused_in(model, X) for _ in range(2)] == [0, 1]
    assert report.rows[0]["reason"] is None
    with pytest.raises(KeyError, match="5 channels"):
        model(torch.randn(2, 5, 4, 4))
    with pytest.raises(AssertionError, match="four dimensions"):
        model(torch.randn(2, 3, 4))
    assert fused_in(model, X) == 1


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model = a_net()
    before = [(type(m), dict(m.__dict__), dict(m._buffers)) for m in model.modules()]
    add_scope, calls = module_of_convert.add_scope, []

    def fail(module):
        calls.append(module)
        if len(calls) == 2:
            raise RuntimeError("injected")
        add_scope(module)

    monkeypatch.setattr(module_of_convert, "add_scope", fail)
    with pytest.raises(RuntimeError, match="injected"):
        kn.convert(model)
    for module, (kind, attributes, buffers) in zip(model.modules(), before, strict=True):
        assert type(module) is kind
        assert module.__dict__.keys() == attributes.keys()
        assert module._buffers == buffers
        assert not {**module._forward_hooks, **module._forward_pre_hooks}


def test_wrong_arguments():
    with pytest.raises(TypeError, match="convert: model must be"):
        kn.convert(3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="matches no batch norm"):
        kn.convert(a_net(), where="nowhere")


@pytest.mark.parametrize("operation", [kn.convert, kn.revert, kn.prepare_export, lambda state: kn.fold(state, X)])
def test_a_state_dict_is_said_to_be_one(operation):
    """The error is one line, without the values of the tensors."""
    state = nn.Sequential(*(nn.Conv2d(3, 40, 3) for _ in range(9))).state_dict()
    with pytest.raises(TypeError, match=r"got an OrderedDict of 18 entries\. A state_dict has no layers") as raised:
        operation(state)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", [[torch.zeros(9, 9)] * 9, "x" * 1000, nn.Sequential(*[nn.ReLU()] * 40), b"x" * 1000])
def test_errors_do_not_print_whole_values(value):
    with pytest.raises((TypeError, ValueError)) as raised:
        kn.prepare_export(nn.Sequential(), training=value)
    assert len(str(raised.value)) < 300
