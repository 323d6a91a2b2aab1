"""Ranks together give what one process with the whole batch gives, by the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import FOUR, TWO, C, Case, one_process
from processes import Scenarios
from torch import Tensor

import keelnorm as kn

#: Largest difference, in the whole result's largest value.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
RANKS = {2: "two", 4: "four"}


def assert_near(value: Tensor, right: Tensor, tolerance: float, what: str) -> None:
    assert value.shape == right.shape, what
    assert value.numel() > 0, what
    assert torch.isfinite(value).all(), what
    error = (value.double() - right).abs().max() / right.abs().max()
    assert error <= tolerance, f"{what}: {error:.3g} > {tolerance:g}"


def assert_equals_one_process(case: Case, parts: list[dict[str, Any]], *, running: bool = True) -> None:
    right, tolerance = one_process(case), TOLERANCES[case.dtype]
    if case.offset > 100:
        tolerance *= 2  # the rounding of x's center enters the shift
    for rank, part in enumerate(parts):
        start, stop = case.bounds(rank)
        for name in ("y", "dx", "dresidual"):
            if name in right:
                assert part[name].dtype == case.dtype
                if stop > start:
                    assert_near(part[name], right[name][start:stop], tolerance, f"{name} of rank {rank}")
    for name in ("y", "dx"):
        assert_near(torch.cat([part[name] for part in parts]), right[name], tolerance, name)
    for name in ("dweight", "dbias"):
        if name in right:
            # the parameters' gradients are the rank's own sums, in float32 at least
            narrow = max(tolerance, 1e-6) if case.dtype != torch.float64 else tolerance
            total = sum(part[name].double() for part in parts)
            assert_near(total, right[name], narrow, name)
    if not running:
        return
    momentum = 1.0 if case.momentum is None else case.momentum
    narrow = 1e-6 if case.dtype != torch.float64 else tolerance
    for part in parts:
        assert_near(part["running_mean"], momentum * right["mean"], narrow, "running_mean")
        new_var = 1 - momentum + momentum * right["var_unbiased"]
        assert_near(part["running_var"], new_var, narrow, "running_var")
        assert part["num_batches_tracked"] == 1
        for name in ("running_mean", "running_var"):
            assert torch.equal(part[name], parts[0][name])


@pytest.mark.parametrize("case", [*TWO, *FOUR], ids=lambda case: case.name)
def test_ranks_equal_one_process(case: Case, ranks: Scenarios) -> None:
    parts = [found[case.name] for found in ranks(RANKS[len(case.shares)])]
    assert_equals_one_process(case, parts)
    assert all(part["kept"] for part in parts), "channels-last was lost"


@pytest.mark.parametrize("case", [case for case in TWO if case.masks], ids=lambda case: case.name)
def test_what_is_masked_is_zero_and_has_no_gradient(case: Case, ranks: Scenarios) -> None:
    mask = case.whole()["mask"]
    for rank, found in enumerate(ranks("two")):
        out = ~mask[slice(*case.bounds(rank))].unsqueeze(1).expand_as(found[case.name]["y"])
        assert out.any() or not case.masks[rank]
        for name in ("y", "dx", "dresidual"):
            if found[case.name].get(name) is not None:
                assert (found[case.name][name][out] == 0).all()


def test_the_forced_kernels_ran(ranks: Scenarios) -> None:
    for found in ranks("two"):
        for case in TWO:
            if case.kernels == "reference":
                assert found[case.name]["ran"] == {"reference"}
            elif found[case.name]["y"].numel() and kn.kernels.active() != "reference":
                assert found[case.name]["ran"], case.name
                assert "reference" not in found[case.name]["ran"], case.name


def test_a_process_group_normalizes_by_itself(ranks: Scenarios) -> None:
    found = ranks("subgroups")
    for group in (0, 1):
        parts = [found[rank]["step"] for rank in range(4) if rank % 2 == group]
        assert_equals_one_process(Case(f"subgroup {group}", (5, 11)), parts, running=False)
    for rank, part in enumerate(found):
        assert part["groups"]
        kind, words = part["stranger"]
        assert kind == "ValueError"
        assert words.startswith(f"SyncBatchNorm: rank {rank} is not in the process_group")


def test_data_parallel_with_two_forwards_before_one_backward(ranks: Scenarios) -> None:
    from rank_models import Network, network_batch

    model = Network()
    parameters = dict(model.named_parameters())
    running = {"bn": [torch.zeros(C).double(), torch.ones(C).double()]}
    running["bn2"] = [t.clone() for t in running["bn"]]

    def batch_norm(x: Tensor, name: str) -> Tensor:
        (mean, var), weight, bias = running[name], parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return F.batch_norm(x, mean, var, weight, bias, training=True)

    def forward(x: Tensor) -> Tensor:
        x = torch.relu(batch_norm(F.linear(x, parameters["inner.weight"], parameters["inner.bias"]), "bn"))
        return F.linear(batch_norm(torch.tanh(x), "bn2"), parameters["head.weight"], parameters["head.bias"])

    first, second = network_batch()
    (forward(first).square().sum() + forward(second).sin().sum()).backward()
    for found in ranks("parallel"):
        for name, parameter in parameters.items():
            # a bias in front of a batch norm has the gradient 0, up to rounding
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-11, atol=1e-12)
        for name, (mean, var) in running.items():
            torch.testing.assert_close(found[f"{name}.running_mean"], mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found[f"{name}.running_var"], var, rtol=1e-12, atol=1e-14)
            assert found[f"{name}.num_batches_tracked"] == 2


def test_a_checkpoint_counts_its_batch_once(ranks: Scenarios) -> None:
    for found in ranks("many"):
        assert torch.equal(found["checkpoint"]["dx"], found["checkpoint"]["plain"])
        assert found["checkpoint"]["batches"] == 1
        assert found["checkpoint"]["same"]


def test_evaluation_exchanges_nothing(ranks: Scenarios) -> None:
    assert all(found["evaluation"] for found in ranks("many"))


def test_what_has_no_derivative_says_so(ranks: Scenarios) -> None:
    for found in ranks("many"):
        kind, words = found["second derivative"]
        assert kind == "RuntimeError"
        assert "no second derivative through synchronized ranks" in words
        kind, words = found["transform"]
        assert kind == "RuntimeError"
        assert "torch.func" in words


def test_one_value_over_all_ranks_is_an_error_and_one_on_each_is_not(ranks: Scenarios) -> None:
    for rank, found in enumerate(ranks("many")):
        kind, words = found["one value"]
        assert kind == "ValueError"
        assert "counted over all ranks" in words
        batches, mean = found["nothing changed"]
        assert batches == 0
        assert (mean == 0).all()
        y, running_var = found["one value each"]  # 1 and 3, 2 and 6: deviations of 1 and 2
        torch.testing.assert_close(y, torch.full((1, 2), 2.0 * rank - 1), rtol=1e-4, atol=0)
        torch.testing.assert_close(running_var, torch.tensor([0.9 + 0.1 * 2, 0.9 + 0.1 * 8]))


def test_one_value_over_all_ranks_where_it_is_no_error(ranks: Scenarios) -> None:
    """Normalized by the running statistics (mean 1, variance 4), as constants; or the bias. Neither counts."""
    rstd = (4 + 1e-5) ** -0.5
    for policy, y, dx in (("running", 6 * rstd * 3 + 5, rstd * 3), ("skip", 5, 0)):
        for rank, found in enumerate(each[f"too few, {policy}"] for each in ranks("many")):
            expected = torch.full((1 - rank, 2), 1.0, dtype=torch.float64)
            torch.testing.assert_close(found["y"], expected * y)
            torch.testing.assert_close(found["dx"], expected * dx)
            assert found["moments"].tolist() == [[1, 1], [4, 4]]


def test_no_values_at_all_change_nothing(ranks: Scenarios) -> None:
    for found in ranks("many"):
        y, batches, mean = found["all masked"]
        assert (y == 0).all()
        assert batches == 0
        assert (mean == 0).all()
        shape, batches, var = found["all empty"]
        assert shape == (0, 2)
        assert batches == 0
        assert (var == 1).all()


def test_an_infinity_on_one_rank_leaves_the_other_channels_updated(ranks: Scenarios) -> None:
    for found in ranks("many"):
        torch.testing.assert_close(found["poisoned"], torch.tensor([0.2, 0.0]))


def test_without_running_statistics_training_synchronizes(ranks: Scenarios) -> None:
    x = Case("odds and ends", (5, 11)).whole()["x"]
    right = F.batch_norm(x, None, None, training=True)
    assert_near(torch.cat([found["untracked"] for found in ranks("many")]), right, 1e-12, "y")


def test_without_a_gradient_for_x_the_backward_exchanges_nothing(ranks: Scenarios) -> None:
    case = Case("odds and ends", (5, 11))
    found = ranks("many")
    x, dy = case.whole()["x"], case.whole()["dy"]
    xhat = F.batch_norm(x, None, None, training=True)
    assert_near(found[0]["dweight alone"], (xhat * dy)[:5].sum((0, 2, 3)), 1e-12, "dweight")
    assert found[1]["dweight alone"] is None


def test_without_autograd(ranks: Scenarios) -> None:
    case = Case("odds and ends", (5, 11))
    y = torch.cat([found["without autograd"] for found in ranks("many")])
    assert_near(y, one_process(case)["y"], 1e-12, "y")


def test_compiled_code_breaks_the_graph_and_says_why(ranks: Scenarios) -> None:
    case = Case("compiled", (5, 11))
    found = ranks("compiled")
    assert_equals_one_process(case, [part["step"] for part in found], running=False)
    for part in found:
        assert part["graphs"] == 2  # in front of the layer, and behind it
        assert part["batches"] == 1
        kind, words = part["refused"]
        assert kind == "Unsupported"
        assert "talks to other ranks" in words


def test_a_rank_that_dies_is_an_error_on_the_others(ranks: Scenarios) -> None:
    survivor, dead = ranks("dying")
    assert dead is None
    backward, forward, seconds = survivor
    assert backward[0] == forward[0] == "RuntimeError"
    assert backward[1].startswith("SyncBatchNorm: rank 0 could not exchange with its process group, ranks [0, 1]")
    assert forward[1].startswith("SyncBatchNorm '0': rank 0 could not exchange")
    assert seconds < 5 + 2


def test_a_rank_that_does_not_come_is_an_error_within_the_timeout(ranks: Scenarios) -> None:
    ((kind, words), seconds), _ = ranks("silent")
    assert kind == "RuntimeError"
    assert words.startswith("SyncBatchNorm '0': rank 0 could not exchange")
    assert seconds < 1 + 1.5
