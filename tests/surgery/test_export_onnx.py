"""ONNX files in onnxruntime give the model's outputs."""

from __future__ import annotations

import pytest
import torch
from surgery.convert_models import a_net
from torch import nn

import keelnorm as kn
from keelnorm.engine import optional_imports
from keelnorm.surgery.interchange import onnx_export

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
        model, _ = kn.convert(model)
    report = kn.export_onnx(model, X, tmp_path / "new" / "model.onnx")
    assert report.summary["difference"] < 1e-5
    assert report.summary["on other values"] < 1e-5
    (y,) = run(tmp_path / "new" / "model.onnx", x=X)
    torch.testing.assert_close(torch.from_numpy(y), model(X), rtol=1e-4, atol=1e-5)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.onnx"]
    assert type(model[1]) is (kn.BatchNorm2d if converted else nn.BatchNorm2d)


def test_keelnorms_own_layers(tmp_path):
    model = kn.Sequential(nn.Conv2d(3, 4, 3), kn.GhostBatchNorm(4, 2), nn.ReLU(), kn.BatchRenorm(4)).eval()
    assert kn.export_onnx(model, X, tmp_path / "m.onnx").summary["difference"] < 1e-5


def test_dynamic_shapes(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    kn.export_onnx(model, X, tmp_path / "m.onnx", dynamic_shapes=({0: batch},))
    other = torch.randn(7, 3, 8, 8)
    (y,) = run(tmp_path / "m.onnx", x=other)
    torch.testing.assert_close(torch.from_numpy(y), model(other), rtol=1e-4, atol=1e-5)


def test_training_mode(tmp_path):
    """Batch norms use the batch; a frozen layer and dropout are in evaluation; the model is unchanged."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(64, 5), kn.BatchNorm1d(5),
    )  # fmt: skip
    kn.freeze(model, where="4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = X * 2 + 3
    report = kn.export_onnx(model.train(), x, tmp_path / "m.onnx", training=True)
    assert report.summary["difference"] < 1e-5
    assert report.summary["on other values"] < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    nodes = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "BatchNormalization"]
    modes = [sum(a.i for a in node.attribute if a.name == "training_mode") for node in nodes]
    assert modes == [1, 0, 1]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    model[2].eval()
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_what_can_not_be_in_training_mode(tmp_path):
    with pytest.raises(ValueError, match="0 is in training mode"):
        kn.export_onnx(nn.Sequential(nn.BatchNorm2d(3)).train(), X, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="the model is in training mode"):
        kn.export_onnx(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), X, tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match="0 can't be written in training mode"):
        kn.export_onnx(nn.Sequential(kn.RangeBatchNorm(3)).train(), X, tmp_path / "m.onnx", training=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [kn.BatchNorm2d, nn.BatchNorm2d])
def test_a_model_that_is_a_batch_norm(tmp_path, kind):
    """Its path is "", and its buffers' names have no prefix."""
    kn.export_onnx(kind(3).train(), X * 2 + 3, tmp_path / "m.onnx", training=True)
    assert modes_of(tmp_path / "m.onnx") == [1]
    with pytest.raises(RuntimeError, match="the layer itself can't be written in training mode"):
        kn.export_onnx(kn.RangeBatchNorm(3).train(), X, tmp_path / "m.onnx", training=True, tolerance=10)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.bn(x) * 2 + 1)


def test_a_layer_that_is_called_twice_is_in_training_mode_in_both(tmp_path):
    report = kn.export_onnx(Twice().train(), X, tmp_path / "m.onnx", training=True)
    assert report.summary["on other values"] < 1e-5
    assert modes_of(tmp_path / "m.onnx") == [1, 1]


def modes_of(path):
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "BatchNormalization"]
    return [sum(a.i for a in node.attribute if a.name == "training_mode") for node in nodes]


def test_the_opset_is_the_one_that_was_asked_for(tmp_path, capfd):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    kn.export_onnx(model, X, tmp_path / "m.onnx", opset_version=20)
    assert [one.version for one in onnx.load(tmp_path / "m.onnx").opset_import if one.domain == ""] == [20]
    capfd.readouterr()
    with pytest.raises(RuntimeError, match="opset_version=13 was asked for, and this torch's exporter wrote version"):
        kn.export_onnx(model, X, tmp_path / "other.onnx", opset_version=13)
    assert capfd.readouterr().err == ""
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


class ForFour(nn.Module):
    """A model whose code depends on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, other):
        return (self.bn(x) if x.shape[0] == 4 else x) + other


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("by_name", [True, False])
def test_axes_that_the_exporter_fixes(tmp_path, by_name):
    free = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = {"x": free, "other": None} if by_name else (free, None)
    with pytest.raises(RuntimeError, match="asks for a dynamic axis 0 of x, which the exporter has fixed to 4"):
        kn.export_onnx(ForFour().eval(), (X, X[:1]), tmp_path / "m.onnx", dynamic_shapes=shapes)
    assert not list(tmp_path.iterdir())


def test_a_difference_leaves_no_file(tmp_path, monkeypatch):
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    (tmp_path / "m.onnx").write_text("what was there")
    plain = onnx_export._run
    monkeypatch.setattr(onnx_export, "_run", lambda *args, **more: [y + 1 for y in plain(*args, **more)])
    with pytest.raises(RuntimeError, match="more than the tolerance"):
        kn.export_onnx(model, X, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "what was there"
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(optional_imports, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"export_onnx needs onnx, .*install .*'onnx>="):
        kn.export_onnx(nn.BatchNorm2d(3).eval(), X, tmp_path / "m.onnx")
