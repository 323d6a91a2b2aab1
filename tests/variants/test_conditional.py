"""Conditional batch normalization: what is its own; the rest is in the contract suite."""

import copy

import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.nn.conditional import ConditionalBatchNorm

C, K, E = 3, 4, 5


def trained(bn):
    """A batch norm with values that are not the initial ones."""
    with torch.no_grad():
        bn.weight.uniform_(0.5, 2), bn.bias.normal_()
        bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    bn.num_batches_tracked.fill_(5)
    return bn


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def step(layer, x, **keywords):
    """Output and input gradient of a step."""
    x = x.clone().requires_grad_()
    y = layer(x, **keywords)
    y.sin().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "condition"),
    [({"num_classes": 1}, torch.zeros(6, dtype=torch.int64)), ({"embedding_dim": E}, torch.ones(6, E).double())],
    ids=["one class", "a new map"],
)
def test_starts_as_batch_norm(kind, condition, training):
    """One class is plain batch normalization, and so is a modulation that predicts no change."""
    plain = trained(nn.BatchNorm2d(C, eps=1e-3, momentum=0.3)).double().train(training)
    layer = ConditionalBatchNorm.from_batch_norm(plain, **kind)
    assert (layer.training, layer.eps, layer.momentum) == (training, 1e-3, 0.3)
    x = torch.randn(6, C, 4, 5, dtype=torch.float64)
    for found, expected in zip(step(layer, x, condition=condition), step(plain, x), strict=True):
        near(found, expected)
    near(layer.weight.grad.view(C), plain.weight.grad)
    near(layer.bias.grad.view(C), plain.bias.grad)
    for name, value in plain.named_buffers():
        near(layer.get_buffer(name), value)


def test_a_class_learns_from_its_samples_alone():
    """Row k of the tables' gradients is plain batch norm's, summed over the samples of class k."""
    layer = ConditionalBatchNorm(C, num_classes=K).double()
    labels = torch.tensor([2, 0, 2, 2, 0])
    x, dy = torch.randn(2, 5, C, 7, dtype=torch.float64)
    layer(x, condition=labels).backward(dy)
    xhat = nn.functional.batch_norm(x, None, None, training=True)
    for k in range(K):
        own = labels == k
        near(layer.weight.grad[k], (dy * xhat)[own].sum((0, 2)))
        near(layer.bias.grad[k], dy[own].sum((0, 2)))
    assert not layer.weight.grad[[1, 3]].any()


def test_weights_of_classes_mix_rows():
    layer = ConditionalBatchNorm(C, num_classes=K).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x, labels = torch.randn(6, C, 5, dtype=torch.float64), torch.arange(6) % K
    one_hot = nn.functional.one_hot(labels, K).double()
    by_label = layer(x, condition=labels)
    near(layer(x, condition=one_hot), by_label)
    blend = 0.25 * one_hot + 0.75 * one_hot.roll(1, 1)
    near(layer(x, condition=blend), 0.25 * by_label + 0.75 * layer(x, condition=(labels + 1) % K))


def test_a_module_of_the_users_predicts_the_changes():
    mlp = nn.Sequential(nn.Linear(E, 8), nn.ReLU(), nn.Linear(8, 2 * C)).double()
    layer = trained(ConditionalBatchNorm(C, embedding_dim=E, modulation=mlp, dtype=torch.float64))
    assert layer.modulation is mlp
    x, embedding = torch.randn(6, C, 4, dtype=torch.float64), torch.randn(6, E, dtype=torch.float64)
    embedding.requires_grad_()
    change = mlp(embedding)
    gain, shift = layer.weight + change[:, :C], layer.bias + change[:, C:]
    mean, var = x.mean((0, 2)), x.var((0, 2), correction=0)
    expected = (x - mean.view(C, 1)) / (var.view(C, 1) + layer.eps).sqrt() * gain.unsqueeze(2) + shift.unsqueeze(2)
    found = layer(x, condition=embedding)
    near(found, expected)
    leaves = [embedding, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves), strict=True
    ):
        near(one, other)


def test_an_embedding_in_another_precision():
    layer = ConditionalBatchNorm(C, embedding_dim=E)
    y = layer(torch.randn(4, C, 5).bfloat16(), condition=torch.randn(4, E).bfloat16())
    assert y.dtype == torch.bfloat16


