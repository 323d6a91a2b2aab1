"""Accumulating in fused, compiled and checkpointed models."""

import copy

import pytest
import torch
from control.accumulating import every_kind, values
from control.models import PATHS, Block, buffers, data, same
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.control import accumulate_statistics, pause_statistics
from keelnorm.engine.fusion.call import all_sizes_wait


@pytest.mark.parametrize("convert", [lambda net: net, kn.convert], ids=["Sequential", "convert"])
def test_fused_layers_give_the_same(convert):
    """And what waits for the activation behind it counts."""
    net, x = convert(kn.Sequential(kn.BatchNorm2d(4), nn.ReLU())), values(2)
    net = net[0] if isinstance(net, tuple) else net
    expected, twin = net(x), copy.deepcopy(net)
    with accumulate_statistics(net), all_sizes_wait():
        for _ in range(2):
            assert torch.equal(net(x), expected)
    twin(torch.cat([x, x]))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
def test_compiled(kind):
    torch._dynamo.reset()
    model, x = Block(1, kind), data(1)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with pause_statistics(model):
        compiled(x)
    for _ in range(2):
        plain = copy.deepcopy(model)
        with accumulate_statistics(compiled) as accumulated:
            assert accumulated.paths == [f"_orig_mod.{path}" for path in PATHS]
            for part in x.split(4):
                compiled(part)
        with accumulate_statistics(plain):
            for part in x.split(4):
                plain(part)
        assert same(buffers(model), buffers(plain))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
class TestCheckpointed:
    def step(self, model, x, use_reentrant):
        """Two segments; use_reentrant None runs without checkpoints."""
        h = x.clone().requires_grad_()
        for segment in (nn.Sequential(model.first, model.norm), nn.Sequential(model.second, model.last)):
            h = segment(h) if use_reentrant is None else checkpoint(segment, h, use_reentrant=use_reentrant)
        h.square().sum().backward()

    @pytest.mark.parametrize("kind", ["keelnorm", "variant"])
    def test_same_bits_as_the_plain_model(self, kind, use_reentrant, momentum):
        model = Block(2, kind, momentum=momentum)
        plain = copy.deepcopy(model)
        for x in data(2).split(4):
            self.step(model, x, use_reentrant)
            self.step(plain, x, None)
        assert same(buffers(model), buffers(plain))
        assert model.norm.num_batches_tracked.item() == 3

    @every_kind
    def test_inside_accumulate(self, rank, kind, use_reentrant, momentum):
        """torch.nn's layers too, which count a checkpointed batch twice elsewhere."""
        model = Block(rank, kind, momentum=momentum)
        plain = copy.deepcopy(model)
        for _ in range(2):
            x = data(rank)
            with accumulate_statistics(model):
                for part in x.split(4):
                    self.step(model, part, use_reentrant)
            with accumulate_statistics(plain):
                for part in x.split(4):
                    self.step(plain, part, None)
        assert same(buffers(model), buffers(plain))
        assert model.norm.num_batches_tracked.item() == 2

    def test_gradients_inside_pause(self, use_reentrant, momentum):
        model = Block(2, "keelnorm", momentum=momentum)
        plain, x = copy.deepcopy(model), data(2)
        with pause_statistics(model):
            self.step(model, x, use_reentrant)
        self.step(plain, x, None)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert model.norm.num_batches_tracked.item() == 0
