"""A folded network keeps its accuracy in 8 bits: torchao's PT2E quantization, on handwritten digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import keelnorm as kn

pytestmark = pytest.mark.filterwarnings("ignore")  # of torchao's, many and by version


def trained(split, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), kn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), kn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    model, _ = kn.convert(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(8):
        for index in torch.randperm(len(split.train_x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(split.train_x[index]), split.train_y[index]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model, split):
    with torch.no_grad():
        return 100 * (model(split.test_x).argmax(1) == split.test_y).double().mean().item()


def quantized(model, split):
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    inductor = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = inductor.X86InductorQuantizer().set_global(inductor.get_default_x86_inductor_quantization_config())
    program = torch.export.export(model, (split.test_x,)).module()
    prepared = pt2e.prepare_pt2e(program, quantizer)
    with torch.no_grad():
        prepared(split.validation_x[:300].repeat(2, 1, 1, 1)[:300])
    return pt2e.convert_pt2e(prepared)


def test_eight_bits_keep_the_accuracy():
    pytest.importorskip("sklearn")
    from keelnorm.lab import data

    drops = []
    for seed in range(3):
        split = data.digits(seed)
        model = trained(split, seed)
        folded, report = kn.fold(model, split.test_x[:2])
        assert report.summary["folded"] == 2
        prepared, _ = kn.prepare_export(folded)
        small = quantized(prepared, split)
        assert any("quantize_per" in str(node.target) for node in small.graph.nodes)
        drops.append(accuracy(model, split) - accuracy(small, split))
    assert max(drops) < 1.0, drops
    print("drops", drops)
