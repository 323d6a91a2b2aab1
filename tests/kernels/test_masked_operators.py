"""forward_ and backward with a mask, of every kernel, dtype and layout, against the values that count alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import keelnorm as kn

SHAPES = [(5, 19), (4, 5, 33), (3, 67, 7, 7), (2, 4, 130, 131), (3, 18, 2, 3, 3), (64, 3, 2)]
UNITS = {torch.float32: 64, torch.float64: 256, torch.bfloat16: 8, torch.float16: 8}


@pytest.mark.parametrize("dtype", UNITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_values_that_count(kernel, shape, channels_last, activation, dtype):
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7
    mask.view(-1)[-2:] = True
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    layer = kn.BatchNorm(shape[1], track_running_stats=False, dtype=parameters)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.bias)

    rows = x.double().movedim(1, -1)[mask].requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    y = F.batch_norm(rows, None, None, weight, bias, True, 0.0, layer.eps)
    # No gradient where rounding decides on ReLU's gate.
    quiet = dy.movedim(1, -1)  # a view
    quiet[mask] = quiet[mask] * (y.detach().abs() > 1e-3).to(dtype)
    y = {None: lambda v: v, "relu": F.relu, "gelu": F.gelu}[activation](y)
    expected = y, *torch.autograd.grad(y, (rows, weight, bias), dy.double().movedim(1, -1)[mask])

    holes = ~mask.unsqueeze(1)
    x = torch.where(holes, torch.nan, x).to(dtype).requires_grad_()
    y = layer(x, activation=activation, mask=mask)
    dx, dweight, dbias = torch.autograd.grad(
        y, (x, layer.weight, layer.bias), torch.where(holes, torch.nan, dy).to(dtype)
    )
    assert (y.masked_select(holes) == 0).all()
    assert (dx.masked_select(holes) == 0).all()
    found = y.movedim(1, -1)[mask], dx.movedim(1, -1)[mask], dweight, dbias
    near = x.detach().abs().nan_to_num().amax().item()
    for value, wanted in zip(found, expected, strict=True):  # y, dx, dweight, dbias
        scale = max(1.0, wanted.abs().amax().item(), near)
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=UNITS[dtype] * torch.finfo(dtype).eps * scale)
