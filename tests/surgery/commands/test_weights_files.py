"""Files of weights that the commands read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery.commands.invoke import Bad, refused, report_of, same
from torch import nn


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
