"""Import from and export to Keras and Flax, compared with their formulas in numpy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import nn

import keelnorm as kn

KERAS = ("gamma", "beta", "moving_mean", "moving_variance")
FLAX = ("scale", "bias", "mean", "var")
SIDES = pytest.mark.parametrize(
    ("read", "write", "theirs"),
    [(kn.from_keras, kn.to_keras, KERAS), (kn.from_flax, kn.to_flax, FLAX)],
    ids=["keras", "flax"],
)


@st.composite
def layers(draw):
    """A layer's four vectors in torch's order; weight and bias may be missing."""
    dtype = draw(st.sampled_from([np.float32, np.float64, np.float16]))
    channels = draw(st.integers(1, 5))
    width = np.dtype(dtype).itemsize * 8
    values = [draw(arrays(dtype, channels, elements=st.floats(-100, 100, width=width))) for _ in range(3)]
    values.append(draw(arrays(dtype, channels, elements=st.floats(0, 100, width=width))))
    return [None if i < 2 and draw(st.booleans()) else value for i, value in enumerate(values)]


def packed(theirs, values, path=()):
    """The vectors of one layer under the library's names, nested under a path."""
    named = {name: value for name, value in zip(theirs, values, strict=True) if value is not None}

    def nest(tree):
        for part in reversed(path):
            tree = {part: tree}
        return tree

    if theirs is KERAS:
        return nest(named)
    split = ({k: v for k, v in named.items() if (k in FLAX[:2]) is first} for first in (True, False))
    params, stats = split
    return {"params": nest(params) if params else {}, "batch_stats": nest(stats)}


def flat(tree, path=()):
    if isinstance(tree, dict):
        return {k: v for name, below in tree.items() for k, v in flat(below, (*path, name)).items()}
    return {"/".join(path): tree}


