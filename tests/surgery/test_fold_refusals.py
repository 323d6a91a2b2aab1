"""Batch norms that can't be folded stay unchanged, and the report gives the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from surgery.folded import bits, randomize, reason
from torch import nn

import keelnorm as kn

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model(nn.Module):
    """A convolution and a batch norm with a given forward; by default both and a ReLU."""

    def __init__(self, forward=None, conv=None, norm=None, **modules):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(3)
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward or (lambda m, x: F.relu(m.norm(m.conv(x))))
        randomize(self).double()

    def forward(self, x):
        return self.run(self, x)


def unusual(change, **modules):
    """A model with one change."""
    model = Model(**modules)
    change(model)
    return model


def twice(m, x):
    return F.relu(m.norm(m.conv(m.conv(x))))


def read_by_another(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)) + y


def returned(m, x):
    y = m.conv(x)
    return F.relu(m.norm(y)), y


def functional(m, x):
    return F.relu(m.norm(F.conv2d(x, m.conv.weight)))


def past_the_call(m, x):
    return F.relu(m.norm(m.conv.forward(x)))


def reads_the_weight(m, x):
    return F.relu(m.norm(m.conv(x))) + m.conv.weight.norm()


def reads_the_scale(m, x):
    return F.relu(m.norm(m.conv(x))) + m.norm.weight.sum()


def keeps(m, x):
    m.features = m.conv(x)
    return F.relu(m.norm(m.features))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def set_forward(m):
    m.conv.forward = lambda x: x


def set_norm_forward(m):
    m.norm.forward = lambda x: x


def tie(m):
    m.other.weight = m.conv.weight


def share_norm(m):
    m.alias = m.norm


def share_block(m):
    m.alias = m.conv


REFUSED = {
    "called twice": (lambda: Model(twice), "Conv2d 'conv' is called 2 times"),
    "norm called twice": (lambda: Model(lambda m, x: m.norm(F.relu(m.norm(x)))), "is called 2 times"),
    "norm at two paths": (lambda: unusual(share_norm), "is one module at several paths (norm, alias)"),
    "convolution at two paths": (lambda: unusual(share_block), "Conv2d 'conv' is one module at several paths"),
    "tied weight": (lambda: unusual(tie, other=nn.Conv2d(3, 3, 3)), "shares its weight with another module"),
    "in training": (lambda: unusual(lambda m: m.norm.train()), "is in training mode; call its eval()"),
    "no moments": (lambda: Model(norm=nn.BatchNorm2d(3, track_running_stats=False)), "has no running statistics"),
    "NaN": (lambda: unusual(lambda m: m.norm.running_mean.fill_(torch.inf)), "running_mean that is not finite"),
    "negative": (lambda: unusual(lambda m: m.norm.running_var.fill_(-1)), "running_var that is not positive"),
    "read by another": (lambda: Model(read_by_another), "what it normalizes is also read by add"),
    "functional": (lambda: Model(functional), "its input comes from conv2d; its output is read by relu"),
    "past the call": (lambda: Model(past_the_call), "its input comes from conv2d"),
    "weight is read": (lambda: Model(reads_the_weight), "'conv' has a weight that is read outside its forward"),
    "scale is read": (lambda: Model(reads_the_scale), "has a weight that is read outside its forward"),
    "kept": (lambda: Model(keeps), "what it normalizes is also kept in the model"),
    "hook": (lambda: unusual(lambda m: m.conv.register_forward_hook(lambda *_: None)), "also seen by a hook of 'conv'"),
    "norm's hook": (lambda: unusual(lambda m: m.norm.register_forward_hook(lambda *_: None)), "has hooks"),
    "backward hook": (
        lambda: unusual(lambda m: m.conv.register_full_backward_hook(lambda *_: None)), "also seen by a hook of 'conv'",
    ),
    "pre-hook": (lambda: unusual(lambda m: nn.utils.weight_norm(m.conv)), "also seen by a hook of 'conv'"),
    "parametrized": (
        lambda: unusual(lambda m: nn.utils.parametrizations.spectral_norm(m.conv).eval()),
        "'conv' has a parametrization (torch.nn.utils.parametrize.remove_parametrizations removes it)",
    ),
    "norm parametrized": (
        lambda: unusual(lambda m: nn.utils.parametrizations.weight_norm(m.norm, dim=None)), "has a parametrization"
    ),
    "centred": (lambda: unusual(lambda m: kn.nn.center_weights(m.conv)), "has a parametrization"),
    "own forward": (lambda: Model(conv=OwnForward(3, 3, 3)), "has a forward of its own (OwnForward)"),
    "own convolution": (lambda: Model(conv=OwnConvolution(3, 3, 3)), "has a forward of its own (OwnConvolution)"),
    "own norm": (lambda: Model(norm=OwnNorm(3)), "is a OwnNorm, which may compute more than batch norm"),
    "norm's forward is set": (lambda: unusual(set_norm_forward), "has a forward of its own"),
    "never called": (lambda: Model(lambda m, x: m.conv(x)), "was not called on the example"),
    "after an addition": (lambda: Model(lambda m, x: F.relu(m.norm(m.conv(x) + x))), "its input comes from add"),
    "after a concatenation": (
        lambda: Model(lambda m, x: F.relu(m.norm(torch.cat([m.conv(x), x], 1)[:, :3]))), "its input comes from getitem"
    ),
    "on the model's input": (lambda: Model(lambda m, x: F.relu(m.norm(x))), "it normalizes the model's input"),
    "returned": (lambda: Model(lambda m, x: m.norm(x)), "its output is returned by the model"),
    "read twice": (lambda: Model(lambda m, x: torch.relu(y := m.norm(x)) + y), "its output is read by relu, add"),
    "not read": (lambda: Model(lambda m, x: (m.norm(x), x)[1]), "its output is read by nobody"),
    "in place": (lambda: Model(lambda m, x: F.relu(m.norm(m.conv(x).mul_(2)))), "its input comes from mul"),
    "changed by a view": (lambda: Model(lambda m, x: change_view(m, x)), "its input has an unknown origin"),
    "of a recurrence": (lambda: Model(norm=nn.BatchNorm1d(6), conv=nn.GRU(6, 6), forward=recurrent), "comes from gru"),
    "changed later": (lambda: Model(changed_later, conv=nn.Conv2d(3, 3, 1)), "its input is changed in place later"),
    "changed later by a view": (
        lambda: Model(lambda m, x: changed_later(m, x, ...), conv=nn.Conv2d(3, 3, 1)), "is changed in place later"
    ),
    "shift before zeros": (
        lambda: Model(lambda m, x: F.relu(m.conv(m.norm(x)))), "'conv' pads with zeros, which would have to be shifted"
    ),
    "shift before a transposed one": (
        lambda: Model(lambda m, x: F.relu(m.conv(m.norm(x))), conv=nn.ConvTranspose2d(3, 3, 3)), "'conv' is transposed"
    ),
    "NaN in the weight": (
        lambda: unusual(lambda m: m.conv.weight.data[0].fill_(0).div_(0)), "'conv' has parameters that are not finite"
    ),
    "with modules": (lambda: unusual(lambda m: m.conv.add_module("a", nn.ReLU())), "'conv' has modules of its own"),
    "groups of a norm": (lambda: Model(norm=nn.BatchNorm1d(6), forward=rows), "its channels are not those of Conv2d"),
}  # fmt: skip


def changed_later(m, x, part=None):
    x = x * 2
    y = m.norm(x)
    (x if part is None else x[part]).relu_()  # an Identity in place of the batch norm would return this x
    return m.conv(y) + x


def recurrent(m, x):
    return F.relu(m.norm(m.conv(x[:, 0])[0]))


def rows(m, x):
    return F.relu(m.norm(m.conv(x).mean(1)))


def change_view(m, x):
    y = m.conv(x)
    y[:, 1:].mul_(2)
    return F.relu(m.norm(y))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, expected = REFUSED[name]
    model = make()
    if name in ("of a recurrence", "groups of a norm"):
        model.double()
    if name in ("NaN", "negative", "NaN in the weight", "in training"):  # its outputs can't be compared
        before = bits(model)
        _, report = kn.fold(model, X, verify=False)
        assert bits(model) == before
        [row] = report.rows
        assert row["into"] == ""
        assert expected in row["reason"]
    else:
        assert expected in reason(model, X, path="norm")


def test_the_producers_output_is_returned():
    model = Model(returned)
    _, report = kn.fold(model, X)
    assert "what it normalizes is also returned by the model" in report.rows[0]["reason"]


ARGUMENTS = {
    "residual": (lambda m, x: m.norm(m.conv(x), x), "argument 2"),
    "activation": (lambda m, x: m.norm(m.conv(x), activation="relu"), "activation="),
    "none": (lambda m, x: m.norm(m.conv(x), None, activation=None), "argument 2, activation="),
    "mask": (lambda m, x: m.norm(m.conv(x), mask=torch.ones(2, dtype=torch.bool)), "mask="),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_keelnorms_arguments(name):
    forward, said = ARGUMENTS[name]
    assert f"is called with more than its input ({said})" in reason(Model(forward, norm=kn.BatchNorm2d(3)), X)


VARIANTS = {
    "DomainBatchNorm": lambda: kn.DomainBatchNorm(3, 2),
    "SplitBatchNorm": lambda: kn.SplitBatchNorm(3),
    "WhiteningBatchNorm": lambda: kn.WhiteningBatchNorm(3),
    "ConditionalBatchNorm": lambda: kn.ConditionalBatchNorm(3, num_classes=2),
    "StepwiseBatchNorm": lambda: kn.StepwiseBatchNorm(3, 2),
    "VirtualBatchNorm": lambda: kn.VirtualBatchNorm(3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_whose_evaluation_is_their_own(name):
    model = Model(lambda m, x: m.conv(x), norm=VARIANTS[name]())
    _, report = kn.fold(model, X)
    assert f"is a {name}, which evaluates " in report.rows[0]["reason"]


def test_a_layer_by_itself():
    layer = randomize(nn.BatchNorm2d(3)).double()
    assert reason(layer, X) == "is the model itself"


def test_a_lazy_layer_that_has_not_run():
    model = Model()
    model.lazy = kn.LazyBatchNorm2d().eval()
    _, report = kn.fold(model, X, inplace=True)
    assert [row["reason"] for row in report.rows] == ["", "was not called on the example"]


def test_a_difference_that_is_too_large():
    model, x = Model(conv=nn.Conv2d(3, 3, 3, bias=False)).float(), X.float() + 1e5
    with torch.no_grad():
        model.norm.running_mean.copy_(
            model.conv(x).mean((0, 2, 3))
        )  # much larger than the standard deviation: digits cancel
    _, report = kn.fold(model, x)
    assert "Conv2d 'conv' would differ by" in report.rows[0]["reason"]
    assert "of its largest output, more than 1.9e-06" in report.rows[0]["reason"]
    _, report = kn.fold(model, x, tolerance=1)
    assert report.summary["folded"] == 1
    assert "more than 0" in kn.fold(Model().float(), X.float(), tolerance=0)[1].rows[0]["reason"]
