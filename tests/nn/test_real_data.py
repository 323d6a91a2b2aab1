"""On real images: training with our layer is training with torch's."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import keelnorm as kn


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    folder = os.environ.get("KEELNORM_DATA_DIR")
    if not folder or not (Path(folder) / "mnist").is_dir():
        pytest.skip("KEELNORM_DATA_DIR names no folder with mnist/ in it, MNIST's gzipped IDX files")
    read = [gzip.decompress((Path(folder) / "mnist" / name).read_bytes()) for name in
            ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")]  # fmt: skip
    images = torch.from_numpy(np.frombuffer(read[0], np.uint8, offset=16).copy()).view(-1, 1, 28, 28)
    return images.float() / 255, torch.from_numpy(np.frombuffer(read[1], np.uint8, offset=8).astype(np.int64))


def network(module: type[nn.Sequential], norm: type[nn.BatchNorm2d]) -> nn.Sequential:
    return module(
        nn.Conv2d(1, 8, 3, stride=2), norm(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), norm(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


@pytest.mark.parametrize("data", [digits, mnist])
def test_training_on_real_images(data):
    images, labels = data()
    torch.manual_seed(0)
    ours = network(kn.Sequential, kn.BatchNorm2d)
    theirs = network(nn.Sequential, nn.BatchNorm2d)
    theirs.load_state_dict(ours.state_dict())
    first = last = 0.0
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (ours, theirs)]
    for step in range(60):
        batch = torch.arange(step * 64, (step + 1) * 64) % len(images)
        losses = []
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Rounding differs, and training amplifies it a little from step to step.
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        first, last = first or losses[0], losses[0]
    assert last < 0.8 * first
    ours.eval(), theirs.eval()
    with torch.no_grad():
        agreement = (ours(images).argmax(1) == theirs(images).argmax(1)).float().mean().item()
    assert agreement > 0.99
