"""Running statistics equal one float64 pass of plain torch over all data."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn


def a_net(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2),
    ).to(dtype)  # fmt: skip


def uneven(data, sizes=(7, 1, 12, 3)):
    return list(data.split([*sizes, len(data) - sum(sizes)]))


def moments(x):
    rows = x.movedim(1, -1).flatten(0, -2)
    return rows.mean(0), rows.var(0)


def inputs_in_evaluation(model, data):
    """The inputs of all batch norms in one pass of the network in evaluation."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: found.__setitem__(path, args[0]))
        for path, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]  # fmt: skip
    with torch.no_grad():
        model.eval()(data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["torch", "converted"])
def test_sequential_is_exact(kind):
    """Each layer's running statistics are those of its own inputs, when the whole network is in evaluation."""
    data = torch.randn(40, 3, 9, 9, dtype=torch.float64) * 2 + 1
    model = a_net()
    if kind == "converted":
        model, _ = kn.convert(model)
    model, report = kn.recalibrate(model.train(), uneven(data), sequential=True)
    assert model.training
    for path, x in inputs_in_evaluation(model, data).items():
        mean, var = moments(x)
        layer = model.get_submodule(path)
        torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)
        assert layer.num_batches_tracked == 5
    assert [row["values"] for row in report.rows] == [40 * 49, 40 * 25, 40]


def test_one_pass_normalizes_with_the_batch():
    """Computed by hand: batch norms in training, all else in evaluation, the moments of all batches pooled."""
    data = torch.randn(40, 3, 9, 9, dtype=torch.float64)
    batches = [data[:8], data[8:30], data[30:]]
    plain = a_net()
    model, _ = kn.recalibrate(copy.deepcopy(plain), batches)
    plain.eval()
    values: dict[int, list[torch.Tensor]] = {1: [], 5: [], 10: []}
    with torch.no_grad():
        for batch in batches:
            x = batch
            for i, module in enumerate(plain):
                if i in values:
                    values[i].append(x)
                    x = F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)
                else:
                    x = module(x)
    for i, parts in values.items():
        mean, var = moments(torch.cat(parts))
        torch.testing.assert_close(model[i].running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model[i].running_var, var, rtol=1e-12, atol=1e-12)
    first, _ = kn.recalibrate(copy.deepcopy(plain), batches, sequential=True)
    torch.testing.assert_close(model[1].running_mean, first[1].running_mean, rtol=1e-12, atol=1e-12)


def test_batches_of_any_kind():
    data = torch.randn(12, 3, 9, 9, dtype=torch.float64)
    wanted, _ = kn.recalibrate(a_net(), [data[:5], data[5:]])
    for batches, forward in (
        ([(data[:5], None), (data[5:], None)], None),
        ([[data[:5]], [data[5:]]], None),
        ([{"input": data[:5]}, {"input": data[5:]}], None),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=12), None),
        ([{"images": data[:5]}, {"images": data[5:]}], lambda model, batch: model(batch["images"])),
        (iter([data[:5], data[5:]]), None),
    ):
        model, _ = kn.recalibrate(a_net(), batches, forward=forward, where="1")
        torch.testing.assert_close(model[1].running_mean, wanted[1].running_mean)
        assert model[5].num_batches_tracked == 0


def test_max_batches():
    data = torch.randn(40, 3, 9, 9, dtype=torch.float64)
    model, report = kn.recalibrate(a_net(), uneven(data), max_batches=2)
    assert report.summary["batches"] == 2
    assert model[1].running_mean.allclose(kn.recalibrate(a_net(), uneven(data)[:2])[0][1].running_mean)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.unused = nn.BatchNorm1d(3), None

    def forward(self, x):
        return self.bn(x * 2 + self.bn(x))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_runs_twice(sequential):
    x = torch.randn(20, 3, dtype=torch.float64)
    model = Shared().double()
    inner = model.eval().bn(x) if sequential else F.batch_norm(x, None, None, training=True)
    mean, var = moments(torch.cat([x, x * 2 + inner]).detach())
    model, report = kn.recalibrate(model, [x], sequential=sequential)
    torch.testing.assert_close(model.bn.running_mean, mean)
    torch.testing.assert_close(model.bn.running_var, var)
    assert report.rows[0]["values"] == 40
    assert bool(report.notes) == sequential


def test_masks():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = kn.BatchNorm(3, dtype=torch.float64)

        def forward(self, x, mask):
            return self.bn(x, mask=mask)

    x, mask = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 5) < 0.6
    rows = x.movedim(1, -1)[mask]
    x = x.masked_fill(~mask[:, None], torch.nan)
    model, _ = kn.recalibrate(Masked(), [{"x": x[:2], "mask": mask[:2]}, {"x": x[2:], "mask": mask[2:]}])
    torch.testing.assert_close(model.bn.running_mean, rows.mean(0))
    torch.testing.assert_close(model.bn.running_var, rows.var(0))


