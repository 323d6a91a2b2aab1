"""Which pairs kn.Sequential runs as one: counted, and by the kernels' own count. The first call learns what follows."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn.layer_pairs import PAIRS, assert_near, randomize
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

import keelnorm as kn
from keelnorm.engine.fusion import pending as fusion

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def pair():
    return kn.Sequential(randomize(kn.BatchNorm2d(3)), nn.ReLU())


def expected_of(net, x=X):
    """BN and ReLU by torch's functions, with the state that the net has now."""
    norm = net[0]
    y = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return y.relu()


def operators_run(net, x=X):
    before = sum(kn.kernels.calls().values())
    net(x)
    return sum(kn.kernels.calls().values()) - before


def fused_in(net, x=X):
    """How many kernels compute a layer with what follows it, in one call."""
    before = fusion.completed
    net(x)
    return fusion.completed - before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("layer_type", "shape"), [*((ours, shape) for ours, _, shape in PAIRS), (kn.BatchNorm, (2, 5, 3))]
)
def test_a_pair_is_one_operator(layer_type, shape, inplace, training):
    """As many operators as the layer alone, from the second call on."""
    layer, x = randomize(layer_type(5)), torch.randn(shape)
    net = kn.Sequential(layer, nn.ReLU(inplace=inplace)).train(training)
    alone = operators_run(layer, x)
    kept = x.clone()
    assert fused_in(net, x) == 0
    assert operators_run(net, x) == alone
    if kn.kernels.active() != "reference":
        assert alone == 1
    assert fused_in(net, x) == 1
    assert (net(x) >= 0).all()
    assert torch.equal(x, kept)


def test_reference_runs_fused_too():
    with kn.kernels.use("reference"):
        net = pair().eval()
        assert [fused_in(net) for _ in range(3)] == [0, 1, 1]
        assert_near(net(X), expected_of(net))


def test_unfused_in_torchs_sequential():
    """The count counts."""
    net = nn.Sequential(kn.BatchNorm2d(3), nn.ReLU())
    assert [fused_in(net) for _ in range(3)] == [0, 0, 0]


def test_torchs_sequential_inside_ours():
    net = kn.Sequential(nn.Sequential(kn.BatchNorm2d(3), nn.ReLU())).eval()
    before = [net(X) for _ in range(3)][-1]
    assert_near(before, expected_of(net[0]))


class OurReLU(nn.ReLU):
    """A subclass may compute something else."""


class OurBatchNorm(kn.BatchNorm2d):
    """A subclass's forward may not take an activation."""

    def forward(self, x):  # type: ignore[override]
        return super().forward(x)


class Identity(nn.Module):
    def forward(self, x):
        return x


def with_own_forward(module):
    """A forward patched onto this one module, as profilers and quantizers do."""
    original = module.forward
    module.forward = lambda *args: original(*args)
    return module


UNFUSED: dict[str, Callable[..., Any]] = {
    "a layer of torch": lambda net: net.__setitem__(0, randomize(nn.BatchNorm2d(3))),
    **{
        f"{kind} on the {('layer', 'ReLU')[index]}": (
            lambda net, index=index, kind=kind: getattr(net[index], f"register_{kind}")(lambda *args: None)
        )
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
        for index in (0, 1)
    },
}


#: What the ReLU and the layer are does not matter, nor who calls them: what they compute does.
FUSED = {
    "nothing": lambda net: None,
    "a patched layer": lambda net: with_own_forward(net[0]),
    "a parametrized layer": lambda net: parametrize.register_parametrization(net[0], "weight", Identity()),
    "a subclass of the layer": lambda net: net.__setitem__(0, randomize(OurBatchNorm(3))),
    "a subclass of ReLU": lambda net: net.__setitem__(1, OurReLU()),
    "a patched ReLU": lambda net: with_own_forward(net[1]),
    "a module between": lambda net: net.insert(1, nn.Identity()),
}


@pytest.mark.parametrize("change", UNFUSED.values(), ids=UNFUSED)
def test_runs_unfused_and_right(change, backend):
    net = pair().eval()
    change(net)
    net.eval()
    for _ in range(3):
        assert_near(net(X), expected_of(net))
    assert fused_in(net) == 0


