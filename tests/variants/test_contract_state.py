"""The contract: what every variant keeps, when it changes, and how it is stored and copied."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from variants.collected import for_each, for_each_shape, small
from variants.contract import assert_close, assert_same, buffers_of, layer_of, run

import keelnorm as kn

TORCHS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def batch(variant, dtype=torch.float64):
    """x of the small shape, and what a call needs besides it."""
    x = torch.randn(small(variant), dtype=dtype)
    return x, variant.keywords(x)


@for_each()
def test_is_a_batch_norm(variant):
    assert isinstance(variant.make(3), torch.nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    "keywords", [{}, {"affine": False}, {"track_running_stats": False}], ids=["default", "not affine", "not tracking"]
)
@for_each()
def test_state_dict_keys(variant, keywords):
    found = variant.make(small(variant)[1], **keywords).state_dict()
    expected = set(torch.nn.BatchNorm2d(3, **keywords).state_dict())
    if "track_running_stats" in keywords:
        # What a variant of its own remembers may depend on running statistics.
        assert expected <= set(found) <= expected | set(variant.buffers)
    else:
        assert set(found) == expected | set(variant.buffers)


@for_each()
def test_loads_torchs_state_dict(variant):
    channels = small(variant)[1]
    given = torch.nn.BatchNorm2d(channels).double()
    with torch.no_grad():
        for value in given.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(7))
    layer = variant.make(channels).double()
    layer.load_state_dict(given.state_dict(), strict=not variant.buffers)
    for name in TORCHS:
        assert torch.equal(layer.state_dict()[name], given.state_dict()[name].expand_as(layer.state_dict()[name])), name


@for_each()
def test_state_dict_roundtrip(variant):
    """Evaluation is then the same to the bit, and the state is a copy: the first layer goes on alone."""
    layer = layer_of(variant, small(variant))
    other = variant.make(small(variant)[1]).double()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x, keywords = batch(variant)
    assert_same(run(other.eval(), x, **keywords), run(layer.eval(), x, **keywords))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@for_each()
def test_copies(variant, copied):
    """A copy goes on as the layer does, in training and in evaluation, and neither changes the other."""
    layer = layer_of(variant, small(variant))
    twin = copied(layer)
    batches = [batch(variant) for _ in range(2)]
    found = [run(twin, x, **keywords) for x, keywords in batches]
    expected = [run(layer, x, **keywords) for x, keywords in batches]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    x, keywords = batch(variant)
    assert_same(run(twin.eval(), x, **keywords), run(layer.eval(), x, **keywords))


@for_each()
def test_to_another_dtype(variant):
    """After ``.to()`` the layer works on, in training and in evaluation."""
    layer = layer_of(variant, small(variant), torch.float32).to(torch.float64)
    x, keywords = batch(variant)
    for training in (True, False):
        assert layer.train(training)(x, **keywords).dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in layer.parameters())


@for_each()
def test_training_updates_once(variant):
    layer = layer_of(variant, small(variant))
    for _ in range(3):
        before = buffers_of(layer)
        x, keywords = batch(variant)
        layer(x, **keywords)
        assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
        assert not torch.equal(layer.running_mean, before["running_mean"])
        assert not torch.equal(layer.running_var, before["running_var"])


@for_each()
def test_backward_updates_nothing(variant):
    layer = layer_of(variant, small(variant))
    x, keywords = batch(variant)
    y = layer(x.requires_grad_(), **keywords)
    before = buffers_of(layer)
    y.sum().backward()
    assert_close(buffers_of(layer), before)


@for_each()
def test_no_grad_updates_as_well(variant):
    """Training without gradients, as in recalibration, leaves the same buffers."""
    layer = layer_of(variant, small(variant))
    twin = copy.deepcopy(layer)
    x, keywords = batch(variant)
    with torch.no_grad():
        y = layer(x, **keywords)
    assert not y.requires_grad
    assert_close({"y": y, **buffers_of(layer)}, {"y": twin(x.requires_grad_(), **keywords), **buffers_of(twin)}, 1e-12)


@for_each_shape()
def test_running_statistics_are_the_batchs(variant, shape):
    """With momentum 1 they are the mean and the unbiased variance of the batch, as torch.nn keeps them."""
    layer = layer_of(variant, shape, momentum=1.0)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    layer(x, **variant.keywords(x))
    dims = [0, *range(2, x.dim())]
    found = {"mean": layer.running_mean, "var": layer.running_var}
    assert_close(found, {"mean": x.mean(dims), "var": x.var(dims, correction=1)}, 1e-10)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
@for_each_shape()
def test_a_poisoned_channel_keeps_its_running_statistics(variant, shape, poison):
    """The others are updated as if it were sound."""
    layer = layer_of(variant, shape)
    twin = copy.deepcopy(layer)
    before = buffers_of(layer)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    twin(x, **keywords)
    x[0, 1].view(-1)[0] = poison
    layer(x, **keywords)
    for name in ("running_mean", "running_var"):
        found, sound = layer.get_buffer(name), twin.get_buffer(name).clone()
        sound[..., 1] = before[name][..., 1]
        assert_close({name: found}, {name: sound}, 1e-10)
    if not isinstance(layer, kn.VirtualBatchNorm):  # whose running statistics take in reference batches alone
        assert (layer.skipped_updates[..., 1] > 0).any()
    assert int(layer.skipped_updates.sum()) == int(layer.skipped_updates[..., 1].sum())


@for_each()
def test_momentum_weighs_the_batch(variant):
    """running = (1 − momentum)·running + momentum·batch, whatever the batch's moments are to the variant."""
    layers = [layer_of(variant, small(variant))]
    layers += [copy.deepcopy(layers[0]) for _ in range(2)]
    before = buffers_of(layers[0])
    x, keywords = batch(variant)
    for layer, momentum in zip(layers, (1.0, 0.25, 0.0), strict=True):
        vars(layer)["momentum"] = momentum
        layer(x, **keywords)
    for name in ("running_mean", "running_var"):
        whole, part, none = (layer.get_buffer(name) for layer in layers)
        assert_close({name: part}, {name: 0.75 * before[name] + 0.25 * whole}, 1e-10)
        assert torch.equal(none, before[name])