def test_a_plain_checkpoint_gives_every_class_its_affine():
    plain = nn.Sequential(nn.Conv1d(2, C, 3), trained(nn.BatchNorm1d(C)))
    net = nn.Sequential(nn.Conv1d(2, C, 3), ConditionalBatchNorm(C, num_classes=K))
    net.load_state_dict(plain.state_dict())
    for name in ("weight", "bias"):
        assert torch.equal(net[1].get_parameter(name), plain[1].get_parameter(name).expand(K, C))
    assert torch.equal(net[1].running_var, plain[1].running_var)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.weight"):
        net.load_state_dict(nn.Sequential(plain[0], ConditionalBatchNorm(C, num_classes=K + 1)).state_dict())


@pytest.mark.parametrize(
    ("kind", "condition", "error", "says"),
    [
        ("num_classes", None, TypeError, "none came"),
        ("num_classes", [0, 1, 2, 3], TypeError, "class labels: int64"),
        ("num_classes", torch.zeros(4, dtype=torch.int32), ValueError, "int32"),
        ("num_classes", torch.zeros(3, dtype=torch.int64), ValueError, r"\(4,\)"),
        ("num_classes", torch.tensor([0, 1, K, 2]), ValueError, f"0 to {K - 1}; got labels from 0 to {K}"),
        ("num_classes", torch.tensor([0, -1, 1, 2]), ValueError, "from -1 to 2"),
        ("num_classes", torch.rand(4, E), ValueError, rf"\(4, {K}\)"),
        ("embedding_dim", None, TypeError, "an embedding"),
        ("embedding_dim", torch.zeros(4, dtype=torch.int64), ValueError, "an embedding"),
        ("embedding_dim", torch.rand(4, K), ValueError, rf"\(4, {E}\)"),
        ("embedding_dim", torch.rand(E), ValueError, rf"\(4, {E}\)"),
    ],
)
def test_a_condition_that_does_not_fit(kind, condition, error, says):
    layer = trained(ConditionalBatchNorm(C, **{kind: {"num_classes": K, "embedding_dim": E}[kind]}))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=f"ConditionalBatchNorm.*{says}"):
        layer(torch.randn(4, C, 5), condition=condition)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_modulation_of_the_wrong_width():
    layer = ConditionalBatchNorm(C, embedding_dim=E, modulation=nn.Linear(E, C))
    with pytest.raises(ValueError, match=rf"\(4, {2 * C}\), Δγ and then Δβ; got .*\(4, {C}\)"):
        layer(torch.randn(4, C), condition=torch.randn(4, E))
    assert layer.num_batches_tracked == 0


def test_channels_are_checked_without_running_statistics():
    layer = ConditionalBatchNorm(C, num_classes=K, track_running_stats=False)
    with pytest.raises(ValueError, match=f"and the layer {C};"):
        layer(torch.randn(4, C + 1), condition=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"num_classes": K, "embedding_dim": E},
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"num_classes": K, "modulation": nn.Linear(E, 2 * C)},
    ],
)
def test_constructions_that_mean_nothing(keywords):
    with pytest.raises(ValueError, match="num_classes"):
        ConditionalBatchNorm(C, **keywords)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm(C), nn.InstanceNorm2d(C), nn.BatchNorm2d(C)])
def test_takes_over_plain_batch_norms_alone(norm):
    norm.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=f"{type(norm).__name__}.*lost"):
        ConditionalBatchNorm.from_batch_norm(norm, num_classes=K)


def test_takes_over_the_legal_ranks():
    layer = ConditionalBatchNorm.from_batch_norm(kn.BatchNorm2d(C), num_classes=K)
    with pytest.raises(ValueError, match="must have 4 dimensions"):
        layer(torch.randn(4, C), condition=torch.zeros(4, dtype=torch.int64))


def test_labels_are_looked_at_on_the_cpu_alone():
    """Elsewhere that would wait for the device; a meta tensor has no values to look at."""
    layer = ConditionalBatchNorm(C, num_classes=K, device="meta")
    y = layer(torch.empty(4, C, 5, device="meta"), condition=torch.empty(4, dtype=torch.int64, device="meta"))
    assert y.shape == (4, C, 5)


def test_repr():
    assert repr(ConditionalBatchNorm(C, num_classes=K)).startswith(f"ConditionalBatchNorm({C}, num_classes={K}, eps=")