@pytest.mark.parametrize("change", FUSED.values(), ids=FUSED)
def test_runs_fused_and_right(change, backend):
    net = pair().eval()
    change(net)
    net.eval()
    for _ in range(3):
        assert_near(net(X), expected_of(net))
    assert fused_in(net) == 1


@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks_see_every_module(register):
    net = pair().eval()
    assert [fused_in(net) for _ in range(2)] == [0, 1]
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(register(lambda module, *args: None).remove)
        assert_near(net(X), expected_of(net))
        assert fused_in(net) == 0
    assert fused_in(net) == 1  # again


@pytest.mark.parametrize("learned", [True, False])
def test_fused_again_once_the_hook_is_gone(learned):
    net = pair()
    if learned:
        assert [fused_in(net) for _ in range(2)] == [0, 1]
    seen = []
    handle = net[1].register_forward_hook(lambda module, args, y: seen.append(args[0].min().item()))
    assert [fused_in(net) for _ in range(4)] == [0] * 4
    assert len(seen) == 4
    assert max(seen) < 0  # the hook sees what comes before the activation
    handle.remove()
    net(X)
    assert fused_in(net) == 1
    assert len(seen) == 4


def test_a_hook_that_changes_the_value_between_is_obeyed(backend):
    net = pair().eval()
    net[0].register_forward_hook(lambda module, args, y: -y)
    norm_only = net[0](X).neg()
    assert_near(net(X), (-norm_only).relu())
    assert not torch.equal(net(X), norm_only.relu())


def test_hooks_on_the_sequential_itself_leave_it_fused():
    net = pair()
    seen = []
    net.register_forward_hook(lambda module, args, y: seen.append(y))
    for _ in range(3):
        assert net(X) is seen[-1]
        assert type(seen[-1]) is torch.Tensor
    assert fused_in(net) == 1


@pytest.mark.parametrize(
    ("build", "fused"),
    [
        (lambda bn, relu: kn.Sequential(bn(), relu, bn(), relu), 2),  # shared
        (lambda bn, relu: kn.Sequential(kn.Sequential(bn(), relu), bn(), relu), 2),  # nested
        (lambda bn, relu: nn.Sequential(kn.Sequential(bn(), relu), kn.Sequential(bn(), relu)), 2),
        (lambda bn, relu: kn.Sequential(kn.Sequential(bn()), relu), 1),  # in different containers
        (lambda bn, relu: kn.Sequential(bn(), relu, relu), 1),
        (lambda bn, relu: kn.Sequential(relu, bn()), 0),
        (lambda bn, relu: kn.Sequential(bn(), bn(), relu), 1),
        (lambda bn, relu: kn.Sequential(bn(), nn.LeakyReLU(), relu), 1),
        (lambda bn, relu: kn.Sequential(bn(), relu, nn.Conv2d(3, 3, 1), bn(), relu)[3:], 1),
    ],
    ids=["shared", "nested", "inside torch's", "split", "two ReLUs", "ReLU first", "two norms", "LeakyReLU", "slice"],
)
def test_structures(build, fused):
    net = build(lambda: randomize(kn.BatchNorm2d(3)), nn.ReLU())
    net.eval()
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):  # torch's, which does not fuse
        if type(module) is kn.Sequential:
            vars(module)  # type: ignore[assignment]
    wanted = plain(X)
    for _ in range(3):
        assert_near(net(X), wanted, units=64)
    assert fused_in(net) == fused


def test_a_fused_pair_keeps_its_digits_in_training(backend):
    """Forward, gradients and moments of the pair are those of the two modules run one after the other."""
    net, x, dy = pair(), X.clone().requires_grad_(), torch.randn_like(X)
    apart = nn.Sequential(kn.BatchNorm2d(3), nn.ReLU())
    apart.load_state_dict(net.state_dict())
    x2 = X.clone().requires_grad_()
    for _ in range(2):
        net(X), apart(X)
    before = fusion.completed
    y, y2 = net(x), apart(x2)
    assert fusion.completed - before == 1
    y.backward(dy), y2.backward(dy)
    assert_near(y, y2)
    assert_near(x.grad, x2.grad, units=32)
    for p, p2 in zip(net.parameters(), apart.parameters(), strict=True):
        assert_near(p.grad, p2.grad, units=32)
    for b, b2 in zip(net.buffers(), apart.buffers(), strict=True):
        assert torch.equal(b, b2)