def test_what_is_left():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), kn.BatchNorm1d(3), kn.RangeBatchNorm(3),
        kn.BatchNorm1d(3),
    )  # fmt: skip
    kn.freeze(model[2])
    before = copy.deepcopy(model.state_dict())
    model, report = kn.recalibrate(model, [torch.randn(30, 3) + 5], where=["0", "1", "2", "3"])
    reasons = [row["reason"] for row in report.rows]
    assert reasons[0] is None
    assert reasons[1] == "has no running statistics"
    assert reasons[2] == "is frozen"
    assert "RangeBatchNorm" in reasons[3]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert report.rows[0]["mean drift"] > 4


@pytest.mark.parametrize("sequential", [False, True])
def test_an_exception_leaves_the_model_as_it_was(sequential):
    data = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    model = a_net().train()
    model[4].eval()
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == (6 if sequential else 2):
            raise KeyError("in the middle")
        return model(batch)

    with pytest.raises(KeyError, match="in the middle"):
        kn.recalibrate(model, [data[:10], data[10:]], forward=forward, sequential=sequential)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [i != 4 for i in range(12)]
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(m.track_running_stats for m in model if hasattr(m, "track_running_stats"))
    assert torch.is_grad_enabled()


def test_a_tolerance_stops_early():
    torch.manual_seed(0)
    batches = [torch.randn(64, 3) * 2 + 1 for _ in range(400)]
    _, report = kn.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), batches, tolerance=0.02)
    taken = report.summary["batches"]
    assert 20 < taken < 400  # standard errors 1/√n of the mean and √(2/n) of the variance
    assert report.rows[0]["standard error"] <= 0.02
    rows = torch.cat(batches[:taken]).double()
    weights, means = 64 / len(rows), torch.stack([b.double().mean(0) for b in batches[:taken]])
    expected = (taken / (taken - 1) * (weights * (means - rows.mean(0))).square().sum(0)).sqrt() / rows.std(0, False)
    assert report.rows[0]["standard error"] >= expected.max() * (1 - 1e-9)
    _, all_of_it = kn.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), batches[:5], tolerance=1e-9)
    assert all_of_it.summary["batches"] == 5


def test_errors():
    model, data = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(8, 3)
    before = copy.deepcopy(model.state_dict())
    for arguments, kind, words in (
        ((3, [data]), TypeError, "model must be"),
        ((model, data), TypeError, r"pass \[batch\]"),
        ((model, [3]), TypeError, "a batch must be a tensor"),
        ((model, []), ValueError, "got 0 values"),
        ((model, [torch.full((4, 3), torch.nan)]), RuntimeError, "is not finite"),
    ):
        with pytest.raises(kind, match=words):
            kn.recalibrate(*arguments)
    with pytest.raises(ValueError, match="must be able to start again"):
        kn.recalibrate(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), iter([data]), sequential=True)
    with pytest.raises(ValueError, match="tolerance must be None or a number"):
        kn.recalibrate(model, [data], tolerance=-1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_layouts(dtype):
    data = (torch.randn(30, 3, 9, 9) * 3 + 100).to(dtype).to(memory_format=torch.channels_last)
    model, _ = kn.recalibrate(nn.Sequential(nn.BatchNorm2d(3)), uneven(data))
    mean, var = moments(data.double())
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), var, rtol=1e-5, atol=0)


def test_moments_that_the_buffers_can_not_hold():
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    data = [torch.tensor([[0.0, 300.0], [1.0, -300.0]]).half()]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"too large for its buffers of torch\.float16; the model is as before"):
        kn.recalibrate(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_two_thousand_images():
    """A ResNet's statistics over 2,000 real images equal those of one float64 pass, to 1e-5."""
    sklearn = pytest.importorskip("sklearn.datasets")
    get_model = pytest.importorskip("pytorchcv.model_provider").get_model
    images = torch.tensor(sklearn.load_digits().images, dtype=torch.float32)[:, None] / 16
    images = torch.cat([images, images[:203].flip(-1)]).expand(-1, 3, -1, -1)  # 1,797 digits, some of them mirrored
    images = F.interpolate(images, size=16)
    assert len(images) == 2000
    torch.manual_seed(0)
    model = get_model("resnet20_cifar10", in_size=(16, 16))
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    model, _ = kn.recalibrate(model, list(images.split(64)), sequential=True)
    wide = copy.deepcopy(model).double()
    for path, x in inputs_in_evaluation(wide, images.double()).items():
        mean, var = moments(x)
        layer = model.get_submodule(path)
        assert ((layer.running_mean.double() - mean).abs() / var.sqrt()).max() < 1e-5, path
        assert (layer.running_var.double() / var - 1).abs().max() < 1e-5, path


def test_what_other_hooks_make_of_the_input_counts():
    """A hook in front of a layer may change its input, or give it a mask."""

    def doubled(layer, args, keywords):
        return (2 * args[0],), {"mask": torch.arange(len(args[0])) < 5}

    model = nn.Sequential(kn.BatchNorm1d(3))
    model[0].register_forward_pre_hook(doubled, with_kwargs=True)
    x = torch.randn(8, 3)
    kn.recalibrate(model, [x])
    torch.testing.assert_close(model[0].running_mean, 2 * x[:5].mean(0))
