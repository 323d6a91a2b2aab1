"""After any error the model is as before, and a fold that would change the model is an error."""

from __future__ import annotations

import collections
import json

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from surgery.folded import bits, output, randomize, relative
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

import keelnorm as kn
from keelnorm.surgery.folding import fold, fold_plan

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, forward=None):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.run = forward
        self.calls = 0
        randomize(self)

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.run(self, x) if self.run else self.head(F.relu(self.norm(self.conv(x)))) * scale


def check_raises(model, error, match, *, example=X, **keywords):
    """Check that folding raises, on a copy and in place, and leaves the model as before, bit for bit."""
    before, state = bits(model), torch.get_rng_state()
    for inplace in (False, True):
        with pytest.raises(error, match=match):
            kn.fold(model, example, inplace=inplace, **keywords)
        assert bits(model) == before
        assert torch.equal(torch.get_rng_state(), state)


def test_the_model_must_be_in_evaluation():
    check_raises(Model().train(), ValueError, r"call model\.eval\(\) first")


def test_other_arguments():
    check_raises(Model(), TypeError, "example must be a tensor", example=[X])
    check_raises(Model(), ValueError, "tolerance must be None or a number", tolerance=-1)
    check_raises(Model(), ValueError, "matches no batch norm", where="nothing")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        kn.fold("model", X)


def test_a_model_without_numbers():
    with pytest.raises(ValueError, match="on the meta device"):
        kn.fold(Model().to("meta"), X.to("meta"))


