"""The contract: all that a variant keeps is under control, its own state besides torch.nn's too."""

import copy
import pickle
from collections import deque

import pytest
import torch
from variants.collected import for_each, small
from variants.contract import assert_close, assert_same, buffers_of, layer_of, run

import keelnorm as kn


def batch(variant):
    x = torch.randn(small(variant), dtype=torch.float64)
    return x, variant.keywords(x)


def windows_of(layer):
    """What it keeps of its last batches, by length."""
    return {name: len(value) for name, value in vars(layer).items() if isinstance(value, deque)}


@for_each()
def test_paused(variant):
    """Output and gradients as ever, and nothing changes."""
    layer = layer_of(variant, small(variant))
    twin, before, windows = copy.deepcopy(layer), buffers_of(layer), windows_of(layer)
    x, keywords = batch(variant)
    with kn.pause_statistics(layer):
        found = run(layer, x, **keywords)
    assert_close(found.values, run(twin, x, **keywords).values)
    assert_close(buffers_of(layer), before)
    if not isinstance(layer, kn.MovingAverageBatchNorm | kn.BatchRenorm):  # whose backward and recall keep vectors
        assert windows_of(layer) == windows


@pytest.mark.parametrize("momentum", [0.3, None])
@for_each()
def test_accumulated(variant, momentum):
    """One forward in the block is one outside, whose statistics come at the end of the block."""
    layer = layer_of(variant, small(variant), momentum=momentum)
    twin, before = copy.deepcopy(layer), buffers_of(layer)
    x, keywords = batch(variant)
    with kn.accumulate_statistics(layer):
        found = run(layer, x, **keywords)
        assert_close(found.buffers, before)
    expected = run(twin, x, **keywords)
    assert_close(found.values, expected.values)
    assert_close(buffers_of(layer), expected.buffers, 1e-12)


@pytest.mark.parametrize("block", [kn.pause_statistics, kn.accumulate_statistics], ids=lambda block: block.__name__)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@for_each()
def test_copies_in_a_block(variant, copied, block):
    """A copy trains as a copy from before does, and the layer does not see it."""
    layer = layer_of(variant, small(variant))
    expected, before = copied(layer), buffers_of(layer)
    x, keywords = batch(variant)
    with block(layer):
        twin = copied(layer)
        assert_same(run(twin, x, **keywords), run(expected, x, **keywords))
    assert_same(run(twin, x, **keywords), run(expected, x, **keywords))
    assert_close(buffers_of(layer), before)


@for_each()
def test_a_skipped_step(variant):
    """Afterwards the layer goes on as one that has not seen the batch."""
    layer, scaler = layer_of(variant, small(variant)), torch.amp.GradScaler("cpu")
    twin = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, keywords = batch(variant)
    with kn.follow_scaler(layer, scaler):
        scaler.scale(layer(x, **keywords).sum() * torch.inf).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_close(
        {name: value for name, value in buffers_of(layer).items() if "skipped" not in name},
        {name: value for name, value in buffers_of(twin).items() if "skipped" not in name},
    )
    assert windows_of(layer) == windows_of(twin) or isinstance(layer, kn.BatchRenorm)
    x, keywords = batch(variant)
    assert_close(run(layer, x, **keywords).values, run(twin, x, **keywords).values)
