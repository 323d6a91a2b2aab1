"""Micro-batches inside accumulate_statistics give the running statistics of one large batch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from control.models import KINDS, PATHS, Block, Plain, buffers, data, same
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.control import accumulate_statistics, freeze, pause_statistics
from keelnorm.engine.fusion.call import all_sizes_wait

every_kind = pytest.mark.parametrize(("rank", "kind"), KINDS, ids=[f"{kind}{rank}d" for rank, kind in KINDS])
momenta = pytest.mark.parametrize("momentum", [0.1, 0.3, None])


def layer_of(rank, kind, **keywords):
    return Block(rank, kind, **keywords).norm


def values(rank, count=16):
    """For a layer of four channels: a batch, whose parts differ in mean and spread."""
    x = torch.randn((count, 4) if rank == 1 else (count, 4, 5, 3))
    factor = torch.linspace(1, 4, count).view(-1, *([1] * (x.dim() - 1)))
    return x * factor + 5 * factor


def expected_after(state, batches, momentum):
    """The running statistics after these batches, by the definition, in float64."""
    mean, var = state["running_mean"].double(), state["running_var"].double()
    count = state["num_batches_tracked"].item()
    for x in batches:
        count += 1
        factor = 1 / count if momentum is None else momentum
        flat = x.detach().double().movedim(1, 0).flatten(1)
        mean = (1 - factor) * mean + factor * flat.mean(1)
        var = (1 - factor) * var + factor * flat.var(1, correction=1)
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": torch.tensor(count)}


def assert_moments(layer, expected, rtol=1e-6):
    for name, value in expected.items():
        torch.testing.assert_close(getattr(layer, name).double(), value.double(), rtol=rtol, atol=1e-7, msg=name)


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


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_in_the_call(inplace):
    layer, x = kn.BatchNorm2d(4), values(2)
    expected = expected_after(buffers(layer), [x], 0.1)
    y = layer.train()(x, activation="leaky_relu")
    layer.reset_running_stats()
    with torch.no_grad(), accumulate_statistics(layer):
        found = [layer(input=part.clone(), activation="leaky_relu", inplace=inplace) for part in x.split(16)]
    assert torch.equal(found[0], y)
    assert_moments(layer, expected)


def test_a_mask_of_a_variant():
    layer, x = Plain(4), values(2)
    mask = torch.arange(16) < 11
    expected = expected_after(buffers(layer), [x[:11]], 0.1)
    with accumulate_statistics(layer):
        for part, valid in zip(x.split(4), mask.split(4), strict=True):
            layer(part, mask=valid)
    assert_moments(layer, expected)


def test_sample_weights():
    """The values 0, 1, 5 count once, once and eight times."""
    layer = kn.BatchNorm1d(1, momentum=1.0)
    x, weight = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([1.0, 1.0, 8.0])
    with accumulate_statistics(layer):
        layer(x, sample_weight=weight)
    assert layer.running_mean.item() == pytest.approx(4.1)
    assert layer.running_var.item() == pytest.approx((4.1**2 + 3.1**2 + 8 * 0.9**2) / 9)


ARGUMENTS = {
    "mask": {"mask": torch.arange(16) % 3 > 0},
    "mask by position": {"mask": torch.arange(16 * 15).view(16, 5, 3) % 4 > 0},
    "mask, keep": {"mask": torch.arange(16) % 3 > 0, "padding": "keep"},
    "weights": {"sample_weight": torch.arange(16) % 3 + 0.5},
    "weights by position": {"sample_weight": (torch.arange(16 * 15).view(16, 5, 3) % 4).float()},
    "both": {"mask": torch.arange(16) % 3 > 0, "sample_weight": torch.arange(16) % 4 + 1.0},
    "all else": {"residual": torch.ones(16, 4, 5, 3), "activation": "relu"},
    "in place": {"activation": "leaky_relu", "inplace": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_every_argument_of_the_call(arguments, dtype):
    """Micro-batches with an argument are as the large batch with it, which torch.nn's layer knows nothing of."""
    layer, x = kn.BatchNorm2d(4), values(2).to(dtype)
    reference = copy.deepcopy(layer)
    reference(x.clone(), **arguments)
    outputs = []
    with accumulate_statistics(layer), torch.no_grad():
        for part in torch.arange(16).split(4):
            given = {name: v[part] if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
            outputs.append((layer(x[part].clone(), **given), copy.deepcopy(layer)(x[part].clone(), **given)))
    assert_moments(layer, buffers(reference))
    assert all(torch.equal(found, alone) for found, alone in outputs)


@pytest.mark.parametrize("too_few", ["running", "skip"])
def test_one_value_per_channel_does_not_count(too_few):
    layer, x = kn.BatchNorm1d(4, too_few=too_few), values(1)
    layer(x)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        layer(torch.full((1, 4), 100.0))
        layer(x)
        layer(x, mask=torch.arange(16) == 3)
    assert_moments(layer, expected)


TRANSFORMS = {
    "vmap": lambda layer: torch.func.vmap(layer),
    "vmap of vmap": lambda layer: lambda x: torch.func.vmap(torch.func.vmap(layer))(x.unflatten(0, (2, 2))),
    "gradients by sample": lambda layer: torch.func.vmap(torch.func.grad(lambda x: layer(x).pow(3).sum())),
    "tangents": lambda layer: lambda x: [torch.func.jvp(layer, (part,), (part,)) for part in x],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=list(TRANSFORMS))
@pytest.mark.parametrize("kind", ["torch", "keelnorm", "variant"])
def test_function_transforms(kind, transform):
    """Each instance of a vmapped layer is a forward."""
    layer, x = layer_of(1, kind), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer) as accumulated:
        transform(layer)(x.view(4, 4, 4))
        assert accumulated.moments[""].count.max().item() == 16
    assert_moments(layer, expected)


