"""What ``kn.functional.batch_norm`` refuses, with which words, and that the running statistics stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn

C = 5
X = torch.randn(4, C, 3, 3, generator=torch.Generator().manual_seed(0))
ones = torch.ones

#: name: (keywords that differ from a legal call's, exception, words)
CALLS = {
    "x None": ({"input": None}, TypeError, ("x must be a tensor of shape (N, C, *S)", "got None")),
    "x number": ({"input": 1.5}, TypeError, ("x must be a tensor", "got 1.5 (float)")),
    "x array": ({"input": X.numpy()}, TypeError, ("x must be a tensor", "ndarray")),
    "x list": ({"input": [1.0]}, TypeError, ("x must be a tensor", "got [1.0] (list)")),
    "x 0-d": (
        {"input": torch.tensor(1.0)},
        ValueError,
        ("two or more dimensions", "channels second", "shape () on cpu"),
    ),
    "x 1-d": ({"input": ones(C)}, ValueError, ("two or more dimensions", "channels second", "shape (5,) on cpu")),
    "x int": (
        {"input": X.int()},
        TypeError,
        ("real floating-point", "an int32 tensor of shape (4, 5, 3, 3)", "x.float()"),
    ),
    "x complex": ({"input": X + 0j}, TypeError, ("real floating-point", "a complex64 tensor")),
    "x meta": ({"input": X.to("meta")}, ValueError, ("x is on meta", "must be there too", "on cpu")),
    **{
        f"{name} {came}": ({name: value}, error, (name, *words))
        for name in ("weight", "bias", "running_mean", "running_var")
        for came, value, error, words in (
            ("short", ones(C - 1), ValueError, ("x has 5 channels", "(5,)", "a float32 tensor of shape (4,) on cpu")),
            ("scalar", torch.tensor(1.0), ValueError, ("x has 5 channels", "(5,)", "shape () on cpu")),
            ("2-d", ones(1, C), ValueError, ("x has 5 channels", "(5,)", "shape (1, 5) on cpu")),
            ("int", ones(C).int(), TypeError, ("real floating-point tensor or None", "an int32 tensor")),
            ("complex", ones(C) + 0j, TypeError, ("real floating-point tensor or None", "a complex64 tensor")),
            ("number", 1.0, TypeError, ("real floating-point tensor or None", "got 1.0 (float)")),
            ("meta", ones(C, device="meta"), ValueError, ("x is on cpu", "must be there too", "on meta")),
        )
    },
    "no running_var": ({"running_var": None}, ValueError, ("come together or not at all", "running_var is None")),
    "no running_mean": ({"running_mean": None}, ValueError, ("come together or not at all", "running_mean is None")),
    "residual bool": ({"residual": X > 0}, TypeError, ("residual", "real floating-point", "a bool tensor")),
    "residual shape": ({"residual": X[:, :1]}, ValueError, ("residual", "(4, 5, 3, 3)", "shape (4, 1, 3, 3) on cpu")),
    "residual meta": ({"residual": X.to("meta")}, ValueError, ("residual", "x is on cpu", "on meta")),
    "residual number": ({"residual": 1}, TypeError, ("residual", "real floating-point", "got 1 (int)")),
    "activation name": ({"activation": "prelu"}, ValueError, ("activation", "None, 'relu'", "'prelu' (str)")),
    "activation module": ({"activation": nn.PReLU()}, ValueError, ("activation", "'softplus'", "LeakyReLU", "PReLU")),
    "activation list": ({"activation": ["relu"]}, ValueError, ("activation", "None, 'relu'", "['relu'] (list)")),
    "activation dict": ({"activation": {}}, ValueError, ("activation", "None, 'relu'", "{} (dict)")),
}


def refuse(changes, error, words):
    """Make the call, legal but for ``changes``, and look at the error and at the moments."""
    moments = {"running_mean": torch.randn(C), "running_var": torch.rand(C)}
    before = {name: value.clone() for name, value in moments.items()}
    keywords = {"input": X, **moments, "weight": ones(C), "bias": ones(C), "training": True} | changes
    with pytest.raises(error) as caught:
        kn.functional.batch_norm(**keywords)
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert all(torch.equal(moments[name], before[name]) for name in moments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("changes", "error", "words"), CALLS.values(), ids=CALLS)
def test_bad_calls(changes, error, words, training, backend):
    refuse(changes | {"training": training}, error, ("batch_norm", *words))


def test_inference_without_statistics(backend):
    refuse(
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        ("inference needs running_mean and running_var", "training=True"),
    )


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1, 1), (1, C, 1, 1, 1, 1)])
def test_one_value_per_channel(shape, backend):
    refuse(
        {"input": torch.randn(shape)}, ValueError, ("one value per channel has no variance", f"shape {shape} on cpu")
    )


def test_it_is_x_that_does_not_fit(backend):
    """Where all vectors agree; and maybe the channels stand at the end."""
    vectors = dict.fromkeys(("running_mean", "running_var", "weight", "bias"), ones(C))
    for shape, hint in (((4, 3, 3, C), r"give x.movedim\(-1, 1\)"), ((4, 3, 3, 2), "")):
        for given in (vectors, vectors | {"weight": None, "bias": None}):
            listed = ", ".join(
                name for name in ("weight", "bias", "running_mean", "running_var") if given[name] is not None
            )
            words = rf"batch_norm: x has 3 channels \(dimension 1 of .*\), and {listed} 5; got .*{hint}$"
            with pytest.raises(ValueError, match=words):
                kn.functional.batch_norm(torch.zeros(shape), **given)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_running_statistics_have_no_gradient(name, training, backend):
    """As torch, which has none either; under no_grad nobody asks for one."""
    moments = {"running_mean": torch.zeros(C), "running_var": ones(C)}
    moments[name].requires_grad_()
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="requires_grad"):
            F.batch_norm(x, **moments, training=training)
        with pytest.raises(
            RuntimeError, match=f"batch_norm: .*not differentiable in its running statistics, so {name}.*detach it"
        ):
            kn.functional.batch_norm(x, **moments, training=training)
    assert torch.equal(moments["running_mean"].detach(), torch.zeros(C))
    with torch.no_grad():
        found = kn.functional.batch_norm(X, **{key: value.clone() for key, value in moments.items()}, training=training)
        expected = F.batch_norm(X, **{key: value.clone() for key, value in moments.items()}, training=training)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [math.nan, math.inf, -math.inf])
def test_momentum_that_makes_nan(momentum, backend):
    refuse({"momentum": momentum}, ValueError, ("momentum must be finite", str(momentum)))


@pytest.mark.parametrize("changes", [{"eps": "x"}, {"momentum": "x"}, {"eps": None}, {"eps": [1e-5]}], ids=str)
def test_what_is_no_number(changes, backend):
    refuse(changes, TypeError, ("eps and momentum must be numbers",))


def test_padding_is_looked_at_without_a_mask(backend):
    refuse({"padding": "middle"}, ValueError, ("padding must be one of", "'middle'"))


@pytest.mark.parametrize(
    ("training", "eps"), [(True, 0.0), (True, -1.0), (True, math.nan), (False, -1.0), (False, math.nan)]
)
def test_eps_that_makes_nan(training, eps, backend):
    """As torch: positive in training, not negative in evaluation."""
    refuse({"eps": eps, "training": training}, ValueError, ("eps", str(eps)))


@pytest.mark.parametrize("momentum", [None])
def test_momentum_none_is_a_layers_affair(momentum, backend):
    with pytest.raises((TypeError, ValueError), match="momentum"):
        kn.functional.batch_norm(X, torch.zeros(C), ones(C), training=True, momentum=momentum)


def test_too_many_positional_arguments():
    with pytest.raises(TypeError, match="positional"):
        kn.functional.batch_norm(X, None, None, None, None, True, 0.1, 1e-5, "relu")  # type: ignore[call-arg]
