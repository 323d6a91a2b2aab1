"""The commands on models, run like a user's, on a module in the current directory."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import keelnorm as kn
from keelnorm.cli import app
from keelnorm.cli._shared.inspection import run_twice
from keelnorm.engine.atomic_write import replacing
from keelnorm.surgery import Report

runner = CliRunner()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the module `nets` in it."""
    shutil.copy(Path(__file__).with_name("command_models.py"), tmp_path / "nets.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def run(*words: str) -> Result:
    """Run a command that succeeds."""
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    return result


def refused(*words: str) -> str:
    """The one line that a failing command prints on stderr, with nothing on stdout."""
    result = runner.invoke(app, words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line != "a module that prints"]
    assert len(lines) == 1, result.stderr
    return lines[0]


def report_of(*words: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(run(*words, "--json").stdout)  # which is there alone
    return report


def trained(classes: int = 4) -> nn.Module:
    """The module's network, with random weights and statistics."""
    from nets import small  # type: ignore[import-not-found]

    model: nn.Module = small(classes)
    torch.manual_seed(5)
    with torch.no_grad():
        for value in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            value.uniform_(0.2, 1.0)
    return model


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.syspath_prepend(folder)
    return trained()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_inspect_says_what_the_model_says(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].weight[:2] = torch.tensor([0.0, -1e-9])
        model[3].bn.running_var[0] = float("inf")
    kn.freeze(model, where="1")
    save_file(model.state_dict(), "w.safetensors")
    report = report_of("inspect", "nets:small", "--weights", "w.safetensors", "--input", "2,3,8,8")
    first, second = report["rows"]
    assert report["summary"] == {
        "batch norms": 2, "channels": 12, "dead channels": 2, "fusible": 2, "foldable": 1,
    }  # fmt: skip
    assert (first["path"], first["kind"], first["channels"], first["eps"]) == ("1", "BatchNorm2d", 6, 1e-5)
    assert (first["mode"], first["moments"], first["batches"], first["dead"]) == ("train", "finite", 0, 2)
    assert first["running var"] == [float(model[1].running_var.min()), float(model[1].running_var.max())]
    assert first["|weight|"] == [0.0, float(model[1].weight.max())]
    assert (first["comes after"], first["goes to"]) == ("Conv2d '0'", "ReLU '2'")
    assert (first["fuses with"], first["folds into"]) == ("relu", "0")
    assert second["moments"] == "not finite"
    assert second["running var"][1] is None  # JSON has no infinity
    assert (second["goes to"], second["folds into"]) == ("add", None)


def test_inspect_memory(folder: Path) -> None:
    (folder / "memory_hungry.py").write_text(
        "from torch import nn\n\ndef net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))\n",
        encoding="utf-8",
    )
    words = ("inspect", "memory_hungry:net", "--input", "8,3,64,64", "--memory")
    report = json.loads(run(*words, "--limit", "1", "--json").stdout)
    rows = {row["path"]: row for row in report["rows"]}
    one = 8 * 8 * 64 * 64 * 4 / 1e6
    assert rows["1"]["kept MB"] == pytest.approx(one, abs=2e-3)
    assert report["summary"]["kept MB"] == pytest.approx(3 * one, abs=4e-3)
    assert report["summary"]["converted"] == pytest.approx(2 * one, abs=4e-3)
    assert report["summary"]["with save_memory"] == pytest.approx(one, abs=4e-3)
    assert re.fullmatch(r"\d+ / \d+ / \d+", report["summary"]["largest batch"])
    assert "inspect --memory: kept MB" in run(*words).stdout
    assert "--memory runs the model; give an example by --input or --example" in refused(*words[:2], "--memory")


def test_inspect_without_a_run_and_of_frozen_and_lazy_layers(folder: Path) -> None:
    (folder / "more.py").write_text(
        "import keelnorm as kn, torch\nfrom torch import nn\n"
        "model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, affine=False),\n"
        "    kn.BatchNorm1d(2, track_running_stats=False))\n"
        "kn.freeze(model, where='0')\n",
        encoding="utf-8",
    )
    rows = report_of("inspect", "more:model")["rows"]
    assert [row["fuses with"] for row in rows] == [None] * 4
    assert [row["mode"] for row in rows] == ["frozen", "train", "train", "train"]
    assert [row["moments"] for row in rows] == ["finite", "not there yet", "finite", "none"]
    assert [row["channels"] for row in rows] == [3, None, 2, 2]
    assert [row["dead"] for row in rows] == [0, None, None, 0]
    assert rows[3]["kind"] == "kn.BatchNorm1d"
    assert [row["path"] for row in report_of("inspect", "more:model", "--where", "2")["rows"]] == ["2"]


def test_the_table_has_what_is_the_same_once() -> None:
    printed = run("inspect", "nets:small", "--input", "2,3,8,8").stdout
    assert printed.startswith("inspect: batch norms 2, channels 12, dead channels 0, fusible 2, foldable 2\n")
    assert re.search(r"^3\.bn +6 .*Conv2d '3.conv' +add .*addition and relu +3.conv$", printed, re.MULTILINE)
    assert "All of them: kind BatchNorm2d, eps 1e-05, momentum 0.1, mode train, moments finite, batches 0." in printed


def test_what_the_page_shows_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")
    (folder / "models.py").write_text(page.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.delitem(sys.modules, "models", raising=False)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not Path(one, "models.py").exists()])  # other tests'
    shown = page.split("```console\n$ keelnorm ")[1].split("```")[0].split("$ keelnorm ")
    assert len(shown) == 3
    for command, _, output in (one.partition("\n") for one in shown):
        pattern = ".*".join(map(re.escape, output.strip().split("...")))
        assert re.fullmatch(pattern, run(*shlex.split(command)).stdout.strip()), command


def test_convert_reports_and_writes_the_same_state(model: nn.Module) -> None:
    torch.save(model.state_dict(), "w.pt")
    report = report_of("convert", "nets:small", "--weights", "w.pt", "--out", "out.safetensors", "--report", "r.json")
    assert report["summary"] == {"batch norms": 2, "converted": 2, "fused": 0, "left with a reason": 0}
    assert same(load_file("out.safetensors"), model.state_dict())
    assert json.loads(Path("r.json").read_text(encoding="utf-8")) == report
    assert report["notes"] == [
        "What batch norms run with is known once the model has run: give --input or --example.",
        "The state_dict was written to out.safetensors.",
    ]


@pytest.mark.parametrize("samples", [1, 2])
def test_convert_runs_the_model_on_an_example(model: nn.Module, samples: int) -> None:
    torch.save(model.state_dict(), "w.pt")
    words = ("convert", "nets:small", "--weights", "w.pt", "--input", f"{samples},3,8,8", "--out", "out.safetensors")
    report = report_of(*words)
    assert report["summary"] == {"batch norms": 2, "converted": 2, "fused": 2, "left with a reason": 0}
    assert [row["runs with"] for row in report["rows"]] == ["relu", "addition and relu"]
    assert report["notes"] == ["The state_dict was written to out.safetensors."]
    assert same(load_file("out.safetensors"), model.state_dict())  # as before the run
    np.save("x.npy", np.zeros((samples, 3, 8, 8)))
    again = report_of(*words[:4], "--example", "x.npy", "--no-fuse")
    assert (again["summary"]["fused"], again["notes"]) == (0, [])


def test_convert_of_a_model_that_runs_in_evaluation_alone() -> None:
    report = report_of("convert", "nets:linear", "--input", "1,3")
    assert [row["reason"] for row in report["rows"]] == ["its result leaves the model"]
    [note] = report["notes"]
    assert note.startswith("The model was run in evaluation alone; in training it raised ValueError: BatchNorm1d '1':")
    assert "RuntimeError: " in refused("convert", "nets:linear", "--input", "1,5")
    assert refused("convert", "nets:linear", "--input", "1,x").startswith("--input must be sizes")


def test_a_run_leaves_the_model_as_it_was(model: nn.Module) -> None:
    model.train()[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    kn.convert(model)
    assert run_twice(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))) == []
    assert same(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)