def test_inside_inference_mode():
    model = Model()
    with torch.inference_mode():
        new, report = kn.fold(model, X * 1)
    assert report.summary["folded"] == 1
    assert not any(value.is_inference() for value in new.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_scripted_and_compiled_models():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check_raises(torch.compile(Model()), TypeError, "the model is compiled, so what it runs can't be changed")
    with pytest.raises(TypeError, match="0 is a ScriptModule"):
        kn.fold(nn.Sequential(torch.jit.trace(block.eval(), X)).eval(), X)
    block.compile()
    check_raises(nn.Sequential(block).eval(), TypeError, "0 is compiled")


def test_a_model_that_fails():
    def fails(m, x):
        m.norm(m.conv(x))
        raise KeyError("no")

    check_raises(Model(fails), KeyError, "no")


@pytest.mark.parametrize("step", ["layer_difference", "absorb_following"])
def test_a_failure_while_planning(step, monkeypatch):
    monkeypatch.setattr(fold_plan, step, lambda *_, **__: 1 / 0)
    check_raises(Model(), ZeroDivisionError, "division")


@pytest.mark.parametrize("verify", [True, False])
def test_a_failure_after_the_change(verify, monkeypatch):
    monkeypatch.setattr(fold, "difference", lambda *_: 1 / 0)
    check_raises(Model(), ZeroDivisionError, "division", verify=verify)


def test_a_failure_in_the_middle_of_the_change(monkeypatch):
    class Fails(nn.Identity):
        def eval(self):
            raise KeyError("no")

    monkeypatch.setattr(nn, "Identity", Fails)
    check_raises(Model(), KeyError, "no", verify=False)


def test_a_forward_that_asks_the_batch_norm():
    def asks(m, x):
        return m.head(F.relu(m.norm(m.conv(x)) * m.norm.num_features))

    match = r"does not run on the example \(AttributeError: 'Identity' .*'num_features'\); the model is as before"
    check_raises(Model(asks), RuntimeError, match)
    check_raises(Model(asks), RuntimeError, match, verify=False)


def test_a_batch_norm_in_a_list():
    model = Model(lambda m, x: m.head(F.relu(m.held[0](m.conv(x)))))
    vars(model)["held"] = [model.norm]
    check_raises(model, RuntimeError, r"would differ by .* in float64, more than 1e-08, though each layer")


def test_a_reader_that_cannot_be_seen():
    def hidden(m, x):
        y = m.conv(x)
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # like a kernel that is no operator of torch
            z = y * 2
        return F.relu(m.norm(y)) + z

    check_raises(Model(hidden), RuntimeError, "the model is as before")
    _, report = kn.fold(Model(hidden), X, verify=False)  # the report shows the difference
    assert report.summary["difference"] > 0.01


def test_a_model_that_gives_another_output_each_time():
    check_raises(
        Model(lambda m, x: m.head(F.relu(m.norm(m.conv(x)))) * m.calls), RuntimeError, "another output each time"
    )


def test_graph_modules_and_wrappers():
    layers = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for model in (torch.fx.symbolic_trace(layers), nn.DataParallel(layers).eval()):
        new, report = kn.fold(model, X)
        assert report.summary["folded"] == 1
        assert relative(output(new, X), output(model, X)) < 1e-6


def test_another_number_of_outputs():
    model = Model(lambda m, x: [m.head(F.relu(m.norm(m.conv(x))))] * m.calls)
    check_raises(model, RuntimeError, "would differ by inf")
    assert kn.fold(model, X, verify=False)[1].summary["difference"] == torch.inf


def test_complex_outputs():
    model = Model(lambda m, x: torch.fft.fft(m.head(F.relu(m.norm(m.conv(x))))))
    _, report = kn.fold(model, X)
    assert report.summary["float64"] < 1e-12
    assert report.notes == []


def test_a_model_that_does_not_run_in_float64():
    model = Model(lambda m, x: m.head(F.relu(m.norm(m.conv(x.float())))))
    new, report = kn.fold(model, X)
    assert report.summary["folded"] == 1
    assert "float64" not in report.summary
    assert report.notes[0].startswith("Not compared in float64, where the model does not run: RuntimeError: ")
    assert relative(output(new, X), output(model, X)) < 1e-6


def test_without_verification():
    _, report = kn.fold(Model(), X, verify=False)
    assert "float64" not in report.summary
    assert report.summary["difference"] < 1e-6


def test_random_numbers_are_the_same_in_every_run():
    def noisy(m, x):
        return m.head(F.relu(m.norm(m.conv(x)))) + torch.randn(2, 2, 4, 4).to(x.dtype)

    model, state = Model(noisy), torch.get_rng_state()
    _, report = kn.fold(model, X)
    assert report.summary["difference"] < 1e-6
    assert torch.equal(torch.get_rng_state(), state)


def test_integers_in_the_output():
    def decides(m, x):
        y = F.relu(m.norm(m.conv(x)))
        return y, y.mul(1e9).long()  # rounding changes this

    _, report = kn.fold(Model(decides), X)
    assert report.notes == ["Integers or booleans in the output changed on the example, as rounding can cause."]


def test_an_output_in_which_nothing_can_be_compared():
    _, report = kn.fold(Model(lambda m, x: (y for y in [m.head(F.relu(m.norm(m.conv(x))))])), X)
    assert "so the whole model was not compared" in report.notes[0]


def test_the_example_is_left_alone_and_may_be_changed_by_the_model():
    model, x = Model(lambda m, x: m.head(F.relu(m.norm(m.conv(x.mul_(2)))))), X.clone()
    _, report = kn.fold(model, x)
    assert torch.equal(x, X)
    assert report.summary["difference"] < 1e-6


@pytest.mark.parametrize("example", [(X,), (X, 2.0), {"x": X}, {"x": X, "scale": 2.0}, collections.UserDict(x=X)])
def test_examples(example):
    assert kn.fold(Model(), example)[1].summary["folded"] == 1


def test_nan_in_the_output_that_was_there_before():
    model = Model(lambda m, x: torch.log(m.head(F.relu(m.norm(m.conv(x)))) - 1))
    assert output(model, X).isnan().any()
    _, report = kn.fold(model, X)
    assert report.summary["difference"] < 1e-3


def test_the_report_is_plain_data():
    _, report = kn.fold(Model(), X)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["rows"] == [
        {"path": "norm", "kind": "BatchNorm2d", "into": "conv", "where": "before", "reason": ""}
        | {"difference": report.rows[0]["difference"]}
    ]
    assert list(told["summary"]) == ["folded", "left", "difference", "float64"]


def test_a_model_without_batch_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    new, report = kn.fold(model, X)
    assert report.summary == {"folded": 0, "left": 0, "difference": 0.0, "float64": 0.0}
    assert torch.equal(output(new, X), output(model, X))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_converted_model(inplace):
    """Folding undoes the conversion; if it fails, the model is converted as before."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    model, _ = kn.convert(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="expected input"):
        kn.fold(model, torch.randn(2, 5, 6, 6), inplace=inplace)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert type(model[1]) is kn.BatchNorm2d
    folded, report = kn.fold(model, x, inplace=inplace)
    assert report.summary["folded"] == 1
    assert (folded is model) == inplace
    torch.testing.assert_close(folded(x), expected)
