"""How much of the accuracy that corrupted images cost do adapted statistics bring back? On handwritten digits.

A small convolutional network is trained on clean digits; its test images are then corrupted, which shifts what goes
into its batch norms. Without a label, `kn.adapt` takes the statistics of the corrupted images. What is printed is the
test accuracy, and the share of the lost accuracy that came back: the mean over seeds, each with its 95 % interval. A
seed draws the split, the initial weights, the order of the samples and the corruption.

    python examples/adapt_digits.py            about a minute on one core
    python examples/adapt_digits.py --quick    a few seconds; two seeds
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.lab import data
from keelnorm.lab.core.seeds import generator
from keelnorm.measure.statistics import mean


def noise(x: Tensor, random: torch.Generator) -> Tensor:
    return x + 0.5 * torch.randn(x.shape, generator=random)


def blur(x: Tensor, random: torch.Generator) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


#: Of images with values from 0 to 1.
CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "Gaussian noise": noise,
    "low contrast": lambda x, random: 0.25 * (x - x.mean((1, 2, 3), keepdim=True)) + x.mean((1, 2, 3), keepdim=True),
    "brightness": lambda x, random: x + 0.75,
    "grey veil": lambda x, random: 0.5 + 0.3 * x,
    "blur": blur,
}
WAYS: dict[str, dict[str, object]] = {
    "prior 0": {"prior": 0},
    "prior 16": {"prior": 16},
    "prior 300": {"prior": 300},
    "prior 0, layer by layer": {"prior": 0, "sequential": True},
    "prior 0 and entropy": {"prior": 0, "entropy": True},
    "by the batch of 50, prior 16": {"prior": 16, "mode": "batch"},
}


def a_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def trained(split: data.Split, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = a_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    random = generator(task="adapt", draw="order", seed=seed)
    for _ in range(epochs):
        for index in torch.randperm(len(split.train_x), generator=random).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train_x[index]), split.train_y[index]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in x.split(50)])
    return 100 * (found == labels).double().mean().item()


def one_seed(seed: int, epochs: int) -> Iterator[tuple[str, dict[str, float]]]:
    """For each corruption the accuracies: clean, corrupted, and adapted in each way."""
    split = data.digits(seed, centered=False)
    model = trained(split, seed, epochs)
    clean = accuracy(model, split.test_x, split.test_y)
    for name, corrupt in CORRUPTIONS.items():
        x = corrupt(split.test_x, generator(task="adapt", draw="corruption", seed=seed))
        found = {"clean": clean, "corrupted": accuracy(model, x, split.test_y)}
        for way, options in WAYS.items():
            batches = None if options.get("mode") == "batch" else list(x.split(50))
            adapted, _ = kn.adapt(copy.deepcopy(model), batches, **options)  # type: ignore[arg-type]
            found[way] = accuracy(adapted, x, split.test_y)
        yield name, found


def recovered(found: dict[str, float], way: str) -> float:
    """Percent of the lost accuracy that came back."""
    return 100 * (found[way] - found["corrupted"]) / (found["clean"] - found["corrupted"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, short training")
    arguments = parser.parse_args(argv)
    seeds, epochs = (2, 2) if arguments.quick else (5, 15)
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CORRUPTIONS}
    for seed in range(seeds):
        for name, found in one_seed(seed, epochs):
            rows[name].append(found)
    for name, found_by_seed in rows.items():
        print(f"\n{name}")
        for what in ("clean", "corrupted"):
            print(f"  {what:30} {mean([found[what] for found in found_by_seed]).text(1)} % right")
        for way in WAYS:
            right = mean([found[way] for found in found_by_seed]).text(1)
            back = mean([recovered(found, way) for found in found_by_seed if found["clean"] > found["corrupted"]])
            print(f"  {way:30} {right} % right, {back.text(0)} % of the loss recovered")
    print("\nall corruptions together")
    for way in WAYS:
        shares = [mean([recovered(found[seed], way) for found in rows.values()]).value for seed in range(seeds)]
        print(f"  {way:30} {mean(shares).text(0)} % of the loss recovered")


if __name__ == "__main__":
    main()