def assert_same(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


@SIDES
@given(values=layers())
def test_one_layer_comes_back_to_the_bit(read, write, theirs, values):
    weights = packed(theirs, values)
    layer = read(weights)
    assert type(layer) is kn.BatchNorm
    assert_same(write(layer), weights)
    again = read(write(layer))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


@SIDES
@given(values=layers(), n=st.integers(2, 10**6))
def test_with_a_count_the_variance_is_unbiased(read, write, theirs, values, n):
    weights = packed(theirs, values)
    layer = read(weights, count=n)
    var = torch.from_numpy(values[3]).double() * n / (n - 1)
    assert torch.equal(layer.running_var, var.to(layer.running_var.dtype))
    if np.isfinite(layer.running_var.numpy()).all():
        back = flat(write(layer, count=n))
        last = next(value for name, value in back.items() if name.endswith(theirs[3]))
        smallest = np.finfo(values[3].dtype).smallest_subnormal
        np.testing.assert_allclose(last, values[3], rtol=2 * np.finfo(last.dtype).eps, atol=float(smallest))


@SIDES
def test_evaluation_and_training_are_theirs(read, write, theirs):
    rng = np.random.default_rng(0)
    gamma, beta, mean = (rng.normal(size=3) for _ in range(3))
    var = rng.uniform(0.5, 2, 3)
    x = rng.normal(size=(4, 5, 6, 3))  # channels last
    eps = 1e-3 if theirs is KERAS else 1e-5
    layer = read(packed(theirs, [gamma, beta, mean, var]), count=4 * 5 * 6)
    assert layer.eps == eps
    assert layer.momentum == pytest.approx(0.01)
    ours = torch.from_numpy(x).permute(0, 3, 1, 2)
    layer(ours)
    mean = 0.99 * mean + 0.01 * x.mean((0, 1, 2))
    var = 0.99 * var + 0.01 * x.var((0, 1, 2))
    trained = flat(write(layer, count=4 * 5 * 6))
    np.testing.assert_allclose(next(v for k, v in trained.items() if k.endswith(theirs[2])), mean, rtol=1e-12)
    np.testing.assert_allclose(next(v for k, v in trained.items() if k.endswith(theirs[3])), var, rtol=1e-12)

    plain = read(packed(theirs, [gamma, beta, mean, var])).eval()
    expected = (x - mean) / np.sqrt(var + eps) * gamma + beta
    np.testing.assert_allclose(plain(ours).permute(0, 2, 3, 1).detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
def test_what_is_missing_is_missing(gamma, beta):
    values = [np.ones(2) * 2 if gamma else None, np.ones(2) * 3 if beta else None, np.zeros(2), np.ones(2)]
    layer = kn.from_keras(packed(KERAS, values), epsilon=0.0).eval()
    assert (layer.weight is not None, layer.bias is not None) == (gamma, beta)
    y = layer(torch.ones(1, 2, dtype=torch.float64))
    assert y[0, 0].item() == (2 if gamma else 1) + (3 if beta else 0)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    for name, value in net.state_dict().items():
        if value.is_floating_point() and name != "0.weight":
            value.uniform_(0.5, 2)
    return net


@SIDES
@pytest.mark.parametrize("form", ["given", "/", "."])
def test_whole_models(read, write, theirs, form):
    source, target = network(), network()
    weights = write(source)
    if form != "given":
        weights = {name.replace("/", form): value for name, value in flat(weights).items()}
    # Other layers are ignored.
    extra = {"params/0/kernel": np.ones((1, 1)), "params/ln/scale": np.ones(2), "cache/0/mean": np.ones(1)}
    weights |= extra if theirs is FLAX and form != "given" else {}
    weights |= {"0/kernel": np.ones((1, 1)), "ln/gamma": np.ones(2)} if theirs is KERAS else {}
    for value in target.state_dict().values():
        value.zero_()
    state = read(weights)
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert not unexpected
    assert {key for key in missing if not key.endswith("num_batches_tracked")} == {"0.weight", "0.bias"}
    for key, value in state.items():
        assert torch.equal(target.state_dict()[key], source.state_dict()[key])
        assert torch.equal(read(weights, prefix="net.body")[f"net.body.{key}"], value)


def test_a_model_s_missing_weights_are_one_and_zero():
    state = kn.from_keras({"a": packed(KERAS, [None, None, np.zeros(2), np.ones(2)])})
    assert state["a.weight"].tolist() == [1, 1]
    assert state["a.bias"].tolist() == [0, 0]
    alone = kn.from_flax(packed(FLAX, [None, None, np.zeros(2), np.ones(2)]), prefix="bn")
    assert list(alone) == ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]


def test_a_count_for_each_layer():
    source = network()
    weights = kn.to_keras(source, count={"1": 2, "2.0": 5})
    np.testing.assert_allclose(weights["1/moving_variance"], source[1].running_var.numpy() / 2, rtol=1e-6)
    np.testing.assert_allclose(weights["2/0/moving_variance"], source[2][0].running_var.numpy() * 0.8, rtol=1e-6)
    back = kn.from_keras(weights, count={"1": 2, "2.0": 5})
    torch.testing.assert_close(back["2.0.running_var"], source[2][0].running_var)
    with pytest.raises(ValueError, match=r"an entry for '2\.0'"):
        kn.from_keras(weights, count={"1": 2})


def test_names_of_older_keras_and_memory_of_ones_own():
    mean = np.zeros(2, np.float32)
    var = torch.ones(2)
    state = kn.from_keras({"bn/moving_mean:0": mean, "bn/moving_variance:0": var})
    state["bn.running_mean"].add_(1)
    state["bn.running_var"].add_(1)
    assert mean.tolist() == [0, 0]
    assert var.tolist() == [1, 1]
    layer = kn.BatchNorm(2)
    kn.to_keras(layer)["moving_mean"][:] = 5
    assert layer.running_mean.tolist() == [0, 0]
    assert kn.to_flax(kn.BatchNorm(2, dtype=torch.bfloat16))["params"]["scale"].dtype == np.float32


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: kn.from_keras({"moving_mean": ONE}), ValueError, r"missing \['moving_variance'\]"),
        (lambda: kn.from_keras({"a/moving_mean": ONE}), ValueError, r"for 'a': missing \['moving_variance'\]"),
        (lambda: kn.from_keras(dict.fromkeys((*KERAS, "alpha"), ONE)), ValueError, r"unknown \['alpha'\]"),
        (lambda: kn.from_keras({"gamma": ONE}), ValueError, "missing"),
        (lambda: kn.from_keras({"a": {"gamma": ONE}}), ValueError, "no layer has"),
        (lambda: kn.from_keras({}), ValueError, "no layer has"),
        (lambda: kn.from_keras([ONE] * 4), TypeError, "needs a dict of arrays"),
        (lambda: kn.from_keras({0: ONE}), TypeError, "names must be strings"),  # type: ignore[dict-item]
        (lambda: kn.from_keras({"a/b": {"c": ONE}, "a": {"b/c": ONE}}), ValueError, "'a/b/c' is given twice"),
        (lambda: kn.from_keras({"moving_mean": ONE, "moving_variance": ONE[:1]}), ValueError, "shapes"),
        (lambda: kn.from_keras({"moving_mean": ONE, "moving_variance": [1, 1]}), TypeError, "'moving_variance'"),
        (lambda: kn.from_keras(packed(KERAS, [ONE] * 4), count=1), ValueError, "more than 1"),
        (lambda: kn.from_keras(packed(KERAS, [ONE] * 4), momentum=2), ValueError, "momentum"),
        (lambda: kn.from_keras(packed(KERAS, [ONE] * 4), epsilon=-1), ValueError, "epsilon"),
        (lambda: kn.from_keras(packed(KERAS, [ONE] * 4), momentum=None), ValueError, "momentum.*got None"),
        (lambda: kn.from_flax({"params": {"scale": ONE}}), ValueError, "needs the collections"),
        (lambda: kn.from_flax({"batch_stats": {"mean": ONE}}), ValueError, r"missing \['var'\]"),
        (lambda: kn.from_flax({"batch_stats": dict.fromkeys(("mean", "var", "u"), ONE)}), ValueError, "unknown"),
        (lambda: kn.to_flax(nn.Linear(2, 2)), ValueError, "no batch norm"),
        (lambda: kn.to_flax("model"), TypeError, "model must be"),
        (lambda: kn.to_keras(nn.BatchNorm1d(2, track_running_stats=False)), ValueError, "no running_mean"),
        (lambda: kn.to_keras(kn.WhiteningBatchNorm(4)), ValueError, "running_cov"),
        (lambda: kn.to_keras(nn.Sequential(kn.DomainBatchNorm(4, 2))), ValueError, "'0' .DomainBatchNorm. keeps"),
        (lambda: kn.to_keras(nn.LazyBatchNorm1d()), ValueError, "LazyBatchNorm1d"),
    ],
)
def test_errors_say_what_is_legal(call, error, words):
    with pytest.raises(error, match=words):
        call()
