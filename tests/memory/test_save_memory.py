"""Outputs that are recomputed in the backward: the same bits, fewer bytes, and torch's own errors."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.forcing import KERNELS, require_kernel
from torch import nn
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.engine import saved_outputs
from keelnorm.engine.activations import NAMED
from keelnorm.engine.fusion.call import all_sizes_wait
from keelnorm.engine.torch_internals import saved_tensor_hooks


@pytest.fixture(autouse=True)
def _small_results_wait() -> Iterator[None]:
    with all_sizes_wait():
        yield
    assert saved_outputs._here.frame is None
    assert saved_outputs.calls == 0


class Block(nn.Module):
    """A residual block: its output is kept by its own ReLU, by the next convolution, and by the next addition."""

    def __init__(self, activation: str = "relu", channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = kn.BatchNorm2d(channels), kn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn1(self.conv1(x), activation=self.activation)
        return self.bn2(self.conv2(y), x, activation=self.activation)


def network(activation: str = "relu", blocks: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *(Block(activation) for _ in range(blocks)), nn.AdaptiveAvgPool2d(2))


def unfused(blocks: int = 3) -> nn.Module:
    """The same as code writes it, converted."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2 * blocks))
            self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2 * blocks))
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for i in range(0, len(self.convs), 2):
                y = F.silu(self.bns[i](self.convs[i](x)))
                x = torch.relu(self.bns[i + 1](self.convs[i + 1](y)) + x)
            return F.avg_pool2d(x, 2)

    torch.manual_seed(0)
    model, _ = kn.convert(Written())
    for _ in range(3):  # layers learn what follows them
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return model


def outcome(model: nn.Module, x: torch.Tensor, **keywords: Any) -> list[torch.Tensor]:
    """The output, all gradients, and all buffers after one step."""
    x = x.clone().requires_grad_(x.is_floating_point())
    model.zero_grad(set_to_none=True)
    y = model(x, **keywords)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def assert_saving_changes_nothing(model: nn.Module, x: torch.Tensor, longest: int = 4) -> None:
    other = copy.deepcopy(model)
    expected = [outcome(model, x) for _ in range(2)]
    with kn.save_memory(other, longest=longest):
        for each in expected:
            assert_same_bits(outcome(other, x), each)
    assert_same_bits(outcome(other, x), outcome(model, x))


def kept(model: nn.Module, x: torch.Tensor, longest: int | None) -> int:
    """Bytes of distinct storages that live because of one graph, without parameters and input."""
    handle = None if longest is None else kn.save_memory(model, longest=longest)
    gc.collect()
    before = {id(t): t for t in gc.get_objects() if type(t) is torch.Tensor}
    known = {t.untyped_storage()._cdata for t in before.values() if t.layout is torch.strided}
    packed: list[Any] = []
    if handle is None:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            y = model(x)
    else:
        original = saved_outputs.Frame._pack

        def recorded(frame: saved_outputs.Frame, tensor: torch.Tensor) -> Any:
            found = original(frame, tensor)
            packed.append(found)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saved_outputs.Frame, "_pack", recorded)
            y = model(x)
        handle.undo()
    own = {p.untyped_storage()._cdata for p in model.parameters()} | known
    sizes: dict[int, int] = {}
    todo = list(packed)
    while todo:
        one = todo.pop()
        if isinstance(one, saved_outputs.View):
            todo.append(one.recipe)
        elif isinstance(one, saved_outputs.Recipe):
            todo += [each for each in (one.x, one.residual) if each is not None]
        else:
            tensor = one.tensor if isinstance(one, saved_outputs.Held) else one
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                sizes[storage._cdata] = storage.nbytes()
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("longest", [1, 2, 8])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [network, unfused], ids=["arguments", "converted"])
def test_the_same_bits(make: Callable[[], nn.Module], training: bool, longest: int) -> None:
    model = make().train(training)
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8), longest)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_back_end(kernel: str) -> None:
    require_kernel(kernel)
    with kn.kernels.use(kernel):
        assert_saving_changes_nothing(network(), torch.randn(2, 3, 9, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dtypes_and_layouts(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = network().to(dtype).to(memory_format=memory_format)
    x = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=memory_format)
    assert_saving_changes_nothing(model, x)


@pytest.mark.parametrize("activation", [name for name in NAMED if name])
def test_every_activation(activation: str) -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), Block(activation), nn.Conv2d(4, 2, 1))
    assert_saving_changes_nothing(layer, torch.randn(2, 3, 8, 8))


