"""`keelnorm recalibrate`, run like a user's."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.commands.invoke import Bad, refused, report_of, run


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
def test_recalibrate_cuts_a_file_into_batches(suffix: str, recalibrated: list[Any]) -> None:
    x = torch.randn(5, 3)
    if suffix == ".safetensors":
        save_file({"x": x}, "x.safetensors")
    else:
        {".npy": np.save, ".npz": np.savez}[suffix](f"x{suffix}", x.double().numpy())
    report = report_of(
        "recalibrate", "nets:linear", "--data", f"x{suffix}", "--batch-size", "2", "--out", "o.safetensors"
    )
    [(batches, options)] = recalibrated
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), x)
    assert options == {"where": None, "sequential": False, "tolerance": None, "max_batches": None}
    assert load_file("o.safetensors")["1.running_mean"].tolist() == [7.0, 7.0]
    assert report["rows"] == [{"path": "1", "shift": None}]


def test_recalibrate_sets_the_moments() -> None:
    x = torch.randn(40, 3)
    np.save("x.npy", x.numpy())
    report = report_of("recalibrate", "nets:linear", "--data", "x.npy", "--out", "o.safetensors")
    nets = importlib.import_module("nets")
    mean = nets.linear[0](x).mean(0)
    torch.testing.assert_close(load_file("o.safetensors")["1.running_mean"], mean.detach())
    assert report["rows"][0]["values"] == 40


def test_recalibrate_takes_batches_of_a_callable(recalibrated: list[Any]) -> None:
    words = ("--sequential", "--tolerance", "0.1", "--max-batches", "4", "--where", "1")
    run("recalibrate", "nets:linear", "--data", "nets:batches", *words)
    [(batches, options)] = recalibrated
    assert [float(batch[0, 0]) for batch in batches] == [0.0, 1.0, 2.0]
    assert options == {"where": ["1"], "sequential": True, "tolerance": 0.1, "max_batches": 4}


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        ("nets:one_tensor", "must return an iterable of batches; it gave a float32 tensor of shape (3,)"),
        ("nets:answer", "must return an iterable of batches; it gave 42 (int)"),
        ("gone.npy", "there is no file gone.npy"),
        ("data.csv", "must be a .safetensors, .npy or .npz file, or package.module:callable; got data.csv"),
        ("two.npz", "must have one array, the inputs (N, ...); it has a, b"),
        ("objects.npy", "is no .npy file of numbers"),
        ("single.npy", "it has one of shape ()"),
    ],
)
def test_data_that_is_none(data: str, answer: str, recalibrated: list[Any]) -> None:
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    np.save("objects.npy", np.array([Bad()], dtype=object), allow_pickle=True)
    np.save("single.npy", np.float32(1))
    assert answer in refused("recalibrate", "nets:linear", "--data", data)
    assert not Path("ran").exists()
