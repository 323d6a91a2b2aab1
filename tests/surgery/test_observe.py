"""The record of a run: which calls make and read each tensor."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from surgery.folded import bits
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

import keelnorm as kn
from keelnorm.surgery.observation.nested_tensors import call_of, map_tensors, tensors_in
from keelnorm.surgery.observation.observe import observe
from keelnorm.surgery.snapshot import preserved


class Runs(nn.Module):
    """A model whose forward is a given function."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def readers(forward, **modules):
    """The recorded readers of the output of ``first``, and its holders."""
    model = Runs(forward, first=nn.Linear(4, 4), **modules).eval()
    trace = observe(model, (torch.randn(2, 4),))
    [call] = trace.calls_of(model.first)
    [value] = call.outputs
    return [str(reader) for reader in trace.readers(value)], trace.holders(value)


READS = {
    "a function": (lambda m, x: F.relu(m.first(x)), ["relu"]),
    "a method": (lambda m, x: m.first(x).relu(), ["relu"]),
    "an operator": (lambda m, x: m.first(x) + 1, ["add"]),
    "a number first": (lambda m, x: 1 - m.first(x), ["rsub"]),
    "an index": (lambda m, x: m.first(x)[0], ["getitem"]),
    "an attribute that is a view": (lambda m, x: m.first(x).mT, ["mT"]),
    "data": (lambda m, x: m.first(x).data, ["data"]),
    "a list of tensors": (lambda m, x: torch.cat([x, m.first(x)]), ["cat"]),
    "a keyword": (lambda m, x: F.relu(input=m.first(x)), ["relu"]),
    "in place": (lambda m, x: m.first(x).relu_(), ["relu"]),
    "an assignment": (lambda m, x: m.first(x).__setitem__(0, 1), ["setitem"]),
    "a number": (lambda m, x: x * m.first(x).sum().item(), ["sum"]),
    "an operator of torch.ops": (lambda m, x: torch.ops.aten.relu(m.first(x)), ["relu"]),
}


@pytest.mark.parametrize("name", READS)
def test_who_reads(name):
    forward, expected = READS[name]
    assert readers(forward) == (expected, [])


def test_two_readers():
    def forward(m, x):
        y = m.first(x)
        return F.relu(y) + y.sigmoid()

    assert readers(forward) == (["relu", "sigmoid"], [])


@pytest.mark.parametrize(
    "ask",
    [
        lambda y: y.shape, lambda y: y.size(0), lambda y: y.dim(), lambda y: y.dtype, lambda y: y.device, len,
        lambda y: y.numel(), lambda y: torch.ones(8).view_as(y),
        lambda y: y.is_contiguous(), lambda y: torch.zeros_like(y), lambda y: y.new_zeros(2),
    ],
)  # fmt: skip
def test_asking_about_a_tensor_reads_nothing(ask):
    def forward(m, x):
        ask(y := m.first(x))
        return F.relu(y)

    assert readers(forward) == (["relu"], [])


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(), nn.AlphaDropout()])
def test_what_hands_a_tensor_on_reads_nothing(between):
    assert readers(lambda m, x: F.relu(m.between(m.first(x))), between=between.eval()) == (["relu"], [])


@dataclasses.dataclass
class Output:
    parts: dict[str, list[torch.Tensor]]


def test_what_is_returned_is_read_by_the_caller():
    for result in (
        lambda y: y,
        lambda y: {"a": (1, [y])},
        lambda y: Output({"y": [y]}),
        lambda y: collections.deque([y]),
    ):
        assert readers(lambda m, x, result=result: result(m.first(x))) == ([], ["returned by the model"])


def test_what_is_kept_is_told():
    def forward(m, x):
        m.last = {"y": m.first(x)}
        return x

    assert readers(forward) == ([], ["kept in the model"])


def test_hooks_see_what_enters_and_leaves_their_module():
    hooked = nn.Sequential(nn.ReLU())
    hooked.register_forward_pre_hook(lambda *_: None)
    assert readers(lambda m, x: m.hooked(m.first(x)), hooked=hooked) == (["relu"], ["seen by a hook of 'hooked'"])


def test_a_module_in_which_nothing_is_seen_is_a_reader():
    class Opaque(nn.Module):
        def forward(self, x):
            with torch._C.DisableTorchFunction(), _disable_current_modes():  # as a kernel that is no operator of torch
                return x * 2

    assert readers(lambda m, x: m.opaque(m.first(x)), opaque=Opaque()) == (["Opaque 'opaque'"], [])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_operators_of_scripted_functions_and_of_autograds_are_seen():
    class Clamp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clamp(min=0)

    scripted = torch.jit.trace(lambda x: x * torch.sigmoid(x), torch.ones(2, 4))
    assert readers(lambda m, x: scripted(m.first(x))) == (["sigmoid", "mul"], [])
    assert readers(lambda m, x: Clamp.apply(m.first(x))) == (["clamp"], [])


