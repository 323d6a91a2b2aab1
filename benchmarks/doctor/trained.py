"""Published networks, trained a little on the pictures of CIFAR-10."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES
from benchmarks.doctor.fault import Batch, Patient
from keelnorm.lab.data.pictures import read_pictures

#: Small networks of every family, which train on two cores in a minute.
NETWORKS = (
    "ResNet-18", "PreResNet-18", "MobileNet", "MobileNetV2", "MnasNet-B1", "ShuffleNetV2", "VoVNet-27 slim",
    "EfficientNet-B0", "GhostNet", "DLA-34", "SE-ResNet-50",
)  # fmt: skip
SIZE, BATCH = (64, 64), 32
#: The largest learning rate of a cosine that ends at 0, so that the running statistics settle.
RATE = 0.05
#: Of all parameters but γ, β and biases.
DECAY = 5e-4


class Classifier(nn.Module):
    """A network of ten classes for pictures (N, 3, 32, 32)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = ARCHITECTURES[name].make()
            take_any_size(self.body)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        y: Tensor = self.body(F.interpolate(x, size=SIZE))[:, :10]
        return y


def take_any_size(body: nn.Module, *, is_fixed: bool = False) -> None:
    """Let a network take small pictures, unless it takes one size only, and turn its dropouts off.

    In front of batch norms, a dropout is a finding, and rightly so.
    """
    for path, module in list(body.named_modules()):
        if isinstance(module, nn.AvgPool2d) and module.kernel_size in (7, 8, 10) and not is_fixed:
            body.set_submodule(path, nn.AdaptiveAvgPool2d(1))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def pictures(folder: Path, part: str, number: int) -> Batch:
    """Pictures of CIFAR-10, in random order, equal at every call."""
    files = sorted((folder / "cifar10" / part).rglob("*.jpg"))
    chosen = files[:: max(1, len(files) // number)][:number]  # as many of each class
    x, y = read_pictures(chosen)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order].float() / 255 - 0.5) / 0.25, y[order]


def batches_of(data: Batch) -> list[Batch]:
    """Batches of 32."""
    return list(zip(data[0].split(BATCH), data[1].split(BATCH), strict=True))


def trained(name: str, data: Batch, steps: int) -> Patient:
    """A network after some steps of training."""
    x, y = data
    model = Classifier(name)
    optimizer = torch.optim.SGD(kn.param_groups(model, DECAY), lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return Patient(model, optimizer, [], nn.CrossEntropyLoss())


def copied(patient: Patient) -> Patient:
    """A patient with the same state, and nothing in common."""
    model = copy.deepcopy(patient.model)
    optimizer = torch.optim.SGD(kn.param_groups(model, DECAY), lr=RATE, momentum=0.9)
    return Patient(model.train(), optimizer, list(patient.batches), patient.loss)
