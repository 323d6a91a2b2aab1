"""`keelnorm fold`, run like a user's, also to ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.commands.invoke import refused, report_of, run, same
from torch import nn

import keelnorm as kn


def test_fold_writes_what_fold_gives(model: nn.Module) -> None:
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}, "epoch": 3}, "w.pth")
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)  # numpy's default
    np.save("x.npy", x.numpy())
    words = ("fold", "nets:small", "--weights", "w.pth", "--example", "x.npy", "--out", "f.safetensors")
    report = report_of(*words)
    folded, expected = kn.fold(model.eval(), x.float())
    assert same(load_file("f.safetensors"), folded.state_dict())
    assert report["summary"] == expected.to_dict()["summary"]
    assert report["notes"][:2] == [
        "The state_dict was taken from 'model' in w.pth.",
        "DistributedDataParallel's prefix 'module.' was taken off the keys of w.pth.",
    ]


def test_fold_with_keywords_for_the_callable_and_a_part_of_the_layers(model: nn.Module) -> None:
    words = ("fold", "nets:small", "--args", '{"classes": 7}', "--input", "1,3,8,8", "--where", "1")
    run(*words, "--out", "f.safetensors")
    state = load_file("f.safetensors")
    assert state["6.weight"].shape == (7, 6)
    assert "3.bn.weight" in state
    assert "1.weight" not in state
    assert report_of(*words, "--tolerance", "0")["summary"]["folded"] == 0


@pytest.mark.filterwarnings("default")  # the exporter's
def test_onnx_has_the_folded_model(model: nn.Module) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_file(model.state_dict(), "w.safetensors")
    x = torch.randn(2, 3, 8, 8)
    report = report_of("fold", "nets:small", "--weights", "w.safetensors", "--input", "2,3,8,8", "--out", "f.onnx")
    assert report["summary"]["in onnxruntime"] < 1e-5
    session = onnxruntime.InferenceSession("f.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in Path().iterdir()) == ["f.onnx", "nets.py", "w.safetensors"]


@pytest.mark.filterwarnings("default")  # the exporter's
def test_onnx_of_keywords_in_another_order() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    save_file({"ids": torch.tensor([1, 0, 1]), "first": torch.randn(3, 4)}, "x.safetensors")
    report = report_of("fold", "nets:Pair", "--example", "x.safetensors", "--out", "f.onnx")
    assert report["summary"]["folded"] == 1
    assert report["summary"]["in onnxruntime"] < 1e-5


def test_a_wrong_onnx_file_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from keelnorm.surgery.interchange import onnx_export

    monkeypatch.setattr(onnx_export, "_write", lambda model, args, kwargs, path, *others: path.write_text("half"))
    monkeypatch.setattr(onnx_export, "_run", lambda *_, **__: [torch.ones(2, 4)])
    said = refused("fold", "nets:small", "--input", "2,3,8,8", "--out", "f.onnx")
    assert "onnxruntime's output differs by" in said
    assert [path.name for path in Path().iterdir()] == ["nets.py"]


def test_several_inputs_with_dtypes() -> None:
    report = report_of("fold", "nets:Pair", "--input", "3,4", "--input", "3:int64")
    assert report["summary"]["folded"] == 1
