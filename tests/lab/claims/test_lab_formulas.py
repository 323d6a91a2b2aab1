"""What claims compute beside training: against definitions, and without a trace in the network."""

import copy
import math

import pytest
import scipy.linalg
import torch
from torch import nn

import keelnorm as kn
from keelnorm.lab.claims import _covariate_shift_training, inference, loss_landscape, placement, scales
from keelnorm.lab.claims import _small_batches_training as small_batches
from keelnorm.lab.claims import _weight_decay_training as weight_decay
from keelnorm.lab.claims._covariate_shift_training import ShiftingNoise, cosine_after_earlier_layers
from keelnorm.lab.claims.gradients import THEORY, gradient_norms
from keelnorm.lab.claims.hyperparameters import LEAST_MOMENTUM_LEFT, RATES, SCALES, settings
from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import table
from keelnorm.lab.training.arms import BN, NONE
from keelnorm.lab.training.cost_measurement import SIZES, build, networks, saved_bytes
from keelnorm.lab.training.frechet import frechet_distance
from keelnorm.lab.training.stacks import StackedMLP
from keelnorm.lab.training.train import losses


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def small(arm=BN, **how):
    return StackedMLP(6, (8, 8, 8), 3, arm, generator(draw="test"), **how)


def batch(count=40):
    return torch.randn(count, 6), torch.randint(0, 3, (count,))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class TestFrechet:
    def test_of_normal_distributions_it_is_the_formula(self):
        first, second = torch.randn(500, 4), torch.randn(400, 4) @ torch.randn(4, 4) + torch.randn(4)
        (m1, c1), (m2, c2) = ((x.double().mean(0), torch.cov(x.double().t())) for x in (first, second))
        root = torch.from_numpy(scipy.linalg.sqrtm((c1 @ c2).numpy()).real)
        expected = (m1 - m2).square().sum() + (c1 + c2 - 2 * root).trace()
        assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)

    def test_a_set_is_at_no_distance_from_itself_and_a_shift_counts_squared(self):
        x = torch.randn(100, 5, dtype=torch.float64)
        assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
        assert frechet_distance(x, x + 3.0) == pytest.approx(5 * 9.0)

    def test_in_one_dimension_it_is_that_of_means_and_deviations(self):
        x, y = torch.randn(200, 1, dtype=torch.float64), 2 * torch.randn(300, 1, dtype=torch.float64) + 1
        expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
        assert frechet_distance(x, y) == pytest.approx(expected.item())

    @pytest.mark.parametrize("shape", [(1, 4), (4,), (0, 4)])
    def test_too_few_rows_are_refused(self, shape):
        with pytest.raises(ValueError, match="n >= 2"):
            frechet_distance(torch.randn(shape), torch.randn(10, 4))


