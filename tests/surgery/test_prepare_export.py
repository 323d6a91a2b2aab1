"""Models made ready for exporters, and the exporters' results."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from surgery.convert_models import a_net
from torch import nn

import keelnorm as kn

X = torch.randn(4, 3, 8, 8)
LAYERS = {
    "drop-in": lambda: kn.BatchNorm2d(3),
    "any rank": lambda: kn.BatchNorm(3),
    "sync": lambda: kn.SyncBatchNorm(3),
    "ghost": lambda: kn.GhostBatchNorm(3, 2),
    "renorm": lambda: kn.BatchRenorm(3),
    "cross-iteration": lambda: kn.CrossIterationBatchNorm(3, compensate=False),
    "moving average": lambda: kn.MovingAverageBatchNorm(3),
    "split": lambda: kn.SplitBatchNorm(3),
    "L1": lambda: kn.L1BatchNorm(3),
    "range": lambda: kn.RangeBatchNorm(3),
    "whitening": lambda: kn.WhiteningBatchNorm(3, group_size=3),
}


def mixed():
    model = kn.Sequential(nn.Conv2d(3, 4, 3), kn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), kn.GhostBatchNorm(4, 2))
    model(X)
    return model.eval()


def test_layers_become_plain():
    model = mixed()
    expected, attributes = model(X), [dict(vars(m)) for m in model.modules()]
    prepared, report = kn.prepare_export(model)
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert type(model[1]) is kn.BatchNorm2d
    assert type(prepared) is nn.Sequential
    assert type(prepared[1]) is nn.BatchNorm2d
    assert [(row["was"], row["is"]) for row in report.rows] == [
        ("kn.BatchNorm2d", "BatchNorm2d"), ("BatchNorm2d", "BatchNorm2d"), ("kn.GhostBatchNorm", "kn.GhostBatchNorm"),
    ]  # fmt: skip
    assert report.summary["made plain"] == 1
    assert "skipped_updates" not in dict(prepared.named_buffers()).get("1", {})
    assert prepared.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(prepared(X), expected)
    same, _ = kn.prepare_export(model, inplace=True)
    assert same is model
    assert type(model[1]) is nn.BatchNorm2d


def test_converted_models():
    model = a_net().eval()
    expected = model(X)
    prepared, report = kn.prepare_export(kn.convert(model)[0])
    assert not any("forward" in module.__dict__ for module in prepared.modules())
    assert {row["is"] for row in report.rows} == {"BatchNorm2d"}
    torch.testing.assert_close(prepared(X), expected)


def test_what_is_not_ready_is_listed_before_anything_changes():
    model = nn.Sequential(
        kn.BatchNorm2d(3).train(), kn.BatchNorm2d(3, track_running_stats=False).eval(), kn.BatchNorm2d(3).eval()
    )
    with pytest.raises(
        ValueError, match="prepare_export: 0 is in training mode; 1 has no running statistics"
    ) as raised:
        kn.prepare_export(model, inplace=True)
    assert "model.eval()" in str(raised.value)
    assert "kn.recalibrate" in str(raised.value)
    assert [type(layer) for layer in model] == [kn.BatchNorm2d] * 3
    _, report = kn.prepare_export(model, training="allow")
    assert [row["note"] for row in report.rows] == ["is in training mode", "has no running statistics", None]
    with pytest.raises(ValueError, match="does not know its channels"):
        kn.prepare_export(kn.LazyBatchNorm2d().eval(), training="allow")
    with pytest.raises(ValueError, match="has no reference batch"):
        kn.prepare_export(kn.VirtualBatchNorm(3).eval())
    with pytest.raises(ValueError, match="training must be"):
        kn.prepare_export(model, training="no")
    with pytest.raises(TypeError, match="prepare_export: model must be"):
        kn.prepare_export(3)  # type: ignore[type-var]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_exports_to_torchs_operators(kind):
    layer = LAYERS[kind]()
    layer(X), layer(X)
    layer.eval()
    prepared, _ = kn.prepare_export(nn.Sequential(layer, nn.ReLU()))
    program = torch.export.export(prepared, (X,))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    own = {name for name in operators if not name.startswith("aten.") and "getitem" not in name}
    assert own <= {"wrap_with_autocast"}, operators  # whitening turns autocast off, in a graph of its own
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(X), layer(X).relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_aot_inductor(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor compiles C++, and there is no g++")
    model = mixed()
    prepared, _ = kn.prepare_export(copy.deepcopy(model))
    with torch.no_grad():
        program = torch.export.export(prepared, (X,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(X), model(X), rtol=1e-4, atol=1e-5)
