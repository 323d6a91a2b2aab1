"""Virtual batch normalization against a loop over the samples, each put with the reference batch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from keelnorm.nn.virtual import VirtualBatchNorm, collect_reference

EPS = 1e-5
SHAPES = [(5, 4), (3, 4, 6), (3, 4, 5, 2)]


def over(x):
    return [0, *range(2, x.dim())]


def alone(x, weight, bias):
    """Batch normalization by the definition."""
    mean, var = x.mean(over(x), keepdim=True), x.var(over(x), correction=0, keepdim=True)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return (x - mean) / (var + EPS).sqrt() * weight.view(shape) + bias.view(shape)


def oracle(x, reference, weight, bias):
    """Each sample as the last one of a batch of the reference and itself: section 3.4."""
    return torch.cat([alone(torch.cat([reference, x[n : n + 1]]), weight, bias)[-1:] for n in range(len(x))])


def make(dtype=torch.float64, **keywords):
    norm = VirtualBatchNorm(4, dtype=dtype, **keywords)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def network(dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(3, 4, dtype=dtype), make(dtype), nn.Tanh(), nn.Linear(4, 4, dtype=dtype), make(dtype)
    )


def by_hand(net, x, reference, *, detach):
    """The network's output, the reference batch run with x, normalized by its own moments."""
    for layer in net:
        if isinstance(layer, VirtualBatchNorm):
            seen = reference.detach() if detach else reference
            x = oracle(x, seen, layer.weight, layer.bias)
            reference = alone(reference, layer.weight, layer.bias)
        else:
            x, reference = layer(x), layer(reference)
    return x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, training):
    norm = make().train(training)
    reference = torch.randn(7, *shape[1:], dtype=torch.float64) * 2 + 1
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(shape, dtype=torch.float64)
    norm.set_reference(reference)
    inputs = (x, norm.weight, norm.bias)
    y, wanted = norm(x), oracle(x, reference, norm.weight, norm.bias)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(wanted, inputs, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    norm.requires_grad_(False)
    assert torch.autograd.gradcheck(norm, (x[:2],))


def test_it_is_the_weighted_mean_of_the_papers_code():
    """mean and E[x²] with weights R/(R + 1) and 1/(R + 1), positions being as many."""
    reference, x = torch.randn(6, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    norm = make()
    norm.set_reference(reference)
    share = 1 / 7
    mean = share * x.mean(2, keepdim=True) + (1 - share) * reference.mean((0, 2)).view(1, -1, 1)
    square = share * x.square().mean(2, keepdim=True) + (1 - share) * reference.square().mean((0, 2)).view(1, -1, 1)
    wanted = (x - mean) / (square - mean.square() + EPS).sqrt()
    wanted = wanted * norm.weight.view(-1, 1) + norm.bias.view(-1, 1)
    torch.testing.assert_close(norm(x), wanted, rtol=1e-9, atol=1e-9)


def test_a_large_mean_costs_no_digits():
    norm, offset = make(torch.float32), 1e6
    reference, x = torch.randn(50, 4, 9).round(decimals=1) + offset, torch.randn(3, 4, 9).round(decimals=1) + offset
    norm.set_reference(reference)
    wanted = oracle(x.double(), reference.double(), norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(norm(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_no_other():
    norm = make()
    norm.set_reference(torch.randn(8, 4, 3, dtype=torch.float64))
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x)[2].square().sum(), x)
    assert gradient[2].abs().min() > 0
    assert not gradient[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("detach", [True, False])
def test_a_network_with_its_reference_batch(detach):
    net = network()
    twin = copy.deepcopy(net)
    plain = nn.BatchNorm1d(4, dtype=torch.float64)
    for _ in range(3):
        reference, x = torch.randn(9, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        plain(net[0](reference))
        with collect_reference(net, detach=detach):
            out = net(reference)
        wanted = by_hand(twin, x, reference, detach=detach)
        assert out.requires_grad == (not detach)
        y = net(x)
        torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-9)
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, list(net.parameters()), dy)
        for a, b in zip(found, torch.autograd.grad(wanted, list(twin.parameters()), dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            for a, b, gradient in zip(net.parameters(), twin.parameters(), found, strict=True):
                a -= 0.1 * gradient
                b -= 0.1 * gradient
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(net[1], name), getattr(plain, name))


def test_the_reference_pass_normalizes_as_batch_norm_does():
    net, reference = network(), torch.randn(9, 3, dtype=torch.float64)
    with collect_reference(net):
        out = net(reference)
    hidden = alone(net[0](reference), net[1].weight, net[1].bias).tanh()
    torch.testing.assert_close(out, alone(net[3](hidden), net[4].weight, net[4].bias))


def test_a_pass_in_evaluation_leaves_the_running_statistics():
    net = network().eval()
    state = copy.deepcopy(net.state_dict())
    with collect_reference(net):
        net(torch.randn(9, 3, dtype=torch.float64))
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert net(torch.randn(1, 3, dtype=torch.float64)).isfinite().all()


def test_an_exception_restores_all_references():
    net, x = network(), torch.randn(2, 3, dtype=torch.float64)
    with collect_reference(net):
        net(torch.randn(9, 3, dtype=torch.float64))
    before = net(x)

    def fail():
        with collect_reference(net):
            net(torch.randn(9, 3, dtype=torch.float64))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(net(x), before)
    assert torch.is_grad_enabled()


def test_the_mask_is_as_if_the_rest_were_not_there():
    norm = make()
    twin = copy.deepcopy(norm)
    reference, x = torch.randn(6, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([5, 2, 3, 5, 1, 4])[:, None]
    norm.set_reference(torch.where(valid[:, None], reference, torch.nan), valid)
    twin.set_reference(reference.movedim(1, 2)[valid].t()[None])
    mask = torch.arange(5) < torch.tensor([3, 5, 2])[:, None]
    padded = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    y = norm(padded, mask=mask)
    for n, length in enumerate([3, 5, 2]):
        torch.testing.assert_close(y[n : n + 1, :, :length], twin(x[n : n + 1, :, :length]), rtol=1e-10, atol=1e-10)
        assert not y[n, :, length:].any()
    y.square().sum().backward()
    assert padded.grad.isfinite().all()
    assert not padded.grad.movedim(1, 2)[~mask].any()


def test_a_checkpoint_gives_the_same():
    net = network()
    with collect_reference(net):
        net(torch.randn(9, 3, dtype=torch.float64))
    results = []
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for run in (net, lambda d: checkpoint(net, d, use_reentrant=False)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_copy_within_the_pass_is_not_in_it(way):
    norm = VirtualBatchNorm(4)
    with collect_reference(norm):
        norm(torch.randn(9, 4))
        other = way(norm)
    assert torch.equal(other(torch.ones(2, 4)), norm(torch.ones(2, 4)))
    with collect_reference(other):
        other(torch.randn(9, 4))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_copy_keeps_the_reference(way):
    net, x = network(), torch.randn(2, 3, dtype=torch.float64)
    with collect_reference(net, detach=False):
        net(torch.randn(9, 3, dtype=torch.float64))
    other = way(net)
    assert torch.equal(other(x), net(x))
    assert not other[1]._reference.mean.requires_grad
    assert net[1]._reference.mean.requires_grad


def test_the_state_dict_is_that_of_torch():
    norm = make(torch.float32)
    norm.set_reference(torch.randn(9, 4))
    plain = nn.BatchNorm1d(4)
    assert list(norm.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(norm.state_dict())
    norm.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_types_residual_activation_and_layout(dtype):
    norm, wide = make(torch.float32), make()
    wide.load_state_dict(norm.state_dict())
    reference = torch.randn(6, 4, 3, 5, dtype=dtype)
    x, residual = torch.randn(2, 3, 4, 3, 5, dtype=dtype).unbind()
    x, residual = (t.to(memory_format=torch.channels_last) for t in (x, residual))
    norm.set_reference(reference)
    wide.set_reference(reference.double())
    y = norm(x, residual, activation="relu")
    wanted = torch.relu(wide(x.double()) + residual.double())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)


def test_single_values_and_no_samples():
    norm = make()
    norm.set_reference(torch.randn(9, 4, dtype=torch.float64))
    assert norm(torch.randn(1, 4, dtype=torch.float64)).isfinite().all()
    assert norm(torch.zeros(0, 4, dtype=torch.float64)).shape == (0, 4)


def test_compile():
    norm = make(torch.float32)
    norm.set_reference(torch.randn(9, 4, 5))
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 5, requires_grad=True)
    y, wanted = compiled(x), norm(x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, x, dy))
    norm.set_reference(torch.randn(9, 4, 5) * 3)
    torch.testing.assert_close(compiled(x), norm(x))


def run_twice(net):
    with collect_reference(net):
        net(torch.randn(9, 3))
        net(torch.randn(9, 3))


def nested(net):
    with collect_reference(net), collect_reference(net):
        pass


def test_errors():
    norm = make(torch.float32)
    with pytest.raises(RuntimeError, match=r"VirtualBatchNorm has no reference batch.*collect_reference"):
        norm(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="no reference batch"):
        norm.eval()(torch.randn(3, 4))
    norm.set_reference(torch.randn(9, 4))
    kept = norm._reference
    with pytest.raises(ValueError, match=r"set_reference: one value per channel has no variance"):
        norm.set_reference(torch.randn(1, 4))
    with pytest.raises(ValueError, match="x has 5 channels"):
        norm.set_reference(torch.randn(9, 5))
    assert norm._reference is kept
    with pytest.raises(ValueError, match="no VirtualBatchNorm in Linear"), collect_reference(nn.Linear(2, 2)):
        pass
    net = network(torch.float32)
    with pytest.raises(RuntimeError, match="ran twice within collect_reference"):
        run_twice(net)
    with pytest.raises(RuntimeError, match="going on already"):
        nested(net)
    assert all(layer._collecting is None and layer._reference is None for layer in (net[1], net[4]))
