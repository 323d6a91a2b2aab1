"""``kn.functional.moments`` with a mask, on every kernel: the same moments as those of the values that count."""

import pytest
import torch
from support.batches import full_mask
from support.cases import DENSE, laid_out

import keelnorm as kn

SHAPE = (6, 5, 4, 3)
#: Those that are the same for all channels.
MASKS = {"samples": (6,), "positions": (6, 4, 3), "with a channel": (6, 1, 4, 3), "one sample's": (1, 1, 4, 3),
         "rows": (1, 1, 4, 1), "one": (1, 1, 1, 1)}  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(x, mask):
    found = kn.functional.moments(x, mask)
    counts = full_mask(mask, x.shape)
    assert found.count.shape == found.mean.shape == found.m2.shape == (x.shape[1],)
    for c in range(x.shape[1]):
        values = x[:, c].double()[counts[:, c]]
        assert found.count[c].item() == len(values)
        mean = values.mean() if len(values) else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(found.mean[c], mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.m2[c], (values - mean).square().sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*DENSE, "sliced"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_for_all_channels(kernel, mask, layout, dtype):
    mask = torch.rand(mask) < 0.6
    mask.view(-1)[0] = True
    x = torch.where(full_mask(mask, SHAPE), 2 + torch.randn(SHAPE), torch.nan)
    check(laid_out(x.to(dtype), layout), mask)


@pytest.mark.parametrize("kernel", ["reference"], indirect=True)
def test_masks_of_single_channels(kernel):
    mask = torch.rand(SHAPE) < 0.6
    check(torch.where(mask, torch.randn(SHAPE), torch.nan), mask)


@pytest.mark.parametrize("native", [True, False])
def test_a_mask_that_lets_nothing_count(native):
    with kn.kernels.use("auto" if native else "reference"):
        check(torch.full(SHAPE, torch.nan), torch.zeros(6, dtype=torch.bool))


def test_merging_masked_parts_gives_the_whole(kernel):
    x, mask = torch.randn(SHAPE), torch.rand(6, 4, 3) < 0.5
    mask[0, 0, 0] = mask[3, 0, 0] = True
    whole = kn.functional.moments(x, mask)
    merged = kn.functional.moments(x[:3], mask[:3]).merge(kn.functional.moments(x[3:], mask[3:]))
    assert torch.equal(merged.count, whole.count)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-6, atol=1e-6)