def test_what_is_kept() -> None:
    """A chain of residual blocks keeps the inputs of its batch norms alone; a short chain some outputs too."""
    model, x = network(blocks=6), torch.randn(2, 3, 18, 18)
    one = 2 * 4 * 16 * 16 * 4
    without, short, long = kept(model, x, None), kept(model, x, 1), kept(model, x, 16)
    assert without > short > long
    # 12 inputs of batch norms and the first convolution's output; statistics and the pooling's input are small.
    assert 13 * one <= long <= 13 * one + one // 2


def test_an_output_is_computed_once_for_several_readers() -> None:
    conv, bn = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4)
    readers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))

    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = bn(conv(x), activation="silu")
            return sum(reader(y) for reader in readers)

    model = Several()
    model.parts = nn.ModuleList([conv, bn, readers])
    with kn.save_memory(model):
        y = model(torch.randn(2, 3, 8, 8))
        before = kn.kernels.calls()
        y.sum().backward()
    after = kn.kernels.calls()
    assert sum(after.values()) - sum(before.values()) == 2  # the output again, and the batch norm's backward


def test_retained_graphs_and_several_backwards() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    expected = model(x)
    with kn.save_memory(other):
        found = other(x)
    for _ in range(3):
        for y in (expected, found):
            y.sum().backward(retain_graph=True)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_double_backward() -> None:
    model = network("silu").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = copy.deepcopy(model)
    found = []
    for each, saves in ((model, False), (other, True)):
        handle = kn.save_memory(each) if saves else None
        given = x.clone().requires_grad_()
        y = each(given)
        (g,) = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        g.square().sum().backward()
        found.append([given.grad, *(p.grad for p in each.parameters())])
        if handle is not None:
            handle.undo()
    assert_same_bits(found[1], found[0])


