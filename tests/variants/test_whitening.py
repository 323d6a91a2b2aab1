"""Decorrelated batch normalization: what is special to it. The contract suite asks the rest."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev
from variants.cases_whitening import by_definition, by_newton, whitened

from keelnorm.control import accumulate_statistics
from keelnorm.nn._shared.inverse_sqrt import newton, zca
from keelnorm.nn.whitening import WhiteningBatchNorm

METHODS = ("newton", "zca")
forward_mode = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own use
ORACLES = {"newton": by_newton, "zca": by_definition}


def correlated(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values whose channels are mixtures of one another, with means."""
    channels = shape[1]
    mixing = torch.eye(channels, dtype=dtype) + 0.4 * torch.randn(channels, channels, dtype=dtype)
    return torch.einsum("cd,nd...->nc...", mixing, torch.randn(shape, dtype=dtype)) + torch.randn(
        1, channels, *([1] * (len(shape) - 2)), dtype=dtype
    )


def covariance(y: Tensor) -> Tensor:
    """Biased, of the channels, over all positions."""
    return y.movedim(1, 0).flatten(1).cov(correction=0)


def spd(size: int, *eigenvalues: float) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def randomized(layer: WhiteningBatchNorm) -> WhiteningBatchNorm:
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
        layer.running_mean.normal_()
        root = torch.randn_like(layer.running_cov)
        layer.running_cov.copy_(root @ root.mT + 0.1 * torch.eye(layer.group_size))
    return layer


# Values


@pytest.mark.parametrize("shape", [(40, 6), (8, 6, 9), (6, 6, 5, 4), (4, 6, 3, 2, 3)])
def test_zca_makes_the_covariance_the_identity(shape: tuple[int, ...]) -> None:
    y = WhiteningBatchNorm(6, eps=1e-14, method="zca", dtype=torch.float64)(correlated(*shape))
    torch.testing.assert_close(covariance(y), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert y.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-12


def test_eps_is_what_is_missing_from_the_identity() -> None:
    x = correlated(50, 4)
    y = WhiteningBatchNorm(4, eps=0.1, method="zca", dtype=torch.float64)(x)
    values = torch.linalg.eigvalsh(covariance(x))
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance(y)), (values / (values + 0.1)).sort().values)


def test_newton_approaches_the_identity() -> None:
    x = correlated(100, 5)
    errors = []
    for iterations in (1, 3, 5, 8, 20, 60):
        layer = WhiteningBatchNorm(5, eps=1e-14, iterations=iterations, dtype=torch.float64)
        errors.append((covariance(layer(x)) - torch.eye(5, dtype=torch.float64)).abs().max().item())
    assert errors[:4] == sorted(errors[:4], reverse=True), errors
    assert errors[-2] < 1e-9, errors
    assert errors[-1] < 1e-9, errors  # iterated on, it stays there


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [1, 2, 3, 6])
@pytest.mark.parametrize("training", [True, False])
def test_groups(method: str, group_size: int, training: bool) -> None:
    layer = randomized(WhiteningBatchNorm(6, method=method, group_size=group_size, dtype=torch.float64)).train(training)
    x = correlated(5, 6, 3, 4)
    expected = whitened(ORACLES[method], layer, x)  # before the forward changes the running statistics
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_a_group_of_more_channels_than_there_are_is_all_of_them() -> None:
    assert WhiteningBatchNorm(3).running_cov.shape == (1, 3, 3)
    assert WhiteningBatchNorm(128).running_cov.shape == (2, 64, 64)


