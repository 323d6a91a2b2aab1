"""A layer's identity and state are torch.nn's: constructor, classes, repr, state_dict, copies and files."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from nn.layer_pairs import CHANNELS, PAIR_IDS, PAIRS, assert_untouched, randomize, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn

HAS_BIAS_ARGUMENT = "bias" in inspect.signature(nn.BatchNorm2d).parameters
CONSTRUCTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
    {"device": "meta"},
    {"bias": False},
]
pairs = pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS, ids=PAIR_IDS)


@pytest.fixture(params=CONSTRUCTIONS, ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items()) or "default")
def keywords(request):
    if "bias" in request.param and not HAS_BIAS_ARGUMENT:
        pytest.skip("this torch's BatchNorm has no argument bias")
    return request.param


@pairs
def test_signature_is_torchs(ours, theirs, shape):
    found = list(inspect.signature(ours).parameters.values())
    expected = list(inspect.signature(theirs).parameters.values())
    *shared, last = [(p.name, p.default, p.kind) for p in found]
    assert shared == [(p.name, p.default, p.kind) for p in expected]
    assert last == ("too_few", "error", inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("layer_type", [kn.BatchNorm, kn.BatchNorm1d, kn.BatchNorm2d, kn.BatchNorm3d])
def test_call_signature(layer_type):
    """layer(input, residual=None, *, activation=None, inplace=False, mask=None, sample_weight=None, weighting=, …)."""
    x, residual, activation, inplace, *counting = inspect.signature(layer_type(3).forward).parameters.values()
    assert (x.name, x.default) == ("input", inspect.Parameter.empty)
    assert (residual.name, residual.default) == ("residual", None)
    assert residual.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert (activation.name, activation.default) == ("activation", None)
    assert (inplace.name, inplace.default) == ("inplace", False)
    assert activation.kind is inplace.kind is inspect.Parameter.KEYWORD_ONLY
    expected = {"mask": None, "sample_weight": None, "weighting": "frequency", "padding": "zero"}
    assert {p.name: p.default for p in counting} == expected
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in counting)


@pairs
def test_classes(ours, theirs, shape):
    layer = ours(CHANNELS)
    assert isinstance(layer, theirs)
    assert isinstance(layer, _BatchNorm)
    assert issubclass(kn.BatchNorm, _BatchNorm)
    assert type(layer) is not theirs


@pairs
def test_construction_agrees(ours, theirs, shape, keywords):
    layer, oracle = ours(CHANNELS, **keywords), theirs(CHANNELS, **keywords)
    assert repr(layer) == repr(oracle)
    assert layer.state_dict().keys() == oracle.state_dict().keys()
    assert layer.state_dict()._metadata == oracle.state_dict()._metadata
    for name, value in layer.state_dict().items():
        expected = oracle.state_dict()[name]
        assert (value.dtype, value.device, value.shape) == (expected.dtype, expected.device, expected.shape), name
        assert value.is_meta or torch.equal(value, expected), name
    public = [name for name in vars(oracle) if not name.startswith("_")]
    assert {name: getattr(layer, name) for name in public} == {name: getattr(oracle, name) for name in public}
    assert vars(layer).keys() - vars(oracle).keys() == {"_updates"}
    assert list(dict(layer.named_buffers())) == list(dict(oracle.named_buffers()))


def test_positional_arguments():
    assert repr(kn.BatchNorm2d(3, 1e-3, None, False, True)) == repr(nn.BatchNorm2d(3, 1e-3, None, False, True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pairs
def test_state_dict_loads_both_ways(ours, theirs, shape, strict, assign):
    for source, target in ((ours, theirs), (theirs, ours)):
        state = randomize(source(CHANNELS)).state_dict()
        loaded = target(CHANNELS)
        assert str(loaded.load_state_dict(state, strict=strict, assign=assign)) == "<All keys matched successfully>"
        assert_untouched(loaded, state)
        assert (loaded.running_mean.data_ptr() == state["running_mean"].data_ptr()) is assign


@pytest.mark.parametrize("assign", [True, False])
@pairs
def test_old_checkpoint_without_counter(ours, theirs, shape, assign):
    """Before version 2 of the state, num_batches_tracked was not saved: it stays what it is, strictly loaded or not."""
    state = randomize(theirs(CHANNELS)).state_dict()
    del state["num_batches_tracked"]
    vars(state)["_metadata"][""]["version"] = 1
    layer, oracle = ours(CHANNELS), theirs(CHANNELS)
    layer.num_batches_tracked.fill_(3), oracle.num_batches_tracked.fill_(3)
    layer.load_state_dict(copy.deepcopy(state), assign=assign)
    oracle.load_state_dict(copy.deepcopy(state), assign=assign)
    assert_untouched(layer, oracle.state_dict())
    assert layer.num_batches_tracked.item() == 3


def test_old_checkpoint_as_a_plain_dictionary():
    """A checkpoint without metadata counts as old; one of the present version that lacks the counter is refused."""
    state = randomize(nn.BatchNorm2d(CHANNELS)).state_dict()
    del state["num_batches_tracked"]
    layer = kn.BatchNorm2d(CHANNELS)
    layer.load_state_dict(dict(state))
    assert torch.equal(layer.running_mean, state["running_mean"])
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        layer.load_state_dict(state)


def test_old_checkpoint_trains_with_a_cumulative_average(backend):
    state = randomize(nn.BatchNorm1d(CHANNELS)).state_dict()
    del state["num_batches_tracked"]
    layer = kn.BatchNorm1d(CHANNELS, momentum=None)
    layer.load_state_dict(dict(state))
    x = torch.randn(9, CHANNELS)
    layer(x)
    assert layer.num_batches_tracked.item() == 1
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copies", [copy.deepcopy, copy.copy, pickled])
@pairs
def test_copies(ours, theirs, shape, copies, backend):
    layer = randomize(ours(CHANNELS, momentum=0.3, eps=1e-3))
    before = snapshot(layer)
    duplicate = copies(layer)
    assert type(duplicate) is ours
    assert (duplicate.eps, duplicate.momentum) == (1e-3, 0.3)
    assert_untouched(duplicate, before)
    x = torch.randn(shape)
    y = duplicate(x)
    if copies is copy.copy:  # shares the tensors
        assert layer.num_batches_tracked.item() == duplicate.num_batches_tracked.item() == 3
        return
    assert_untouched(layer, before)
    assert torch.equal(layer(x), y)
    assert_untouched(layer, duplicate.state_dict())


@pytest.mark.parametrize("weights_only", [True, False])
def test_files(weights_only):
    """A state goes through a file that may hold tensors only, and into the other library's layer."""
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = nn.BatchNorm2d(CHANNELS)
    loaded.load_state_dict(torch.load(file, weights_only=weights_only))
    assert_untouched(loaded, layer.state_dict())


def test_a_whole_layer_goes_through_a_file():
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    with torch.serialization.safe_globals([kn.BatchNorm2d]):
        loaded = torch.load(file)
    assert type(loaded) is kn.BatchNorm2d
    assert_untouched(loaded, layer.state_dict())


def test_reset():
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    weight = layer.weight.detach().clone()
    layer.reset_running_stats()
    fresh = kn.BatchNorm2d(CHANNELS).state_dict()
    for name, value in layer.named_buffers():
        assert torch.equal(value, fresh[name]), name
    assert torch.equal(layer.weight, weight)
    layer.reset_parameters()
    assert_untouched(layer, fresh)