@for_each()
def test_momentum_none_averages(variant):
    """Over all batches so far; momentum 1 tells what each of them gives."""
    averaging, latest = (variant.make(small(variant)[1], momentum=momentum).double() for momentum in (None, 1.0))
    given: dict[str, list[torch.Tensor]] = {"running_mean": [], "running_var": []}
    for count in range(1, 4):
        x, keywords = batch(variant)
        averaging(x, **keywords), latest(x, **keywords)
        assert averaging.num_batches_tracked == count
        for name, values in given.items():
            values.append(latest.get_buffer(name).clone())
            assert_close({name: averaging.get_buffer(name)}, {name: torch.stack(values).mean(0)}, 1e-10)


@for_each()
def test_evaluation_changes_nothing(variant):
    layer = layer_of(variant, small(variant)).eval()
    before = buffers_of(layer)
    for _ in range(2):
        x, keywords = batch(variant)
        run(layer, x, **keywords)
    assert_close(buffers_of(layer), before)


@for_each()
def test_evaluation_is_by_sample(variant):
    """The running statistics normalize: no sample's result depends on its neighbours."""
    layer = layer_of(variant, small(variant)).eval()
    x, keywords = batch(variant)
    half = len(x) // 2
    some = {name: value[:half] if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    assert_close({"y": layer(x[:half], **some)}, {"y": layer(x, **keywords)[:half]}, 1e-10)


@for_each()
def test_frozen_by_eval_in_a_training_model(variant):
    layer = layer_of(variant, small(variant))
    model = torch.nn.ModuleDict({"frozen": layer, "other": torch.nn.Linear(2, 2)}).train()
    layer.eval()
    before = buffers_of(layer)
    assert model.training
    for _ in range(3):
        x, keywords = batch(variant)
        run(layer, x, **keywords)
    assert_close(buffers_of(layer), before)


@for_each()
def test_paused_by_track_running_stats(variant):
    """``layer.track_running_stats = False``: the same output and gradients, and no buffer changes."""
    layer: Any = layer_of(variant, small(variant))
    twin = copy.deepcopy(layer)
    before = buffers_of(layer)
    layer.track_running_stats = False
    for _ in range(2):
        x, keywords = batch(variant)
        found = run(layer, x, **keywords)
        assert_close(found.values, run(copy.deepcopy(twin), x, **keywords).values)
        assert_close(found.buffers, before)
    layer.track_running_stats = True
    assert_same(run(layer, x, **keywords), run(twin, x, **keywords))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@for_each()
def test_checkpointing(variant, training, use_reentrant):
    """Recomputing in the backward counts nothing again, and gives the same bits."""
    layer = layer_of(variant, small(variant)).train(training)
    twin = copy.deepcopy(layer)

    def checkpointed(x, **keywords):
        return checkpoint(lambda x: layer(x, **keywords), x, use_reentrant=use_reentrant)

    for _ in range(2):
        x, keywords = batch(variant)
        assert_same(run(layer, x, call=checkpointed, **keywords), run(twin, x, **keywords))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@for_each()
def test_two_checkpoints_before_one_backward(variant, use_reentrant):
    """Recomputation comes in another order than the forwards; each batch has been counted by then."""
    layer = layer_of(variant, small(variant))
    twin = copy.deepcopy(layer)
    batches = [batch(variant) for _ in range(2)]
    outputs = []
    for x, keywords in batches:
        x.requires_grad_()
        outputs.append(checkpoint(lambda x, k=keywords: layer(x, **k), x, use_reentrant=use_reentrant))
    counted = buffers_of(layer)
    torch.stack(outputs).square().sum().backward()
    assert_close(buffers_of(layer), counted)
    for (x, keywords), y in zip(batches, outputs, strict=True):
        assert torch.equal(twin(x.detach(), **keywords), y)
    assert_close(counted, buffers_of(twin))