class TestSmallBatches:
    def test_the_synchronized_arm_is_what_micro_batches_as_one_batch_give(self):
        stack = small_batches.RemedyStack(6, (8, 8), 3, small_batches.ARMS["sync"], generator(draw="test")).double()
        other = copy.deepcopy(stack)
        x, y = batch(small_batches.ACCUMULATED * 2)
        x = x.double()
        losses(stack.train(), x, y).sum().backward()
        parts = list(zip(x.split(2), y.split(2), strict=True))
        kn.backward_as_one_batch(
            other.train(), lambda part: losses(other, *part).sum() / small_batches.ACCUMULATED, parts
        )
        for (name, ours), theirs in zip(stack.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=name)
        for buffer, their_buffer in zip(stack.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(buffer, their_buffer, check_dtype=False)

    def test_the_moving_average_arm_has_the_centered_weights_of_the_library(self):
        stack = small_batches.RemedyStack(6, (8,), 3, small_batches.ARMS["moving"], generator(draw="test"))
        layer = nn.Linear(6, 8, bias=False)
        with torch.no_grad():
            layer.weight.copy_(stack.weights[0])
        x, _ = batch()
        torch.testing.assert_close(stack.linear(0, x.unsqueeze(0))[0], kn.center_weights(layer)(x))

    @pytest.mark.parametrize("arm", list(small_batches.ARMS))
    def test_replicas_of_a_remedy_do_not_mix(self, arm):
        """Two replicas with the same rates stay the same, and equal a network of its own."""
        together, alone = (
            small_batches.RemedyStack(6, (8, 8), 3, small_batches.ARMS[arm], generator(draw="test"), torch.ones(count))
            for count in (2, 1)
        )
        for _ in range(4):
            x, y = batch(8)
            for stack in (together, alone):
                losses(stack.train(), x, y).sum().backward()
                with torch.no_grad():
                    for parameter in stack.parameters():
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None
        x, _ = batch()
        both, one = together.eval()(x), alone.eval()(x)
        torch.testing.assert_close(both, one.expand(2, -1, -1), rtol=1e-3, atol=1e-4)

    def test_cross_iteration_uses_earlier_batches(self):
        stack = small_batches.RemedyStack(6, (8, 8), 3, small_batches.ARMS["cross"], generator(draw="test")).train()
        stack.blocks[0][0].burn_in = stack.blocks[1][0].burn_in = 0
        x, y = batch(4)
        losses(stack, x, y).sum().backward()
        other = batch(4)[0]
        with_window = stack(other).detach()
        for block in stack.blocks:
            block[0].reset_window()
        assert not torch.allclose(with_window, stack(other))


class TestLandscape:
    def test_looking_around_leaves_no_trace(self):
        stack = small().train()
        before = state(stack)
        loss_landscape.look_around(stack, *batch())
        for name, value in stack.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(parameter.grad is None for parameter in stack.parameters())

    def test_on_a_quadratic_it_is_what_can_be_computed_by_hand(self, monkeypatch):
        """For |w|²/2 the gradient is w: along it the loss is (1 − s)²|w|²/2, and the gradient moves by s|w|."""

        class Quadratic(nn.Module):
            replicas = 1

            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

        monkeypatch.setattr(loss_landscape, "losses", lambda stack, x, y: stack.w.square().sum().view(1) / 2)
        seen = loss_landscape.look_around(Quadratic(), *batch())
        longest = max(loss_landscape.REACH)
        assert seen["loss"] == pytest.approx(12.5)
        assert seen["variation"] == pytest.approx(12.5 - 12.5 * (1 - longest) ** 2, rel=1e-5)
        assert seen["change"] == pytest.approx(5 * longest)
        assert seen["smoothness"] == pytest.approx(1.0)
        assert seen["variation_relative"] == pytest.approx(12.5 * (1 - (1 - loss_landscape.SPAN) ** 2), rel=1e-4)


class TestShifts:
    def test_the_cosine_is_one_when_nothing_ahead_moves(self):
        stack = small().train()
        x, y = batch()
        losses(stack, x, y).sum().backward()
        assert cosine_after_earlier_layers(stack, x, y, torch.zeros(1)).item() == pytest.approx(1.0)
        before = state(stack)
        assert cosine_after_earlier_layers(stack, x, y, torch.tensor([10.0])).item() < 0.99
        for name, value in stack.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_noise_shifts_in_training_alone_and_all_replicas_alike(self):
        noise = ShiftingNoise(generator(draw="test"), replicas=2)
        x = torch.randn(100, 50).repeat(1, 2)
        shifted = noise(x)
        assert (shifted.mean(0) - x.mean(0)).abs().mean() > 0.3
        assert torch.equal(*shifted.chunk(2, dim=1))
        assert not torch.equal(shifted, noise(x))
        assert torch.equal(noise.eval()(x), x)

    def test_every_layer_and_seed_has_noise_of_its_own(self):
        def noises(seed):
            stack = _covariate_shift_training._network("digits", "sigmoid", "noisy", seed, (1.0,), 6, 3)
            return [module for module in stack.modules() if isinstance(module, ShiftingNoise)]

        x = torch.randn(20, 100)
        seen = [noise(x) for seed in (0, 1) for noise in noises(seed)]
        assert len(seen) == 6
        assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])
        assert torch.equal(noises(0)[1](x), seen[1])


class TestGradients:
    def test_the_factor_is_that_of_the_norms_it_is_made_of(self):
        found = gradient_norms(data="digits", activation="relu", arm="bn", seed=0)
        middle = found["log10"][5:-5]
        assert 10 ** ((middle[0] - middle[-1]) / (len(middle) - 1)) == pytest.approx(found["factor"], rel=1e-3)

    def test_with_batch_norm_and_relu_it_is_near_the_theory(self):
        found = [gradient_norms(data="digits", activation="relu", arm="bn", seed=seed)["factor"] for seed in range(3)]
        assert sum(found) / 3 == pytest.approx(THEORY, rel=0.03)
        assert pytest.approx(1.2112, abs=1e-4) == THEORY