def test_an_output_that_is_changed_in_place_is_kept_as_it_is() -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv, bn, last = self.parts
            y = bn(conv(x), activation="relu")
            y.mul_(3)
            return last(y)

    assert_saving_changes_nothing(Changing(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("what", ["input", "weight"])
def test_what_was_changed_before_the_backward_is_torchs_error(what: str) -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    seen: list[torch.Tensor] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(conv(x))
            return last(bn(seen[-1], activation="relu"))

    model = Seeing()
    with kn.save_memory(model):
        y = model(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        (seen[0] if what == "input" else last.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_views_of_an_output() -> None:
    conv, bn, last = nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.Linear(4 * 36, 2)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([conv, bn, last])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            conv, bn, last = self.parts
            return last(bn(conv(x), activation="gelu").flatten(1))

    model = Flat()
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert kept(model, x, 4) == kept(model, x, None) - 2 * 4 * 36 * 4


def test_an_exception_in_the_model_leaves_no_hooks() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: torch.Tensor, fails: type[BaseException] | None = None) -> torch.Tensor:
            y = self.body(x)
            if fails is not None:
                raise fails("stop")
            return y

    model, x = Failing(), torch.randn(2, 3, 8, 8)
    with kn.save_memory(model):
        for kind in (ValueError, KeyboardInterrupt):
            with pytest.raises(kind, match="stop"):
                model(x, kind)
            other = copy.deepcopy(model.body)
            assert_same_bits(outcome(model, x)[:2], outcome(other, x)[:2])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing_acts_alone(where: str) -> None:
    body = network()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "inside":
                return checkpoint(self.body, x, use_reentrant=False)
            return self.body(x)

    model, x = Checkpointed(), torch.randn(2, 3, 8, 8)
    call = (lambda given: checkpoint(model, given, use_reentrant=False)) if where == "outside" else model
    twin = copy.deepcopy(model)
    expected = outcome(twin, x)
    with kn.save_memory(model):
        given = x.clone().requires_grad_()
        y = call(given)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    found = [y.detach(), given.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    assert_same_bits(found, expected)


def test_other_hooks_on_saved_tensors_act_alone() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected, seen = outcome(copy.deepcopy(model), x), []
    with (
        kn.save_memory(model),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),  # type: ignore[func-returns-value]
    ):
        assert_same_bits(outcome(model, x), expected)
    assert len(seen) > 10


def test_variants_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.ghost = nn.Conv1d(3, 4, 1), kn.BatchNorm1d(4), kn.GhostBatchNorm(4, 2)
            self.last = nn.Conv1d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = kn.functional.length_mask(torch.tensor([3, 5, 1, 5]), 5)
            return self.last(self.ghost(self.bn(self.conv(x), mask=mask, activation="relu"), activation="relu"))

    assert_saving_changes_nothing(Masked(), torch.randn(4, 3, 5))


def test_frozen_layers() -> None:
    model = network()
    kn.freeze(model)
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))


def test_calls_within_calls_and_threads() -> None:
    """One model within another, both saving; and calls in two threads at once."""
    inner = network()
    outer = nn.Sequential(inner, nn.Conv2d(4, 2, 1))
    expected = outcome(copy.deepcopy(outer), torch.ones(2, 3, 8, 8))
    with kn.save_memory(outer), kn.save_memory(inner):
        assert_same_bits(outcome(outer, torch.ones(2, 3, 8, 8)), expected)
    models = [network() for _ in range(2)]
    x = torch.randn(2, 3, 8, 8)
    expecteds = [outcome(copy.deepcopy(model), x) for model in models]
    found: dict[int, list[torch.Tensor]] = {}
    handles = [kn.save_memory(model) for model in models]

    def run(i: int) -> None:
        found[i] = outcome(models[i], x)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, handle in enumerate(handles):
        handle.undo()
        assert_same_bits(found[i], expecteds[i])


def test_autocast() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(model, x)
        with kn.save_memory(other):
            assert_same_bits(outcome(other, x), expected)


def test_no_gradients_no_hooks() -> None:
    model = network()
    with kn.save_memory(model), torch.no_grad():
        assert torch.equal(model(torch.ones(2, 3, 8, 8)), copy.deepcopy(model)(torch.ones(2, 3, 8, 8)))


def test_compiled_code_is_left_to_the_compiler() -> None:
    model, x = network(blocks=1), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    with kn.save_memory(model):
        found = outcome(torch.compile(model, backend="aot_eager"), x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_undo_removes_the_hooks() -> None:
    model = network()
    handle = kn.save_memory(model)
    assert model._forward_hooks
    handle.undo()
    handle.undo()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("longest", [0, -1, 65, 1.5, True, "4", None, 10**30])
def test_a_wrong_longest(longest: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match="save_memory: longest is an integer from 1 to 64; got"):
        kn.save_memory(model, longest=longest)
    assert not model._forward_hooks


def test_a_wrong_model() -> None:
    with pytest.raises(TypeError, match="save_memory"):
        kn.save_memory([network()])


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "tanh"])
def test_what_saves_its_own_output_is_freed(activation: str) -> None:
    """A graph that holds its own output would never be freed."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4))
    function = getattr(torch, activation)
    with kn.save_memory(model):
        ends = []
        for _ in range(3):
            y = function(model(torch.randn(2, 3, 8, 8)))
            ends.append(weakref.ref(y))
            del y

    class Ending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.body(x))

    ending = Ending()
    with kn.save_memory(ending):
        for _ in range(3):
            y = ending(torch.randn(2, 3, 8, 8))
            ends.append(weakref.ref(y))
            del y
    assert [end() for end in ends] == [None] * 6


def test_torch_func_goes_its_own_way() -> None:
    model = network("silu").eval()
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (torch.ones(2, 3, 8, 8),)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with kn.save_memory(model):
        found = torch.func.grad(loss)(parameters)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_place_layers() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
            self.bn1, self.bn2 = kn.BatchNorm2d(4), kn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn1(self.conv1(x), activation="leaky_relu", inplace=True)
            return self.conv3(F.relu_(self.bn2(self.conv2(y), activation=None)))

    assert_saving_changes_nothing(InPlace(), torch.randn(2, 3, 8, 8))


def test_layers_without_weight_or_statistics() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1),
        kn.BatchNorm2d(4, track_running_stats=False, bias=False), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert_saving_changes_nothing(model, torch.randn(2, 3, 8, 8))
    assert_saving_changes_nothing(model.eval(), torch.randn(2, 3, 8, 8))


def test_copies_and_pickles_save_memory_too() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    with kn.save_memory(model):
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not model._forward_hooks
    for other in others:
        seen: list[int] = []
        other[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(saved_outputs.calls))
        assert_same_bits(outcome(other, x), expected)
        assert seen == [1]


class Parts(nn.Module):
    """A convolution, a batch norm, and a reader of its output, with code between them."""

    def __init__(self, code: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 1), kn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.code = code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.code(self, x)


def residual_changed(m: Parts, x: torch.Tensor) -> torch.Tensor:
    identity = m.conv(x)
    out = m.bn(m.conv(x)) + identity
    identity.mul_(0.5)  # an addition keeps nothing
    return m.last(F.relu(out)) + identity


def bias_changed(m: Parts, x: torch.Tensor) -> torch.Tensor:
    y = m.bn(m.conv(x))
    with torch.no_grad():
        m.bn.bias.add_(1)
    return m.last(F.silu(y))


def complex_view(m: Parts, x: torch.Tensor) -> torch.Tensor:
    z = torch.view_as_complex(m.bn(m.conv(x)).unflatten(3, (-1, 2)))
    return m.last(torch.view_as_real(z * z.conj() * z).flatten(3))


def negative_view(m: Parts, x: torch.Tensor) -> torch.Tensor:
    z = torch.view_as_complex(m.bn(m.conv(x)).unflatten(3, (-1, 2)))
    return m.last((z.conj().imag * z.conj().imag).repeat_interleave(2, 3))


def read_through_data(m: Parts, x: torch.Tensor) -> torch.Tensor:
    y = m.bn(m.conv(x), activation="relu")
    alias = y.data
    y.mul_(3)
    return m.last(alias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("code", [residual_changed, bias_changed, complex_view, negative_view, read_through_data])
def test_code_between(code: Callable[..., torch.Tensor], training: bool) -> None:
    torch.manual_seed(0)
    model, _ = kn.convert(Parts(code))
    x = torch.randn(2, 3, 8, 8)
    model.train(training)
    for _ in range(3):
        model(x).sum().backward()
    assert_saving_changes_nothing(model, x)


def test_a_reader_that_changes_what_it_was_given_is_torchs_error() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(y)
            return y * y

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (y,) = ctx.saved_tensors
            return y.mul_(2 * g)

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="relu")
        read = m.last(y)
        return read + Square.apply(y)

    model, x = Parts(code), torch.randn(2, 3, 8, 8)
    for saves in (False, True):
        handle = kn.save_memory(model) if saves else None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model(x).sum().backward()
        if handle is not None:
            handle.undo()


@pytest.mark.parametrize("what", ["weight", "running_mean"])
def test_strided_vectors_are_kept(what: str) -> None:
    """The fast operators decline them, and would take contiguous copies."""
    model = Parts(lambda m, x: m.last(m.bn(m.conv(x), activation="gelu")))
    strided = torch.rand(4, 2)[:, 0]
    setattr(model.bn, what, nn.Parameter(strided) if what == "weight" else strided)
    assert not getattr(model.bn, what).is_contiguous()
    x = torch.randn(2, 3, 8, 8)
    assert kept(model, x, 8) == kept(model, x, None)


def test_the_backward_takes_the_reference_where_the_forward_did() -> None:
    model, x = network("gelu"), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model)
    with kn.kernels.use("reference"):
        expected = model(x)
        with kn.save_memory(other):
            found = other(x)
    expected.sum().backward()
    found.sum().backward()
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_hooks_of_the_users_after_an_interrupt() -> None:
    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        if m.fails:
            raise KeyboardInterrupt
        return m.last(m.bn(m.conv(x), activation="relu"))

    model: Any = Parts(code)
    x, seen = torch.randn(2, 3, 8, 8), []
    model.fails = True
    handle = kn.save_memory(model)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.fails = False
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(x).sum().backward()
    assert len(seen) > 4
    model.fails = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.undo()
    assert saved_tensor_hooks(True) is None


def test_undo_within_the_call() -> None:
    handles: list[kn.save_memory] = []

    def code(m: Parts, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x), activation="relu")
        handles.pop().undo()
        return m.last(y)

    model = Parts(code)
    handles.append(kn.save_memory(model))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert saved_tensor_hooks(True) is None


def test_where_hooks_are_disabled_nothing_is_done() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    expected = outcome(copy.deepcopy(model), x)
    with kn.save_memory(model), torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_same_bits(outcome(model, x), expected)


def test_a_call_within_itself() -> None:
    """A module that calls itself, and whose inner call fails."""

    def code(m: Parts, x: torch.Tensor, inner: bool = False) -> torch.Tensor:
        if x.shape[0] == 1:
            raise SystemExit
        with pytest.raises(SystemExit):
            m(x[:1])
        return m.last(m.bn(m.conv(x), activation="relu"))

    assert_saving_changes_nothing(Parts(code), torch.randn(2, 3, 8, 8))
