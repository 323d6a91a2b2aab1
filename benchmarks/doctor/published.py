"""Healthy published architectures on real data, new and trained a little: how often the doctor speaks, and of what."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import keelnorm as kn
from benchmarks.architectures import ARCHITECTURES, Architecture, require_packages
from benchmarks.doctor.fault import Batch, Patient
from benchmarks.doctor.scoring import diagnosed
from benchmarks.doctor.trained import DECAY, RATE, pictures, take_any_size
from keelnorm.engine.atomic_write import write_text
from keelnorm.lab.data.wav import read_wav
from keelnorm.surgery.observation.nested_tensors import main_output

#: Samples in a batch, and batches that the doctor gets.
BATCH, BATCHES = 16, 8
CLASSES = 10


class Classifier(nn.Module):
    """Ten logits of any architecture: a linear layer over the means of its output channels over positions."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = architecture.make()
        take_any_size(self.body, is_fixed=architecture.is_fixed)
        if architecture.name.startswith("VGG"):  # its linear layers take one size only
            self.body.output = nn.Sequential(nn.Unflatten(1, (512, -1)), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        y = main_output(self.body(x))
        assert y is not None
        if y.ndim == 3:  # (N, positions, features), as of transformers
            y = y.mean(1)
        logits: Tensor = self.head(y.flatten(2).mean(2) if y.ndim > 2 else y)
        return logits


def data_for(architecture: Architecture, folder: Path, part: str, number: int) -> Batch:
    """Real samples in the shape that an architecture takes, and their classes.

    Pictures of CIFAR-10; in gray where it takes one channel; as volumes whose slices grow brighter; and recordings of
    spoken digits.
    """
    if len(architecture.shape) == 1:
        return _recordings(folder, part, number, architecture.shape[0])
    x, y = pictures(folder, part, number)
    size = architecture.small_size
    if architecture.shape[0] == 1:
        x = x.mean(1, keepdim=True)
    x = F.interpolate(x, size=tuple(size[-2:]), mode="bilinear")
    if len(size) == 3:
        x = x.unsqueeze(2) * torch.linspace(0.5, 1.5, size[0]).reshape(1, 1, -1, 1, 1)
    return x.contiguous(), y


def _recordings(folder: Path, part: str, number: int, length: int) -> Batch:
    files = sorted((folder / "fsdd").rglob("*.wav"))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    order = order[:number] if part == "train" else order[-number:]
    values = [read_wav(files[index])[0].flatten().float()[:length] for index in order]
    x = torch.stack([F.pad(one / one.std().clamp(min=1e-6), (0, length - len(one))) for one in values])
    return x, torch.tensor([int(files[index].name[0]) for index in order])


def healthy(architecture: Architecture, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What the doctor says of an architecture when it is new, and after some steps, in both modes."""
    x, y = data_for(architecture, folder, "train", 50 * BATCH)
    model = Classifier(architecture)
    model.eval()(x[:2])  # gives the head its shape
    optimizer = torch.optim.SGD(kn.param_groups(model, DECAY), lr=RATE, momentum=0.9)
    held_out = data_for(architecture, folder, "test", BATCHES * BATCH)
    batches = list(zip(*(part.split(BATCH) for part in held_out), strict=True))
    patient = Patient(model, optimizer, batches, nn.CrossEntropyLoss())
    rows = [_row(architecture, patient, "new", 0)]
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    rows.append(_row(architecture, patient, "trained", steps))
    rows.append(_row(architecture, patient, "evaluating", steps))
    return rows


def _row(architecture: Architecture, patient: Patient, state: str, steps: int) -> dict[str, Any]:
    patient.model.train(state != "evaluating")
    found = diagnosed(patient)
    return {
        "network": architecture.name, "state": state, "steps": steps, "layers": len(found.layers),
        "findings": [one.to_dict() for one in found.findings],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None, tell: Callable[[str], object] = print) -> int:
    """Look at all architectures; a run that was stopped goes on with the next one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doctor.published", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder with cifar10/train, cifar10/test and fsdd")
    parser.add_argument("--networks", nargs="*", default=list(ARCHITECTURES), help="these alone")
    parser.add_argument("--steps", type=int, default=60, help="of training, for each network")
    parser.add_argument("--out", type=Path, default=Path("bench-results/doctor_published.json"))
    options = parser.parse_args(arguments)
    require_packages(options.networks)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        if any(one["network"] == name for one in rows):
            continue
        rows += healthy(ARCHITECTURES[name], options.data, options.steps)
        write_text(options.out, json.dumps(rows, indent=1) + "\n")
        for row in rows[-3:]:
            severe = [f"{one['rule']} {one['severity']}" for one in row["findings"] if one["severity"] != "info"]
            tell(f"{name}, {row['state']}: {', '.join(severe) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