class TestWeightDecay:
    def test_doubled_weights_change_nothing_ahead_of_batch_norm_and_much_without(self):
        x, _ = batch()
        assert weight_decay.change_when_doubled(small(), x) < 1e-4
        without = small(NONE)
        before = state(without)
        assert weight_decay.change_when_doubled(without, x) > 1.0
        for name, value in without.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_the_matched_arm_has_the_effective_rate_of_the_one_with_decay(self):
        decay, matched = (
            weight_decay.train_at_one_setting(data="digits", arm=arm, seed=0, steps=60)["effective"]
            for arm in ("bn decay", "bn rate")
        )
        assert matched == pytest.approx(decay, rel=1e-3)
        plain = weight_decay.train_at_one_setting(data="digits", arm="bn", seed=0, steps=60)["effective"]
        assert plain[-1] < decay[-1]


class TestCost:
    @pytest.mark.parametrize("size", SIZES)
    def test_the_networks_compute_the_same(self, size):
        kind, widths, _ = SIZES[size]
        made = networks(kind, tuple(min(width, 16) for width in widths))
        x = torch.randn(8, 1, 8, 8)
        torch.testing.assert_close(made["torch"](x), made["keelnorm"](x), rtol=1e-4, atol=1e-5)
        assert not [m for m in made["none"].modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def test_saved_bytes_are_those_of_what_autograd_keeps(self):
        x = torch.randn(10, 4)
        linear = nn.Linear(4, 3)
        assert saved_bytes(linear, x) == 0  # the input and the weight are not counted
        assert saved_bytes(nn.Sequential(linear, nn.ReLU()), x) == 10 * 3 * 4
        assert saved_bytes(nn.Sequential(linear, nn.Tanh(), nn.Linear(3, 3)), x) == 10 * 3 * 4  # shared: counted once
        norm = nn.BatchNorm1d(4)
        before = state(norm)
        assert saved_bytes(norm, x) > 0
        for name, value in norm.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_a_build_has_the_layers_it_is_asked_for(self):
        kinds = [type(module) for module in build("cnn", (4, 4), normalized=True)]
        assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == kinds.count(nn.Conv2d) == 2


class TestInference:
    def test_a_sample_alone_equals_that_sample_in_a_batch_only_in_evaluation(self):
        model = inference.network(kn.BatchNorm1d, 6, 3)
        x = torch.randn(60, 6)
        model(x)
        assert inference.alone(model.eval(), x) < 1e-5

    def test_recalibrating_gives_the_moments_of_all_batches_and_leaves_the_model(self):
        model = inference.network(nn.BatchNorm1d, 6, 3).eval()
        before = state(model)
        x = torch.randn(120, 6) * 2 + 1
        found = inference.recalibrated(model, x.split(60))
        expected = model[1](x)
        torch.testing.assert_close(found[2].running_mean, expected.mean(0), rtol=1e-4, atol=1e-5)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


def test_settings_stay_in_their_ranges_and_are_the_seeds_own():
    first, again, other = settings(0, 64), settings(0, 64), settings(1, 64)
    assert first == again != other
    assert RATES[0] <= min(first["rates"]) < max(first["rates"]) <= RATES[1]
    assert SCALES[0] <= min(first["scales"]) < max(first["scales"]) <= SCALES[1]
    assert 0 <= min(first["momenta"]) < max(first["momenta"]) <= 1 - LEAST_MOMENTUM_LEFT
    # Log-uniform: half of the rates below the middle power of ten.
    middle = math.sqrt(RATES[0] * RATES[1])
    assert sum(rate < middle for rate in first["rates"]) == pytest.approx(32, abs=3)


def test_standardized_columns_have_mean_zero_and_deviation_one_on_the_training_part():
    split = scales.standardized(table("wine", 0))
    torch.testing.assert_close(split.train_x.mean(0), torch.zeros(13), atol=1e-4, rtol=0)
    torch.testing.assert_close(split.train_x.std(0, correction=0), torch.ones(13))


def test_every_place_is_another_network():
    x, _ = batch()
    outputs = [small(place=place).train()(x) for place in placement.PLACES]
    assert len({tuple(each.flatten().tolist()) for each in outputs}) == 3
