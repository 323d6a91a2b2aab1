"""layer(x, sample_weight=...): a value counts as often as its weight says, or as much relative to the others."""

from __future__ import annotations

import math

import pytest
import torch

import keelnorm as kn


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 2, 2)], ids=str)
def test_weights_of_whole_numbers_are_repetitions(shape):
    x = torch.randn(shape, dtype=torch.float64)
    times = torch.tensor([1, 3, 0, 2, 1, 1])
    repeated = x.repeat_interleave(times, 0)
    layer, other = (kn.BatchNorm(3, dtype=torch.float64) for _ in range(2))
    y, expected = layer(x, sample_weight=times.double()), other(repeated)
    torch.testing.assert_close(y.repeat_interleave(times, 0), expected)
    torch.testing.assert_close(layer.running_mean, other.running_mean)
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_gradients():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 5, dtype=torch.float64)
    layer = kn.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False)
    assert torch.autograd.gradcheck(lambda x: layer(x, sample_weight=weight, activation="silu", residual=x), x)


def test_ones_are_no_weights_and_a_mask_takes_them_away():
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.7
    layer, other = (kn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(layer(x, sample_weight=torch.ones(4).double()), other(x))
    torch.testing.assert_close(layer(x, sample_weight=torch.ones(4, 5).double(), mask=mask), other(x, mask=mask))
    torch.testing.assert_close(layer.running_var, other.running_var)


def test_weights_of_nothing_change_nothing():
    layer = kn.BatchNorm1d(3)
    y = layer(torch.randn(4, 3), sample_weight=torch.zeros(4))
    assert y.isfinite().all()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, torch.ones(3))


# Frequencies that add up to 1 or less leave nothing to learn from.


@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.1, 0.2], [0.1] * 10, [1 / 3] * 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_too_little_is_refused(weights, dtype):
    """Also where a rounding puts the sum above 1."""
    layer, x = kn.BatchNorm1d(1), torch.arange(len(weights), dtype=torch.float32).unsqueeze(1)
    with pytest.raises(ValueError, match=r"BatchNorm1d: sample_weight is a frequency.*Σw must be above 1.*importance"):
        layer(x, sample_weight=torch.tensor(weights, dtype=dtype))
    assert (layer.running_mean.item(), layer.num_batches_tracked.item()) == (0, 0)
    with pytest.raises(ValueError, match="Σw must be above 1"):
        kn.functional.batch_norm(
            x, torch.zeros(1), torch.ones(1), training=True, sample_weight=torch.tensor(weights, dtype=dtype)
        )


@pytest.mark.parametrize("weights", [[0.25, 0.75], [1.0, 0.0]], ids=str)
@pytest.mark.parametrize("too_few", ["running", "skip"])
def test_policies(weights, too_few):
    layer = kn.BatchNorm1d(1, too_few=too_few)
    x, w = torch.tensor([[0.0], [1.0]]), torch.tensor(weights)
    y = layer(x, sample_weight=w)
    mean, var = (0.0, 1.0) if too_few == "running" else ((w @ x).item(), (w @ (x - w @ x) ** 2).item())
    torch.testing.assert_close(y, (x - mean) / math.sqrt(var + layer.eps))
    assert (layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()) == (0, 1, 0)


def test_nothing_is_refused_where_nothing_is_learned():
    x, w = torch.tensor([[0.0], [1.0]]), torch.tensor([0.25, 0.75])
    for layer in (kn.BatchNorm1d(1, track_running_stats=False), kn.BatchNorm1d(1).eval()):
        assert layer(x, sample_weight=w).isfinite().all()
    layer = kn.BatchNorm1d(1)
    layer(x, sample_weight=torch.tensor([3.0, 0.0]))  # the same value three times
    assert layer.running_var.item() == pytest.approx(0.9)


@pytest.mark.parametrize("keywords", [{}, {"track_running_stats": False}], ids=str)
def test_one_value_has_no_variance(keywords):
    layer, x = kn.BatchNorm1d(1, **keywords), torch.tensor([[0.0], [1.0]])
    with pytest.raises(ValueError, match="leaves one value per channel"):
        layer(x, sample_weight=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="leaves one value per channel"):
        layer(x, sample_weight=torch.tensor([5.0, 0.0]), weighting="importance")
    with pytest.raises(ValueError, match="leaves one value per channel"):
        layer(x, sample_weight=torch.tensor([5.0, 1.0]), mask=torch.tensor([True, False]), weighting="importance")


