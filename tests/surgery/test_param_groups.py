"""Which parameters get weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import keelnorm as kn


def names(model, **options):
    """The paths with weight decay, and those without."""
    groups = kn.param_groups(model, 0.1, **options)
    found = {group["weight_decay"]: group["param_names"] for group in groups}
    return found.get(0.1, []), found.get(0.0, [])


NORMS = {
    "batch": nn.BatchNorm2d(4),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "layer": nn.LayerNorm(4),
    "group": nn.GroupNorm(2, 4),
    "rms": nn.RMSNorm(4),
    "kn": kn.BatchNorm(4),
    "sync": kn.SyncBatchNorm(4),
    "renorm": kn.BatchRenorm(4),
    "whitening": kn.WhiteningBatchNorm(4),
    "domain": kn.DomainBatchNorm(4, 2),
    "someone's": type("SomeRMSNorm", (nn.Module,), {})(),
}
NORMS["someone's"].scale = nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("kind", NORMS)
def test_normalizations_have_no_decay(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NORMS[kind])
    own = [f"1.{name}" for name, _ in NORMS[kind].named_parameters()]
    assert own
    assert names(model) == (["0.weight"], ["0.bias", *own])
    assert names(model, norm=True) == (["0.weight", *own], ["0.bias"])
    assert names(model, bias=True) == (["0.weight", "0.bias"], own)
    assert names(model, norm=True, bias=True) == (["0.weight", "0.bias", *own], [])


def test_biases_by_every_name():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True)})
    decayed, free = names(model)
    assert decayed == [
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight",
    ]  # fmt: skip
    assert len(free) == 6
    decayed, free = names(kn.BatchNormLSTM(2, 3))
    assert [path for path in decayed if "norm" in path or "bias" in path] == []
    assert any("norm" in path for path in free)


def test_each_parameter_once_and_only_those_that_train():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model.append(model[1])
    model[3].weight.requires_grad_(False)
    assert names(model) == (["0.weight"], ["0.bias", "1.weight", "1.bias", "2.bias", "3.bias"])
    groups = kn.param_groups(model, 0.1)
    trained = [p for group in groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trained) == 6


def test_empty_groups_are_left_out():
    assert [g["weight_decay"] for g in kn.param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in kn.param_groups(nn.BatchNorm1d(2), 0.1)] == [0.0]
    assert kn.param_groups(nn.ReLU(), 0.1) == []


def test_parametrized_ones_are_what_they_compute():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    parametrize.register_parametrization(model[0], "bias", nn.Softplus())
    decayed, free = names(model)
    assert decayed == ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    assert sorted(free) == ["0.parametrizations.bias.original", "1.bias", "1.parametrizations.weight.original"]
    assert names(model[1])[0] == []


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_optimizers_take_them_and_keep_the_names(optimizer):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    made = optimizer(kn.param_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["0.weight"]
    assert made.state_dict()["param_groups"][1]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    made.load_state_dict(made.state_dict())


def test_wrapped_models(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        assert names(model) == (["module.0.weight"], ["module.0.bias", "module.1.weight", "module.1.bias"])
    finally:
        torch.distributed.destroy_process_group()


def test_errors():
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        kn.param_groups(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), 0.1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        kn.param_groups([nn.Linear(2, 2)], 0.1)
    for wrong in (-1, float("nan"), float("inf"), "much", None, True):
        with pytest.raises(ValueError, match="weight_decay must be a finite number of at least 0"):
            kn.param_groups(nn.Linear(2, 2), wrong)
