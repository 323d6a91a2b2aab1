"""What tests of accumulating share: layers, batches, and the running statistics by the definition."""

import pytest
import torch
from control.models import KINDS, Block

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
