"""ONNX files against the model, by onnxruntime."""

from __future__ import annotations

import pytest
import torch
from surgery.convert_models import a_net
from torch import nn

import evenkeel as ek
from evenkeel.surgery import onnx_export

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
X = torch.randn(4, 3, 8, 8)


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in inputs.values()), strict=True)))


@pytest.mark.parametrize("converted", [False, True])
def test_inference(tmp_path, converted):
    model = a_net()
    model(X)
    model.eval()
    if converted:
        model, _ = ek.convert(model)
    report = ek.export_onnx(model, X, tmp_path / "new" / "model.onnx")
    assert report.summary["difference"] < 1e-5
    assert report.summary["on other values"] < 1e-5
    (y,) = run(tmp_path / "new" / "model.onnx", x=X)
    torch.testing.assert_close(torch.from_numpy(y), model(X), rtol=1e-4, atol=1e-5)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert type(model[1]) is (ek.BatchNorm2d if converted else nn.BatchNorm2d)


def test_evenkeels_own_layers(tmp_path):
    model = ek.Sequential(nn.Conv2d(3, 4, 3), ek.GhostBatchNorm(4, 2), nn.ReLU(), ek.BatchRenorm(4)).eval()
    assert ek.export_onnx(model, X, tmp_path / "m.onnx").summary["difference"] < 1e-5


def test_dynamic_shapes(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    ek.export_onnx(model, X, tmp_path / "m.onnx", dynamic_shapes=({0: batch},))
    other = torch.randn(7, 3, 8, 8)
    (y,) = run(tmp_path / "m.onnx", x=other)
    torch.testing.assert_close(torch.from_numpy(y), model(other), rtol=1e-4, atol=1e-5)


def test_training_mode_is_refused_because_the_exporter_loses_it(tmp_path):
    """torch.onnx.export writes evaluation all the same: this is what the refusal is for."""
    model = nn.Sequential(nn.BatchNorm2d(3)).train()
    with pytest.raises(ValueError, match="0 is in training mode"):
        ek.export_onnx(model, X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    onnx_export._write(nn.Sequential(nn.BatchNorm2d(3)).train(), (X + 5,), {}, tmp_path / "t.onnx", None, None)
    y = run(tmp_path / "t.onnx", x=X + 5)[0]
    assert abs(y.mean() - 5) < 0.5  # by the running moments, as they were made


def test_a_difference_leaves_no_file(tmp_path, monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    (tmp_path / "m.onnx").write_text("what was there")
    plain = onnx_export._run
    monkeypatch.setattr(onnx_export, "_run", lambda *args: [y + 1 for y in plain(*args)])
    with pytest.raises(RuntimeError, match="more than the tolerance"):
        ek.export_onnx(model, X, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "what was there"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'evenkeel\[export\]'"):
        ek.export_onnx(nn.BatchNorm2d(3).eval(), X, tmp_path / "m.onnx")