@pytest.mark.parametrize("method", METHODS)
def test_one_channel_in_a_group_is_plain_batch_normalization(method: str) -> None:
    layer = WhiteningBatchNorm(4, method=method, group_size=1, dtype=torch.float64)
    plain = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    for _ in range(3):
        x = correlated(3, 4, 5, 5)
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    torch.testing.assert_close(layer.running_cov.flatten(), plain.running_var)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_large_mean_costs_no_digits(method: str) -> None:
    x = correlated(64, 4, 6, dtype=torch.float32)
    shifted = x + 2.0**18
    layer = WhiteningBatchNorm(4, method=method)
    expected = whitened(ORACLES[method], copy.deepcopy(layer).double(), shifted.double())
    torch.testing.assert_close(layer(shifted).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_positions_than_channels(method: str) -> None:
    x = correlated(4, 8, dtype=torch.float32).requires_grad_()
    y = WhiteningBatchNorm(8, method=method)(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


# Derivatives


@forward_mode
@pytest.mark.parametrize(
    "eigenvalues", [(0.1, 0.5, 2.0), (1.0, 1.0 + 1e-13, 2.0), (1.0, 1.0, 1.0)], ids=("distinct", "nearly", "equal")
)
def test_derivatives_of_the_inverse_root(eigenvalues: tuple[float, ...]) -> None:
    a = spd(3, *eigenvalues).requires_grad_()

    def root(a: Tensor) -> Tensor:
        return zca((a + a.mT) / 2, 1e-12)

    assert torch.autograd.gradcheck(root, a, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(root, a)


@forward_mode
def test_the_inverse_root_under_function_transforms() -> None:
    a = torch.stack([spd(3, 0.3, 1, 2), spd(3, 1, 1, 4)])

    def root(a: Tensor) -> Tensor:
        return zca((a + a.mT) / 2, 1e-12)

    torch.testing.assert_close(torch.vmap(root)(a), root(a))
    torch.testing.assert_close(jacfwd(root)(a), jacrev(root)(a))
    torch.testing.assert_close(
        torch.vmap(hessian(lambda a: root(a)[0, 1]))(a)[0], hessian(lambda a: newton((a + a.mT) / 2, 40)[0, 1])(a[0]),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip


@forward_mode
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_the_layer(method: str, training: bool) -> None:
    layer = randomized(WhiteningBatchNorm(4, method=method, group_size=2, dtype=torch.float64)).train(training)
    layer.track_running_stats = False  # the buffers would change between evaluations
    x = correlated(5, 4, 2).requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(forward, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(forward, inputs)


def test_gradients_where_two_channels_are_alike() -> None:
    """Whitened data have all eigenvalues equal: the case that autograd through eigenvectors turns into NaN."""
    x = WhiteningBatchNorm(3, eps=1e-14, method="zca", dtype=torch.float64)(correlated(9, 3)).detach()
    gradients = []
    for method in METHODS:
        layer = WhiteningBatchNorm(3, method=method, iterations=30, dtype=torch.float64)
        leaf = x.clone().requires_grad_()
        (layer(leaf) * torch.arange(27.0, dtype=torch.float64).view(9, 3).sin()).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-9)


# State


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None) -> None:
    layer = WhiteningBatchNorm(4, group_size=2, momentum=momentum, dtype=torch.float64)
    mean, cov = torch.zeros(4, dtype=torch.float64), torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    for step in range(1, 4):
        x = correlated(6, 4, 3)
        layer(x)
        rows = x.movedim(1, 0).flatten(1)
        share = 1 / step if momentum is None else momentum
        mean = (1 - share) * mean + share * rows.mean(1)
        cov = (1 - share) * cov + share * torch.stack([rows[:2].cov(), rows[2:].cov()])  # unbiased
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_cov, cov)
    torch.testing.assert_close(layer.running_var, cov.diagonal(dim1=1, dim2=2).flatten())
    assert layer.num_batches_tracked == 3
    layer.reset_running_stats()
    assert torch.equal(layer.running_cov, torch.eye(2, dtype=torch.float64).repeat(2, 1, 1))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_micro_batches_that_accumulate_are_one_batch(momentum: float | None) -> None:
    """The covariances too, with what lies between the micro-batches' means."""
    layer = WhiteningBatchNorm(4, group_size=2, momentum=momentum, dtype=torch.float64)
    large, x = copy.deepcopy(layer), correlated(12, 4, 3)
    x = x + torch.linspace(-3, 3, 12, dtype=torch.float64).view(-1, 1, 1)
    for _ in range(2):
        with accumulate_statistics(layer):
            for part in x.split([5, 1, 6]):
                layer(part)
        large(x)
        for name, value in large.named_buffers():
            torch.testing.assert_close(layer.get_buffer(name), value)
        x = 2 * x


def test_evaluation_whitens_the_population() -> None:
    layer = WhiteningBatchNorm(4, eps=1e-12, momentum=None, method="zca", dtype=torch.float64)
    data = correlated(4000, 4)
    for batch in data.split(400):
        layer(batch)
    y = layer.eval()(data)
    torch.testing.assert_close(covariance(y), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_poisoned_channel_leaves_its_group_alone(method: str, poison: float) -> None:
    layer = WhiteningBatchNorm(4, group_size=2, method=method)
    x = correlated(6, 4, 3, dtype=torch.float32)
    x[1, 2, 0] = poison
    y = layer(x)
    assert y[:, :2].isfinite().all()
    assert not y[:, 2:].isfinite().any()
    assert torch.equal(layer.running_cov[1], torch.eye(2))
    assert not torch.equal(layer.running_cov[0], torch.eye(2))


def test_without_running_statistics() -> None:
    layer = WhiteningBatchNorm(3, track_running_stats=False, affine=False, method="zca", eps=1e-12).double().eval()
    assert not layer.state_dict()
    torch.testing.assert_close(covariance(layer(correlated(30, 3))), torch.eye(3, dtype=torch.float64))


def test_state_dict_and_pickle() -> None:
    layer = WhiteningBatchNorm(4, group_size=2, method="zca")
    layer(correlated(6, 4, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    x = correlated(6, 4, dtype=torch.float32)
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    other = WhiteningBatchNorm(4, group_size=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.running_cov, layer.running_cov)
    with pytest.raises(RuntimeError, match="running_cov"):
        other.load_state_dict(torch.nn.BatchNorm1d(4).state_dict())


def test_a_checkpoint_counts_once() -> None:
    layer, plain = (WhiteningBatchNorm(4, group_size=2) for _ in range(2))
    x = correlated(6, 4, dtype=torch.float32).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    plain(x)
    assert torch.equal(layer.running_cov, plain.running_cov)
    assert layer.num_batches_tracked == 1


def test_an_empty_batch_changes_nothing() -> None:
    layer = WhiteningBatchNorm(4)
    before = copy.deepcopy(layer.state_dict())
    assert layer(torch.zeros(0, 4, 3)).shape == (0, 4, 3)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


# What surrounds it


@pytest.mark.parametrize("training", [True, False])
def test_layout_and_dtype(training: bool) -> None:
    layer = randomized(WhiteningBatchNorm(4, group_size=2)).train(training)
    x = correlated(3, 4, 5, 6, dtype=torch.float32)
    last = copy.deepcopy(layer)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    y = copy.deepcopy(layer)(x)
    assert y.is_contiguous()
    torch.testing.assert_close(last, y)
    half = copy.deepcopy(layer)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, copy.deepcopy(layer)(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_reach_inside(training: bool) -> None:
    layer = randomized(WhiteningBatchNorm(4)).train(training)
    x = correlated(6, 4, dtype=torch.float32)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, expected)


def test_residual_and_activation() -> None:
    layer = WhiteningBatchNorm(4)
    x, residual = correlated(6, 4, 3, dtype=torch.float32), torch.randn(6, 4, 3)
    expected = torch.relu(copy.deepcopy(layer)(x) + residual)
    torch.testing.assert_close(layer(x, residual, activation="relu"), expected)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from before, none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_break(method: str, fresh_dynamo: None) -> None:
    layer = WhiteningBatchNorm(4, group_size=2, method=method)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = correlated(6, 4, 3, dtype=torch.float32).requires_grad_()
    y, expected = compiled(x), twin(x)
    weights = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    (dx,) = torch.autograd.grad((y * weights).sum(), x)
    (expected_dx,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(dx, expected_dx)
    torch.testing.assert_close(layer.running_cov, twin.running_cov)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 4}, r"must divide num_features=6.*got 4 \(int\).*\[1, 2, 3, 6\]"),
        ({"group_size": 0}, "must divide"),
        ({"method": "pca"}, r"one of \('newton', 'zca'\); got 'pca'"),
        ({"iterations": 0}, "positive integer; got 0"),
    ],
)
def test_illegal_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WhiteningBatchNorm(6, **arguments)


def test_illegal_calls_change_nothing() -> None:
    layer = WhiteningBatchNorm(6, group_size=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="8 channels"):
        layer(torch.randn(5, 8))
    with pytest.raises(ValueError, match="one value per channel"):
        layer(torch.randn(1, 6))
    with pytest.raises(ValueError, match="mask has no meaning"):
        layer(torch.randn(5, 6), mask=torch.ones(5, dtype=torch.bool))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    free = WhiteningBatchNorm(6, affine=False, track_running_stats=False)
    with pytest.raises(ValueError, match="6 channels"):
        free(torch.randn(5, 12))


def test_it_says_what_it_is() -> None:
    assert "group_size=2, method='newton', iterations=5" in repr(WhiteningBatchNorm(4, group_size=2))
