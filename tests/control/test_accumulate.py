"""Micro-batches inside accumulate_statistics give the running statistics of one large batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from control.accumulating import assert_moments, every_kind, expected_after, layer_of, momenta, values
from control.models import PATHS, Block, Plain, buffers, data, same
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import keelnorm as kn
from keelnorm.control import accumulate_statistics, freeze, pause_statistics


@every_kind
@momenta
def test_four_micro_batches(rank, kind, momentum):
    layer = layer_of(rank, kind, momentum=momentum)
    reference = copy.deepcopy(layer)
    for sizes in ([4, 4, 4, 4], [2, 11, 3]):
        x = values(rank)
        expected = expected_after(buffers(layer), [x], momentum)
        with accumulate_statistics(layer) as accumulated:
            assert accumulated.paths == [""]
            before = buffers(layer)
            for part in x.split(sizes):
                layer(part)
            assert same(buffers(layer), before)
        assert_moments(layer, expected)
        reference(x)
        assert_moments(layer, buffers(reference))


@every_kind
def test_whole_models(rank, kind):
    """Every layer's own input is pooled, and gradients are those of the micro-batches as ever."""
    model = Block(rank, kind)
    plain = copy.deepcopy(model)
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in PATHS}
    for path in PATHS:
        plain.get_submodule(path).register_forward_pre_hook(lambda _, inputs, path=path: seen[path].append(inputs[0]))
    x = data(rank)
    before = {path: buffers(model.get_submodule(path)) for path in PATHS}
    with accumulate_statistics(model):
        for part in x.split(4):
            model(part).square().mean().backward()
    for part in x.split(4):
        plain(part).square().mean().backward()
    for path in PATHS:
        assert_moments(model.get_submodule(path), expected_after(before[path], [torch.cat(seen[path])], 0.1))
        assert model.get_submodule(path).num_batches_tracked.item() == 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@every_kind
def test_update_in_a_loop(rank, kind):
    layer = layer_of(rank, kind)
    batches = [values(rank, 8), values(rank, 12), values(rank, 6)]
    expected = [expected_after(buffers(layer), batches[:count], 0.1) for count in range(4)]
    with accumulate_statistics(layer) as accumulated:
        assert accumulated.update() == []
        assert accumulated.moments == {}
        for step in (0, 1):
            for part in batches[step].split(4):
                layer(part)
            assert accumulated.moments[""].count.item() == batches[step].numel() / 4
            assert accumulated.update() == [""]
            assert_moments(layer, expected[step + 1])
        layer(batches[2])
    assert_moments(layer, expected[3])
    with accumulate_statistics(layer) as accumulated:
        layer(values(rank))
        accumulated.update()
        done = buffers(layer)
    assert same(buffers(layer), done)


@every_kind
def test_an_error_updates_nothing(rank, kind):
    model = Block(rank, kind)
    before = buffers(model)

    @accumulate_statistics(model)
    def step():
        model(data(rank))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        step()
    assert same(buffers(model), before)
    model(data(rank))
    assert model.norm.num_batches_tracked.item() == 1
    assert not model.norm._forward_hooks
    assert not model.norm._forward_pre_hooks
    assert "_control" not in vars(model.norm)


@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
def test_a_forward_that_raises_counts_nothing(kind):
    layer = layer_of(1, kind)
    x = values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        with pytest.raises(ValueError, match=r"xpected|one value per channel"):
            layer(torch.randn(1, 4))
        layer(x)
    assert_moments(layer, expected)


@every_kind
def test_which_forwards_count(rank, kind):
    """Each use does; not those in evaluation, paused or frozen; a layer that saw nothing stays as it is."""
    model, x = Block(rank, kind), values(rank)
    layer, before = model.norm, buffers(model.last)
    expected = expected_after(buffers(layer), [torch.cat([x, 2 * x])], 0.1)
    with accumulate_statistics(model):
        layer(x)
        layer(2 * x)
        with pause_statistics(model):
            layer(3 * x)
        layer.eval()
        layer(4 * x)
    assert_moments(layer, expected)
    assert same(buffers(model.last), before)
    freeze(model)
    before = buffers(model)
    with accumulate_statistics(model) as accumulated:
        model.train()(data(rank))
        assert accumulated.moments == {}
    assert same(buffers(model), before)


@every_kind
def test_inside_pause(rank, kind):
    layer = layer_of(rank, kind)
    before = buffers(layer)
    with pause_statistics(layer), accumulate_statistics(layer):
        layer(values(rank))
    assert same(buffers(layer), before)
    layer(values(rank))
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("kind", ["torch", "keelnorm"])
def test_an_empty_batch_counts_nothing(kind):
    layer, x = layer_of(1, kind), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        if kind == "keelnorm":  # torch.nn's raises
            layer(x[:0])
        layer(x)
    assert_moments(layer, expected)


def test_blocks_within_blocks():
    model = Block(2, "keelnorm")
    with accumulate_statistics(model, where="norm"):
        with pytest.raises(RuntimeError, match="accumulates already for norm"), accumulate_statistics(model):
            pass
        with accumulate_statistics(model, where="last") as inner:
            model(data(2))
            assert inner.paths == ["last.0"]
        assert (model.norm.num_batches_tracked.item(), model.last[0].num_batches_tracked.item()) == (0, 1)
    assert model.norm.num_batches_tracked.item() == 1


def test_synchronized_layers_of_torch_are_refused():
    """Their moments are those of all processes, which only they know."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    with accumulate_statistics(model) as accumulated:
        assert accumulated.paths == ["0", "1"]
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="accumulate_statistics: 1 normalizes with the moments of all processes"):
            accumulate_statistics(model).__enter__()
        with accumulate_statistics(model, where="0"):
            model[0](torch.randn(4, 3))
    finally:
        dist.destroy_process_group()
    assert model[0].num_batches_tracked.item() == 1


def test_as_a_decorator():
    model, x = Block(2, "torch"), data(2)

    @accumulate_statistics(model)
    def step():
        for part in x.split(4):
            model(part)

    step()
    step()
    assert model.norm.num_batches_tracked.item() == 2


def test_the_momentum_of_the_forward():
    layer, x = kn.BatchNorm1d(4, momentum=0.5), values(1)
    expected = expected_after(buffers(layer), [x], 0.5)
    with accumulate_statistics(layer):
        layer(x)
        layer.momentum = 0.01
    assert_moments(layer, expected)


def test_moments_without_their_graph():
    layer = Plain(4)
    with accumulate_statistics(layer) as accumulated:
        layer(values(1).requires_grad_())
        assert not any(value.requires_grad for value in vars(accumulated.moments[""]).values() if value is not None)


@pytest.mark.parametrize("kind", ["torch", "keelnorm"])
def test_one_channel_that_is_not_finite_stays(kind):
    layer, x = layer_of(1, kind), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    x[3, 2] = torch.inf
    with accumulate_statistics(layer):
        for part in x.split(4):
            layer(part)
    others = [0, 1, 3]
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(layer, name)[others].double(), expected[name][others], rtol=1e-6)
    assert (layer.running_mean[2].item(), layer.running_var[2].item()) == (0, 1)


def test_the_normalization_is_each_micro_batchs_own():
    layer, x = kn.BatchNorm1d(4), values(1)
    with accumulate_statistics(layer):
        y = torch.cat([layer(part) for part in x.split(4)])
    assert torch.allclose(
        y, torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(4)]), atol=1e-5
    )
    assert not torch.allclose(y, F.batch_norm(x, None, None, training=True), atol=0.1)