@pytest.mark.parametrize("weights", [[0.25, 0.75], [5.0, 0.0], [1 / 3, 2 / 3]], ids=str)
def test_what_is_not_looked_at_learns_nothing_either(weights):
    """In compiled code, as on GPUs, no value is waited for."""
    layer = kn.BatchNorm1d(1)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    weighting = "importance" if 0.0 in weights else "frequency"
    y = call(torch.tensor([[0.0], [1.0]]), sample_weight=torch.tensor(weights), weighting=weighting)
    assert y.isfinite().all()
    assert (layer.running_mean.item(), layer.running_var.item(), layer.num_batches_tracked.item()) == (0, 1, 0)


# Importance: only the weights' ratios matter.


def unbiased(x, w):
    """The mean and Σw·(x − mean)²/(Σw − Σw²/Σw), in float64."""
    x, w = x.double(), w.double()
    mean = (w @ x) / w.sum()
    return mean, (w @ (x - mean) ** 2) / (w.sum() - (w @ w) / w.sum())


@pytest.mark.parametrize("scale", [1e-6, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_importance_has_no_unit(scale, way):
    x, w = torch.randn(9, 3), torch.rand(9) + 0.1
    layer, twin = kn.BatchNorm1d(3, momentum=1.0), kn.BatchNorm1d(3, momentum=1.0)
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer
    y = call(x, sample_weight=w * scale, weighting="importance")
    torch.testing.assert_close(y, twin(x, sample_weight=w * 10))
    mean, var = unbiased(x, w)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=0)
    assert layer.num_batches_tracked.item() == 1


def test_the_variance_of_importance_is_unbiased():
    """Over many draws of values whose variance is 4, with weights that are not the same."""
    generator = torch.Generator().manual_seed(0)
    w = torch.tensor([0.1, 0.2, 0.3, 0.4])
    draws = 2 * torch.randn(4, 40000, generator=generator, dtype=torch.float64)
    found = kn.Moments.from_tensor(draws, sample_weight=w, weighting="importance").var_unbiased
    # The mean of so many variances is off by a few standard errors at most.
    assert abs(found.mean().item() - 4) < 5 * found.std().item() / math.sqrt(len(found))


def test_weights_that_are_one_mean_the_same():
    x = torch.randn(6, 2)
    layers = [kn.BatchNorm1d(2) for _ in range(3)]
    layers[0](x)
    for layer, weighting in zip(layers[1:], ("frequency", "importance"), strict=True):
        layer(x, sample_weight=torch.ones(6), weighting=weighting)
        torch.testing.assert_close(layer.running_var, layers[0].running_var)


def test_a_weighting_that_there_is_not():
    x = torch.randn(4, 1)
    for call in (kn.BatchNorm1d(1), kn.Moments.from_tensor, kn.functional.moments):
        for keywords in ({}, {"sample_weight": torch.ones(4)}):
            with pytest.raises(ValueError, match=r"weighting must be one of .*'importance'.*got 'reliability'"):
                call(x, weighting="reliability", **keywords)


def test_gradients_of_importance():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    layer = kn.BatchNorm1d(3, dtype=torch.float64, track_running_stats=False)

    def call(x, weight):
        return layer(x, sample_weight=weight, weighting="importance", activation="silu", residual=x)

    assert torch.autograd.gradcheck(call, (x, weight))


def test_a_wrong_weighting_is_refused_where_results_wait(monkeypatch):
    from keelnorm.engine.fusion import call

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = kn.BatchNorm1d(3)

        def forward(self, x):
            return torch.relu(self.bn(x, weighting="often"))

    monkeypatch.setattr(call, "smallest", [0, 0])
    model, _ = kn.convert(Net())
    for _ in range(2):
        with pytest.raises(ValueError, match="weighting must be one of"):
            model(torch.randn(4, 3))