class SequenceFirst(nn.BatchNorm1d):
    """For (N, L, C), as many channels as steps, with a mask that says what to leave out."""

    def forward(self, x, ignored=None):
        y = x.clone()
        rows = x[~ignored] if ignored is not None else x.flatten(0, 1)
        y[~ignored if ignored is not None else torch.ones(x.shape[:2], dtype=torch.bool)] = super().forward(rows)
        return y


class Reimplemented(nn.BatchNorm1d):
    """As timm's layers, which repeat torch's code."""

    def forward(self, x):
        mean, var = (None, None) if not self.track_running_stats else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)


class Overwriting(Reimplemented):
    def forward(self, x):
        return x.copy_(super().forward(x))


def test_a_subclass_that_normalizes_something_else_than_it_is_given():
    layer, x = SequenceFirst(4), torch.randn(6, 4, 4) + torch.arange(4) * 5
    ignored = torch.rand(6, 4) > 0.5
    expected = expected_after(buffers(layer), [torch.cat([x[~ignored], x.flatten(0, 1)])], 0.1)
    with accumulate_statistics(layer):
        layer(x, ignored=ignored)
        layer(x)
    assert_moments(layer, expected)


def test_a_subclass_with_a_forward_of_its_own():
    layer, x = Reimplemented(4), values(1)
    expected = expected_after(buffers(layer), [x], 0.1)
    with accumulate_statistics(layer):
        for part in x.split(4):
            layer(part)
    assert_moments(layer, expected)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="a Overwriting has a forward of its own that overwrites its input"),
        accumulate_statistics(layer := Overwriting(4)),
    ):
        layer(x.clone())
    assert layer.num_batches_tracked.item() == 0


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


def test_the_normalization_is_each_micro_batchs_own():
    layer, x = kn.BatchNorm1d(4), values(1)
    with accumulate_statistics(layer):
        y = torch.cat([layer(part) for part in x.split(4)])
    assert torch.allclose(
        y, torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(4)]), atol=1e-5
    )
    assert not torch.allclose(y, F.batch_norm(x, None, None, training=True), atol=0.1)
