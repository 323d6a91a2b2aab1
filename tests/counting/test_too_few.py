"""One value per channel has no variance: an error that says where, or what the layer was told to do instead."""

from __future__ import annotations

import pytest
import torch

import keelnorm as kn

ONE = torch.tensor([[2.0, -1.0, 5.0]])


class Net(torch.nn.Module):
    def __init__(self, **keywords):
        super().__init__()
        self.stages = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(3, 3), kn.BatchNorm1d(3, **keywords))])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_the_error_names_the_path_the_shape_and_the_remedy():
    with pytest.raises(ValueError, match=r"BatchNorm1d 'stages\.0\.1': one value per channel") as caught:
        Net()(ONE)
    for word in ("(1, 3)", "drop_last=True", "model.eval()", "too_few='running'"):
        assert word in str(caught.value)


def test_a_layer_by_itself_has_no_path():
    with pytest.raises(ValueError, match=r"^BatchNorm1d: one value per channel"):
        kn.BatchNorm1d(3)(ONE)


def test_other_errors_name_the_path_too():
    model = Net()
    model.stages[0][0] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"^BatchNorm1d 'stages\.0\.1': x must have"):
        model(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(  # how many values a mask lets count is not looked at under torch.compile
    ("way", "masked"),
    [("native", False), ("native", True), ("reference", False), ("reference", True), ("compiled", False)],
)
@pytest.mark.parametrize("too_few", ["running", "skip"])
def test_policies(too_few, masked, way):
    layer = kn.BatchNorm1d(3, too_few=too_few)
    layer(torch.randn(16, 3) * 2 + 1)
    torch.nn.init.normal_(layer.bias)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    x, keywords = ONE.clone(), {}
    if masked:
        x, keywords = torch.cat([ONE, ONE + 1]), {"mask": torch.tensor([True, False])}
    x.requires_grad_()
    call = torch.compile(layer, backend="aot_eager") if way == "compiled" else layer
    with kn.kernels.use("reference" if way == "reference" else "auto"):
        y = call(x, **keywords)
        y[:1].sum().backward()
    if too_few == "running":
        expected = (ONE - before["running_mean"]) / (before["running_var"] + layer.eps).sqrt() + layer.bias
    else:
        expected = layer.bias.unsqueeze(0)
    torch.testing.assert_close(y[:1], expected)
    assert x.grad.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())


def test_illegal_policies():
    with pytest.raises(ValueError, match=r"BatchNorm2d: too_few must be one of .*'skip'.*got 'drop'"):
        kn.BatchNorm2d(3, too_few="drop")
    with pytest.raises(ValueError, match="too_few='running' needs running statistics"):
        kn.BatchNorm1d(3, too_few="running", track_running_stats=False)(ONE)


def test_the_policy_is_shown_and_kept():
    layer = kn.BatchNorm1d(3, too_few="skip")
    assert "too_few='skip'" in repr(layer)
    assert "too_few" not in repr(kn.BatchNorm1d(3))
