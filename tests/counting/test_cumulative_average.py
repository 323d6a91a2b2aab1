"""momentum=None: the running statistics are the average over the batches that were taken, channel by channel."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.control.accumulation import enter
from keelnorm.moments import Moments

C, BAD = 3, 1
WAYS = ["native", "reference", "compiled", "compiled reference", "inplace", "masked"]


def batches(samples=6):
    """Five batches; channel BAD of the second and the fourth is not finite."""
    found = [torch.randn(samples, C) * 2 + k for k in range(5)]
    found[1][0, BAD], found[3][2, BAD] = torch.nan, torch.inf
    return found


def average(given):
    """Mean and unbiased variance over the batches in which each is finite."""
    means, variances = (torch.stack([f(x.double()) for x in given]) for f in (lambda x: x.mean(0), lambda x: x.var(0)))
    finite = means.isfinite() & variances.isfinite()
    return [torch.where(finite, each, 0).sum(0) / finite.sum(0) for each in (means, variances)]


def assert_average(layer, given):
    for running, expected in zip((layer.running_mean, layer.running_var), average(given), strict=True):
        torch.testing.assert_close(running.flatten().double(), expected, rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == len(given)
    assert layer.skipped_updates.flatten().tolist() == [0, 2, 0]


def run(layer, given, way):
    torch._dynamo.reset()
    with kn.kernels.use("reference" if "reference" in way else "auto"):
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if "compiled" in way else layer
        for x in given:
            if way == "masked":
                wider, mask = torch.cat([x, torch.full((1, C), 7.0)]), torch.tensor([True] * len(x) + [False])
                call(wider, mask=mask)
            elif way == "inplace":
                call(x.clone(), inplace=True)
            else:
                call(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_that_was_left_out_does_not_weigh(way):
    layer, given = kn.BatchNorm1d(C, momentum=None), batches()
    run(layer, given, way)
    assert_average(layer, given)


def test_the_rows_that_were_reported():
    layer = kn.BatchNorm1d(1, momentum=None)
    layer(torch.full((2, 1), torch.nan))
    layer(torch.tensor([[9.0], [11.0]]))
    assert layer.running_mean.item() == 10.0


class OnePart(kn.SplitBatchNorm):
    def forward(self, x):  # type: ignore[override]
        with self.use_split(0):
            return super().forward(x)


class OneDomain(kn.DomainBatchNorm):
    def forward(self, x):  # type: ignore[override]
        return super().forward(x, domain=0)


VARIANTS = {
    "sync": lambda: kn.SyncBatchNorm(C, momentum=None),
    "split": lambda: OnePart(C, momentum=None),
    "ghost": lambda: kn.GhostBatchNorm(C, 3, momentum=None),
    "domain": lambda: OneDomain(C, 1, momentum=None),
}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_variants(kind, kernels):
    layer, given = VARIANTS[kind](), batches()
    with kn.kernels.use(kernels):
        for x in given:
            layer(x)
    assert_average(layer, given)


def test_ghost_batches_one_after_the_other():
    layer, given = kn.GhostBatchNorm(C, 3, momentum=None, update="sequential"), batches()
    for x in given:
        layer(x)
    parts = [part for x in given for part in x.split(3)]
    for running, expected in zip((layer.running_mean, layer.running_var), average(parts), strict=True):
        torch.testing.assert_close(running.double(), expected, rtol=1e-5, atol=1e-5)


def test_covariances_of_groups():
    layer, given = kn.WhiteningBatchNorm(4, momentum=None, group_size=2), [torch.randn(20, 4) + k for k in range(4)]
    given[1][0, 0] = torch.nan
    for x in given:
        layer(x)
    taken = torch.stack([x.double().T.cov() for x in given])
    clean = taken[[0, 2, 3]].mean(0)[:2, :2], taken.mean(0)[2:, 2:]
    torch.testing.assert_close(layer.running_cov.double(), torch.stack(clean), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var[0].double(), clean[0][0, 0], rtol=1e-5, atol=0)


def test_steps_of_a_recurrent_layer():
    layer = kn.nn.StepwiseBatchNorm(C, max_length=2, momentum=None)
    given = batches()
    for x in given:
        layer(x, step=1)
    expected = average(given)
    for running, value in zip((layer.running_mean, layer.running_var), expected, strict=True):
        torch.testing.assert_close(running[1].double(), value, rtol=1e-5, atol=1e-5)
    assert layer.skipped_updates.tolist() == [[0] * C, [0, 2, 0]]


@pytest.mark.parametrize("layer_type", [nn.BatchNorm1d, kn.BatchNorm1d])
def test_accumulated_batches(layer_type):
    layer, given = layer_type(C, momentum=None), batches()
    for x in given:
        with kn.accumulate_statistics(layer):
            layer(x)
    for running, expected in zip((layer.running_mean, layer.running_var), average(given), strict=True):
        torch.testing.assert_close(running.double(), expected, rtol=1e-5, atol=1e-5)


def test_channels_of_few_values():
    """A channel with a single value has no variance: the batch does not weigh there either."""
    layer = kn.BatchNorm1d(2, momentum=None)
    for count in ([1.0, 4.0], [4.0, 4.0]):
        enter(layer, Moments(torch.tensor(count), torch.tensor([3.0, 5.0]), torch.tensor([0.0, 6.0])), None)
    assert layer.running_mean.tolist() == [3.0, 5.0]
    assert layer.running_var.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("how", ["zeroed", "loaded", "averaged"])
def test_a_number_of_batches_that_someone_set_counts_itself(how, kernels):
    layer, x = kn.BatchNorm1d(1, momentum=None), torch.tensor([[9.0], [11.0]])
    with kn.kernels.use(kernels):
        for batch in (x * torch.nan, x * torch.nan, x):
            layer(batch)
        if how == "zeroed":  # as recipes for precise statistics do
            layer.num_batches_tracked.zero_()
        elif how == "loaded":
            layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": torch.tensor(7)})
        else:
            layer.num_batches_tracked.copy_(torch.tensor(9))
        start = int(layer.num_batches_tracked)
        layer(2 * x)
    weight = 1 / (start + 1)
    assert layer.running_mean.item() == pytest.approx((1 - weight) * 10 + weight * 20)
    layer(x * torch.nan)
    layer(2 * x)
    new = 1 / (start + 2)
    expected = (1 - new) * ((1 - weight) * 10 + weight * 20) + new * 20
    assert layer.running_mean.item() == pytest.approx(expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "continued"])
def test_copies_go_on_with_the_same_average(way):
    layer, given = kn.BatchNorm1d(C, momentum=None), batches()
    run(layer, given[:3], "native")
    if way == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif way == "deepcopy":
        layer = copy.deepcopy(layer)
    run(layer, given[3:], "native")
    assert_average(layer, given)


def test_a_step_that_is_rolled_back_leaves_the_average_too():
    class Scaler:
        scale = 2.0

        def get_scale(self):
            return self.scale

    layer, given, scaler = kn.BatchNorm1d(C, momentum=None), batches(), Scaler()
    for k, x in enumerate(given):
        layer(x)
        if k == 2:
            with kn.follow_scaler(layer, scaler):
                layer(torch.full((4, C), 100.0))
                scaler.scale /= 2
    assert layer.skipped_updates.tolist() == [1, 3, 1]
    layer.skipped_updates -= 1
    assert_average(layer, given)
