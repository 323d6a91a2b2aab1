"""Published architectures: healthy ones are left alone, and a fault is found at its layer and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES

#: Small and quick ones, of every family: plain, residual, dense, separable, with attention, 2-D and 3-D.
QUICK = (
    "ResNet-18", "PreResNet-18", "MobileNet", "MobileNetV2", "MnasNet-B1", "ShuffleNetV2", "DLA-34", "VoVNet-27 slim",
    "EfficientNet-B0", "U-Net", "U-Net, 3-D, residual", "DynUNet", "V-Net, 3-D",
)  # fmt: skip
#: Published networks that have a fault: a dropout of 0.5 in front of batch norms.
KNOWN = {"V-Net, 3-D": {"KN112"}}
BY_DESIGN = {"KN101", "KN102", "KN108", "KN112", "KN113"}

names = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(autouse=True)
def _installed(request):
    name = request.getfixturevalue("name")
    if not ARCHITECTURES[name].is_installed:
        pytest.skip(f"the package {ARCHITECTURES[name].package} is not installed")


def built(name, *, trained):
    """As it comes from its package, or as after some training and without dropout."""
    one = ARCHITECTURES[name]
    if trained:
        return one.build(any_size=True)
    torch.manual_seed(0)
    model = one.make()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.AvgPool2d) and module.kernel_size in (7, 8, 10):
            model.set_submodule(path, nn.AdaptiveAvgPool2d(1))
    return model


def diagnosed(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    return kn.diagnose(model, optimizer=optimizer, select="KN1", **options)


def check_healthy(name, model, known):
    """Nothing but what is by design is found: in training without a run, in evaluation with one."""
    one = ARCHITECTURES[name]
    for training, example in ((True, None), (False, one.batch(1, size=one.small_size))):
        diagnosis = diagnosed(model.train(training), example=example)
        assert {found.rule for found in diagnosis.at_least("warning")} == (known if example is not None else set())
        assert {found.rule for found in diagnosis.findings} <= BY_DESIGN
        assert len(diagnosis.layers) == sum(
            isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()
        )
    assert diagnosis.skipped == {"KN115": "needs batches="}


@names
def test_a_network_as_it_comes_is_left_alone(name):
    check_healthy(name, built(name, trained=False), KNOWN.get(name, set()))


def _nan(layer, model):
    layer.running_mean[0] = float("nan")


def _frozen_alone(layer, model):
    layer.requires_grad_(False)


#: What is done to one layer of a network in training, and the rule that finds it.
FAULTS = {
    "momentum of 0.99": ("KN103", lambda layer, model: setattr(layer, "momentum", 0.99)),
    "eps of 10": ("KN104", lambda layer, model: setattr(layer, "eps", 10.0)),
    "no statistics": ("KN105", lambda layer, model: setattr(layer, "track_running_stats", False)),
    "half frozen": ("KN106", _frozen_alone),
    "in evaluation": ("KN107", lambda layer, model: layer.eval()),
    "NaN in the mean": ("KN109", _nan),
    "zero variance": ("KN109", lambda layer, model: layer.running_var.zero_()),
    "γ of 0": ("KN111", lambda layer, model: nn.init.zeros_(layer.weight)),
    "γ is infinite": ("KN117", lambda layer, model: nn.init.constant_(layer.weight, float("inf"))),
}


@names
def test_a_trained_network_is_left_alone_and_a_fault_in_it_found_at_its_layer(name):
    model = built(name, trained=True)
    check_healthy(name, model, set())
    model.train()
    paths = kn.diagnose(model).layers
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = {(one.rule, one.severity, one.layers) for one in kn.diagnose(model).findings}
    generator = torch.Generator().manual_seed(QUICK.index(name))
    for fault in list(FAULTS)[QUICK.index(name) % 3 :: 3]:  # each fault in four networks or more
        rule, spoil = FAULTS[fault]
        path = paths[int(torch.randint(len(paths), (1,), generator=generator))]
        layer = model.get_submodule(path)
        kept = dict(vars(layer))
        spoil(layer, model)
        diagnosis = kn.diagnose(model)
        new = {(one.rule, one.severity, one.layers) for one in diagnosis.findings} - before
        assert {(one, layers) for one, _, layers in new} == {(rule, (path,))}, f"{fault} at {path}"
        assert all(severity != "info" for _, severity, _ in new), f"{fault} at {path}"
        layer.requires_grad_()
        vars(layer).update(kept)
        model.load_state_dict(state)