def test_convert_takes_its_options() -> None:
    assert report_of("convert", "nets:small", "--no-fuse")["summary"]["fused"] == 0
    rows = report_of("convert", "nets:small", "--sync", "--where", "3")["rows"]
    assert [(row["path"], row["is"]) for row in rows] == [("3.bn", "kn.SyncBatchNorm")]


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


@pytest.fixture
def recalibrated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a recalibrate that sets the means to 7."""
    calls: list[Any] = []

    def recalibrate(model: nn.Module, loader: Any, **options: Any) -> tuple[nn.Module, Report]:
        calls.append(([batch.clone() for batch in loader], options))
        model[1].running_mean.fill_(7.0)
        return model, Report("recalibrate", {"layers": 1}, [{"path": "1", "shift": float("nan")}])

    monkeypatch.setattr(kn.surgery, "recalibrate", recalibrate, raising=False)
    return calls


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


class Bad:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path("ran").touch, ()


@pytest.mark.parametrize("name", ["w.pt", "w.pkl", "w.safetensors", "old.pt"])
def test_pickles_do_not_run(name: str) -> None:
    if name == "old.pt":
        torch.save({"1.weight": torch.zeros(6), "bad": Bad()}, name, _use_new_zipfile_serialization=False)
    elif name == "w.pt":
        torch.save({"1.weight": torch.zeros(6), "bad": Bad()}, name)
    else:
        Path(name).write_bytes(pickle.dumps(Bad()))
    said = refused("convert", "nets:small", "--weights", name)
    assert said.startswith(f"{name} ")
    assert not Path("ran").exists()
    assert ("was not loaded" in said) == (name != "w.safetensors")


@pytest.mark.parametrize(
    ("holder", "prefix"),
    [
        ("model_state_dict", ""),
        ("state_dict", "model."),
        ("model", "module."),
        ("ema", "_orig_mod."),
        ("net", "_orig_mod.module."),
        (None, "module.model._orig_mod."),
    ],
)
def test_checkpoints_of_trainers(holder: str | None, prefix: str, model: nn.Module) -> None:
    state = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state if holder is None else {holder: state, "optimizer": {"state": {}}, "epoch": 3}, "w.pt")
    report = report_of("convert", "nets:small", "--weights", "w.pt", "--out", "o.safetensors")
    assert same(load_file("o.safetensors"), model.state_dict())
    taken = [note for note in report["notes"] if note.endswith("w.pt.")]
    assert len(taken) == (holder is not None) + prefix.count(".")


def test_a_prefix_that_is_the_models_own_stays(folder: Path) -> None:
    (folder / "wrapped.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.ModuleDict({'model': nn.BatchNorm1d(3)})\n", encoding="utf-8"
    )
    state = nn.BatchNorm1d(3).state_dict()
    torch.save({f"model.{key}": value for key, value in state.items()}, "w.pt")
    assert len(report_of("inspect", "wrapped:net", "--weights", "w.pt")["notes"]) == 0
    torch.save({f"module.model.{key}": value for key, value in state.items()}, "w.pt")
    [note] = report_of("inspect", "wrapped:net", "--weights", "w.pt")["notes"]
    assert note == "DistributedDataParallel's prefix 'module.' was taken off the keys of w.pt."
    torch.save({f"model.{key}": value for key, value in state.items() if key != "bias"}, "w.pt")
    assert "1 missing: model.bias" in refused("inspect", "wrapped:net", "--weights", "w.pt")


def test_key_and_prefix_say_what_is_meant(model: nn.Module) -> None:
    state = model.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    averaged = {"module": {f"student.{key}": value for key, value in state.items()} | {"teacher.x": torch.zeros(1)}}
    torch.save({"model": other, "ema": averaged, "net": state, "swa": other}, "w.pt")
    words = ("convert", "nets:small", "--out", "o.safetensors", "--force", "--weights", "w.pt")
    assert refused(*words) == "w.pt has several state_dicts; --key says which: model or net"
    notes = report_of(*words, "--key", "ema.module", "--prefix", "student.")["notes"]
    assert same(load_file("o.safetensors"), state)
    assert notes[:2] == [
        "The state_dict was taken from 'ema.module' in w.pt.",
        "1 keys of w.pt without 'student.' were left out: teacher.x.",
    ]
    said = refused(*words, "--key", "ema.module")
    assert said.endswith("; with --prefix student. it has all keys of the model")
    assert refused(*words, "--key", "gone") == "w.pt has no state_dict under 'gone'; it has model, ema, net, swa"
    assert "has no key that begins with --prefix 'x.'" in refused(*words, "--key", "net", "--prefix", "x.")
    torch.save({"swa": other, "teacher": state}, "w.pt")
    assert refused(*words) == "w.pt has a state_dict under swa, teacher; --key says which"
    report_of(*words, "--key", "teacher")
    assert same(load_file("o.safetensors"), state)
    assert refused("convert", "nets:small", "--key", "ema").startswith("--key and --prefix say what to take")


def test_weights_that_do_not_fit_are_listed(model: nn.Module) -> None:
    state = model.state_dict()
    state["6.extra"] = state.pop("6.bias")
    state["1.weight"] = torch.zeros(5)
    save_file(state, "w.safetensors")
    assert refused("convert", "nets:small", "--weights", "w.safetensors") == (
        "w.safetensors does not fit the model: 1 missing: 6.bias; 1 unexpected: 6.extra; "
        "1 of another shape: 1.weight (5,) for (6,)"
    )
    torch.save([1, 2], "w.pt")
    said = refused("convert", "nets:small", "--weights", "w.pt")
    assert "must hold a state_dict, by itself, under 'model_state_dict', 'state_dict', 'model', 'ema', 'net', " in said
    assert said.endswith("or under --key; it holds a list")
    assert refused("convert", "nets:small", "--weights", "gone.pt") == "there is no file gone.pt"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["nets"], "expected package.module:callable, such as torchvision.models:resnet50; got 'nets'"),
        (["gone.nets:small"], "gone.nets:small: no module named 'gone'"),
        (["nets:gone"], "nets:gone: there is no 'gone' in nets; it has Block, Pair, batches, fails"),
        (["nets:answer.deep"], "nets:answer.deep: there is no 'deep' in nets"),
        (["nets:answer"], "nets:answer must be a callable; it is 42 (int)"),
        (["nets:one_tensor"], "nets:one_tensor must return a torch.nn.Module; it returned a float32 tensor"),
        (["nets:fails"], "nets:fails() raised KeyError: 'no such size' (nets.py:36)"),
        (["nets.py:small"], "nets.py:small: a module is meant, not its file: nets:small"),
        (["./nets.py:small"], "./nets.py:small: a module is meant, not its file: nets:small"),
        (["deep/er.py:small"], "deep/er.py:small: a module is meant, not its file: deep.er:small"),
        (["/else/where.py:f"], "a module is meant, not its file: where:f, in the directory /else"),
        (["nets:small", "--args", "{"], "--args must be JSON"),
        (["nets:small", "--args", "[1]"], "--args must be a JSON object of keywords"),
        (["nets:small", "--args", '{"size": 1}'], "nets:small(size=1) raised TypeError"),
        (["nets:linear", "--args", '{"size": 1}'], "nets:linear is a model already"),
        (["nets:small", "--where", "zz"], "where='zz' matches no batch norm. The model's are: '1', '3.bn'"),
        (["nets:small", "--out", "w.pt"], "--out must end in .safetensors; got w.pt"),
        (["nets:small", "--out", "gone/w.safetensors"], "nothing can be written to gone"),
        (["nets:small", "--report", "r.txt"], "--report must end in .json; got r.txt"),
        (
            ["broken:model"],
            "broken:model: importing broken raised ModuleNotFoundError: No module named 'not_there' (broken.py:1)",
        ),
        (["wrong:model"], "wrong:model: importing wrong raised ZeroDivisionError: division by zero (wrong.py:1)"),
    ],
)
def test_errors_say_what_was_asked_and_what_is_legal(words: list[str], answer: str) -> None:
    Path("broken.py").write_text("import not_there\n", encoding="utf-8")
    Path("wrong.py").write_text("1 / 0\n", encoding="utf-8")
    assert answer in refused("convert", *words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "fold runs the model on an example: give --input 1,3,224,224 or --example FILE"),
        (["--input", "1,x"], "got '1,x'; dtypes are float32"),
        (["--input", "1,3:float"], "got '1,3:float'; dtypes are float32"),
        (["--input", "0,3"], "sizes of at least 1"),
        (["--input", "1,2,8,8"], "RuntimeError: "),
        (["--input", "1,3,8,8", "--example", "x.npy"], "--input and --example exclude each other"),
        (["--example", "x.png"], "--example must be a .safetensors or .npy file; got x.png"),
        (["--example", "gone.npy"], "there is no file gone.npy"),
    ],
)
def test_examples_that_are_none(words: list[str], answer: str) -> None:
    assert answer in refused("fold", "nets:small", *words)


def test_an_error_of_the_models_own_code_says_where(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "import json\nimport torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, way='torch'):\n        super().__init__()\n"
        "        self.bn, self.way = nn.BatchNorm1d(3), way\n\n"
        "    def forward(self, x):\n        if self.way == 'json':\n            return json.loads('{')\n"
        "        return self.bn(x.view(7, 3))\n\n\n"
        "class Twin(Net):\n    def forward(self, x):\n        raise ValueError('fold: as the command begins')\n",
        encoding="utf-8",
    )
    words = ("fold", "mine:Net", "--input", "4,3")
    assert re.fullmatch(r"RuntimeError: shape '\[7, 3\]' is invalid .* \(mine\.py:14\)", refused(*words))
    assert refused(*words, "--args", '{"way": "json"}').endswith("(mine.py:13)")  # not in Python's own json
    said = refused("fold", "mine:Twin", "--input", "4,3")
    assert said == "ValueError: fold: as the command begins (mine.py:19)"
    assert "(nets" not in refused("fold", "nets:linear", "--input", "4,5")  # torch's layers alone


@pytest.mark.parametrize("words", [("--debug", "convert", "nets:fails"), ("convert", "nets:fails", "--debug")])
def test_debug_prints_the_traceback(words: tuple[str, ...]) -> None:
    result = runner.invoke(app, words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nets:fails() raised KeyError: 'no such size' (nets.py:36)\n" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr
    assert 'nets.py", line 36, in fails\n    raise KeyError("no such size")' in result.stderr


def test_debug_of_other_commands() -> None:
    for words in (["lab", "run", "gone"], ["bench", "page", "nets.py"]):
        plain, told = (runner.invoke(app, [*words, *more]) for more in ([], ["--debug"]))
        assert plain.exit_code == told.exit_code == 2
        assert "Traceback" not in plain.stderr
        assert "Traceback (most recent call last)" in told.stderr


def test_help_has_a_short_form() -> None:
    for words in ([], ["fold"], ["lab"], ["lab", "run"], ["bench"], ["bench", "compare"]):
        assert run(*words, "-h").stdout == run(*words, "--help").stdout != ""


def test_files_of_the_current_directory_do_not_stand_for_installed_packages(folder: Path) -> None:
    for name in ("safetensors", "rich", "onnx"):
        (folder / f"{name}.py").write_text("from pathlib import Path\nPath('ran').touch()\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    words = ["convert", "nets:small", "--out", "o.safetensors", "--json"]
    for start in (["-m", "keelnorm"], ["-c", "import sys; del sys.path[0]; from keelnorm.cli import main; main()"]):
        done = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["summary"]["converted"] == 2
        Path("o.safetensors").unlink()
    assert not Path("ran").exists()
    said = refused("convert", "safetensors:model")
    assert said.startswith("safetensors:model: safetensors is both safetensors.py here and /")
    assert not Path("ran").exists()


def test_completion_knows_the_commands() -> None:
    environment = {"_KEELNORM_COMPLETE": "complete_bash", "COMP_WORDS": "keelnorm rec", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "keelnorm"], capture_output=True, text=True, env=os.environ | environment
    )
    assert (done.returncode, done.stdout.split()) == (0, ["recalibrate"]), done.stderr


def test_files_are_not_overwritten_unless_told(model: nn.Module) -> None:
    for name in ("o.safetensors", "r.json"):
        Path(name).write_text("mine", encoding="utf-8")
    said = refused("convert", "nets:small", "--out", "o.safetensors")
    assert said == "o.safetensors exists; --force overwrites it"
    assert refused("inspect", "nets:small", "--report", "r.json") == "r.json exists; --force overwrites it"
    assert Path("o.safetensors").read_text() == Path("r.json").read_text() == "mine"
    run("convert", "nets:small", "--out", "o.safetensors", "--report", "r.json", "--force")
    assert len(load_file("o.safetensors")) == len(model.state_dict())
    assert json.loads(Path("r.json").read_text(encoding="utf-8"))["operation"] == "convert"


def test_a_failure_leaves_the_file_that_was_there() -> None:
    path = Path("o.safetensors")
    path.write_text("mine", encoding="utf-8")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write_half()
    assert path.read_text(encoding="utf-8") == "mine"
    assert sorted(one.name for one in Path().iterdir()) == ["nets.py", "o.safetensors"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, keelnorm; before = set(sys.modules); import keelnorm.cli; "
        "print([name for name in ('safetensors', 'onnx', 'onnxruntime', 'torch.onnx._internal.exporter', "
        "'keelnorm.surgery') if name in set(sys.modules) - before])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