def test_a_change_in_place_makes_another_value():
    model = Runs(lambda m, x: m.second(m.first(x).relu_()), first=nn.Linear(4, 4), second=nn.Linear(4, 4)).eval()
    trace = observe(model, (torch.randn(2, 4),))
    [first], [second] = trace.calls_of(model.first), trace.calls_of(model.second)
    assert first.outputs[0].tensor == second.inputs[0].tensor
    assert first.outputs[0].version < second.inputs[0].version
    assert str(trace.writer(second.inputs[0])) == "relu"
    assert str(trace.writer(first.outputs[0])) == "linear"


def test_a_change_through_a_view_has_no_writer():
    def forward(m, x):
        y = m.first(x)
        y[:, 1:].relu_()
        return m.second(y)

    model = Runs(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4)).eval()
    trace = observe(model, (torch.randn(2, 4),))
    [second] = trace.calls_of(model.second)
    assert trace.writer(second.inputs[0]) is None
    assert not trace.is_given(second.inputs[0])


def test_calls_have_their_place():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    trace = observe(model, (x := torch.randn(2, 4),))
    assert [call.path for call in trace.modules] == ["", "0", "0.0", "0.1", "1"]
    whole, block, linear, relu, _ = trace.modules
    assert linear.inside is block
    assert relu.within(whole)
    assert not whole.within(relu)
    assert linear.inputs == block.inputs == whole.inputs
    assert trace.is_given(whole.inputs[0])
    assert [str(call) for call in trace.functions] == ["linear", "relu", "linear"]
    assert trace.output is trace.modules[-1].result
    assert torch.equal(trace.output, model(x))


def test_keelnorms_pairs_run_unfused():
    model = kn.Sequential(nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4), nn.ReLU()).eval()
    trace = observe(model, (torch.randn(2, 3, 4, 4),))
    [norm] = trace.calls_of(model[1])
    assert norm.kwargs == {}
    assert [str(reader) for reader in trace.readers(norm.outputs[0])] == ["relu"]


def test_the_model_is_as_before():
    def forward(m, x):
        m.calls.add_(1)
        m.calls = m.calls + 1
        m.extra = torch.zeros(1)
        return x.mul_(2)

    model = Runs(forward, first=nn.Dropout(), norm=nn.BatchNorm1d(4))
    model.register_buffer("calls", torch.zeros(1))
    model.register_buffer("extra", None)
    before, state, x = bits(model), torch.get_rng_state(), torch.ones(2, 4)
    trace = observe(model, (x,))
    assert bits(model) == before
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, torch.ones(2, 4))
    assert trace.output is x


def test_the_model_is_as_before_when_it_fails():
    def forward(m, x):
        m.first(x)
        raise KeyError("no")

    model = Runs(forward, first=nn.BatchNorm1d(4)).train()
    before = bits(model)
    with pytest.raises(KeyError):
        observe(model, (torch.randn(2, 4),))
    assert bits(model) == before
    assert torch.randn(2).relu().shape == (2,)  # no mode is left


def test_inference_mode_is_refused():
    model = Runs(torch.inference_mode()(lambda m, x: m.first(x).relu()), first=nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match=r"torch\.inference_mode"):
        observe(model, (torch.randn(2, 4),))


def test_gradients_are_off_inside_preserved():
    with preserved(nn.Linear(1, 1)):
        assert not torch.is_grad_enabled()


def test_tensors_are_found_in_order():
    a, b, c, d = (torch.tensor(float(i)) for i in range(4))
    found = tensors_in({"x": [a, (b, None, 3)], "y": Output({"z": [c]}), "w": "text", "m": nn.Linear(1, 1), "v": d})
    assert [float(value) for value in found] == [0, 1, 2, 3]
    loop: list[Any] = [a]
    loop.append(loop)
    assert tensors_in(loop) == [a]


def test_tensors_are_changed_in_a_copy():
    point = collections.namedtuple("point", "x y")
    given = {"a": [torch.ones(1)], "b": point(torch.ones(1), 2), "c": collections.UserDict(d=torch.ones(1))}
    changed = map_tensors(torch.Tensor.double, given)
    assert changed["a"][0].dtype == changed["b"].x.dtype == changed["c"]["d"].dtype == torch.float64
    assert type(changed["c"]) is collections.UserDict
    assert given["a"][0].dtype == given["c"]["d"].dtype == torch.float32


def test_examples():
    x = torch.ones(1)
    assert call_of("fold", x) == ((x,), {})
    assert call_of("fold", (x, 2)) == ((x, 2), {})
    assert call_of("fold", collections.UserDict(x=x)) == ((), {"x": x})
    with pytest.raises(TypeError, match=r"example must be a tensor.*\(example,\)"):
        call_of("fold", [x])
