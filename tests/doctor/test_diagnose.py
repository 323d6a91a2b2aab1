"""``kn.diagnose``: its arguments, its errors, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import keelnorm as kn
from keelnorm.doctor.case_check import fingerprint
from keelnorm.doctor.known_rules import own_rules

sys.path.insert(0, str(Path(__file__).parents[1] / "surgery"))
from packages import load


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.99), nn.ReLU(), nn.BatchNorm2d(4))


def images(samples=4, batches=2):
    return list(torch.randn(samples * batches, 3, 5, 5).split(samples))


def diagnose(model, batches=None, **options):
    """With the rules that look at the model alone."""
    return kn.diagnose(model, batches, **{"select": "KN1", **options})


def found(diagnosis):
    return [(one.rule, *one.layers) for one in diagnosis.findings]


class Twice(nn.Module):
    """Keywords, nested results, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1)
        self.shared, self.idle = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, *, left, right):
        return {"out": [self.shared(self.one(left)).relu(), self.shared(self.two(right)).mean()]}


def test_findings_are_worst_first_and_in_order():
    model = network()
    model[3].running_mean[0] = float("nan")
    model[3].momentum = 0.0
    diagnosis = diagnose(model, images(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1))
    assert found(diagnosis) == [
        ("KN109", "3"), ("KN103", "1"), ("KN103", "3"), ("KN101", "1"), ("KN102", "1", "3"), ("KN113", "3"),
    ]  # fmt: skip
    assert [one.severity for one in diagnosis.findings] == ["error", *["warning"] * 2, *["info"] * 3]
    assert diagnosis.worst == "error"
    assert len(diagnosis.at_least("warning")) == 3
    assert found(replace(diagnosis, findings=tuple(diagnosis.of("momentum")))) == [("KN103", "1"), ("KN103", "3")]
    assert diagnosis.layers == ("1", "3")


def test_a_healthy_model_has_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    diagnosis = diagnose(model, images())
    assert (diagnosis.findings, diagnosis.worst, diagnosis.at_least("info")) == ((), None, [])
    assert diagnosis.skipped["KN102"] == "needs optimizer="


@pytest.mark.parametrize("asked", ["KN103", "momentum", ["KN103"], "KN101, KN103", ("bias-in-front", "momentum")])
def test_select(asked):
    diagnosis = diagnose(network(), select=asked)
    assert "KN103" in diagnosis.rules
    assert len(diagnosis.rules) <= 2


def test_ignore_and_prefixes():
    everything = set(own_rules())
    assert set(diagnose(network(), select="KN1").rules) <= {name for name in everything if name.startswith("KN1")}
    diagnosis = diagnose(network(), ignore=["KN10", "at-the-output"])
    assert not {"KN101", "KN103", "KN113"} & {*diagnosis.rules, *diagnosis.skipped}
    assert "KN111" in diagnosis.rules


def test_where():
    diagnosis = diagnose(network(), where="3")
    assert (diagnosis.layers, found(diagnosis)) == (("3",), [("KN113", "3")])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module; got 3"),
        ({"model": nn.Linear(3, 3)}, ValueError, "there is no batch norm in Linear; torch.nn's, keelnorm's and those"),
        ({"model": nn.LazyBatchNorm1d()}, ValueError, "has no shape yet; run the lazy model once first"),
        ({"batches": []}, ValueError, "batches is empty. Pass a list of batches or a DataLoader"),
        ({"batches": torch.zeros(2, 3)}, TypeError, "batches must be an iterable of batches; got a float32 tensor"),
        ({"batches": {"x": torch.zeros(2, 3)}}, TypeError, r"got a mapping, which is one. Pass \[batch\]"),
        ({"batches": 7}, TypeError, "batches must be an iterable of batches; got 7"),
        ({"batches": [7]}, RuntimeError, "a batch must be a tensor, a tuple or list that begins with one"),
        (
            {"batches": [torch.zeros(2, 9, 3, 3)]},
            RuntimeError,
            "the model raised on the first batch: RuntimeError: .*9",
        ),
        ({"example": torch.zeros(2, 9, 3, 3)}, RuntimeError, "the model raised on the example: RuntimeError: "),
        ({"example": 7}, TypeError, "example must be a tensor"),
        ({"batches": images(), "max_batches": 0}, ValueError, "max_batches must be None or a positive integer"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch.optim.Optimizer; got 0.1"),
        ({"select": "KN999"}, ValueError, "select names 'KN999', which is no rule. There are KN101 bias-in-front, "),
        ({"select": 3}, TypeError, "select takes names of rules, as a string or a list; got 3"),
        ({"ignore": "bias"}, ValueError, "ignore names 'bias', which is no rule"),
        ({"select": "KN101", "ignore": "KN1"}, ValueError, "no rule is left of select='KN101' and ignore='KN1'"),
        ({"where": "layer9"}, ValueError, "where='layer9' matches no batch norm. The model's are: '1', '3'"),
        ({"silence": {"KN999": "*"}}, ValueError, "silence names 'KN999', which is no rule"),
        ({"silence": {"KN101": 3}}, TypeError, "silence takes rules and patterns for paths"),
        ({"baseline": "gone.json"}, FileNotFoundError, "there is no baseline gone.json; diagnosis.write_baseline"),
    ],
)
def test_errors_say_what_to_do(arguments, error, says):
    arguments = {"model": network(), **arguments}
    with pytest.raises(error, match=f"^diagnose: .*{says}"):
        diagnose(**arguments)


def test_a_model_that_needs_keywords():
    with pytest.raises(
        RuntimeError, match=r"Twice.forward\(\) .* A batch is a tensor, .* or a mapping of its keywords"
    ):
        diagnose(Twice(), [torch.zeros(2, 3, 4)])
    batch = {"left": torch.zeros(2, 3, 4), "right": torch.zeros(2, 3, 4)}
    for given in ({"batches": [batch]}, {"example": batch}):
        diagnosis = diagnose(Twice(), **given)
        assert diagnosis.notes == ["Not called in the run: idle."]
        assert diagnosis.layers == ("shared", "idle")
        assert not diagnosis.findings  # each bias counts, since both calls share the running statistics


def test_batches_of_another_kind():
    def forward(model, batch):
        return model(left=batch[0], right=batch[1])

    batch = ("two tensors", torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    diagnosis = diagnose(Twice(), [batch], forward=lambda model, batch: forward(model, batch[1:]))
    assert diagnosis.layers == ("shared", "idle")


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_labels_and_any_number_of_samples(samples):
    batches = [(torch.zeros(samples, 3, 5, 5), torch.zeros(samples, dtype=torch.long))]
    assert found(diagnose(network(), batches)) == [("KN103", "1"), ("KN101", "1"), ("KN113", "3")]


def test_a_model_that_takes_only_whole_batches():
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(4, 3, 5, 5))

    assert ("KN101", "1") in found(diagnose(Fixed(*network()), images(4)))


def test_an_iterator_is_taken_from_once():
    taken: list[int] = []

    def endless():
        while True:
            taken.append(len(taken))
            yield torch.randn(2, 3, 5, 5)

    diagnose(network(), endless(), select="KN1")
    assert len(taken) == 1


def test_an_iterator_can_be_recalibrated_with():
    model = network().eval()
    model[3].running_mean[0] = float("nan")
    diagnosis = diagnose(model, iter(images(4, 3)), fix=True, select="KN109")
    assert [one.done for one in diagnosis.fixed] == ["its running statistics were set to those of 3 batches"]
    assert model[3].running_mean.isfinite().all()


class Halfway(nn.Module):
    """Raises in the middle, and looks at random numbers before."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.drop(self.norm(x + torch.randn_like(x)))
        random.random()
        np.random.rand()
        self.norm.running_mean += 1
        raise KeyError("no such thing")


@pytest.mark.parametrize("training", [True, False])
def test_everything_is_as_before_after_an_exception(training):
    model = Halfway().train(training)
    model.drop.eval()
    model.last.train()
    handle = model.norm.register_forward_hook(lambda *_: None)
    model.norm.weight.grad = torch.ones(3)
    case = kn.doctor.Case(model, optimizer=torch.optim.Adam(model.parameters()))
    before = fingerprint(case)
    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
        diagnose(model, [torch.zeros(2, 3)], optimizer=case.optimizer)
    assert fingerprint(case) == before
    handle.remove()


def test_a_loader_draws_no_random_numbers_of_the_user():
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 5, 5))
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    case = kn.doctor.Case(network())
    before = fingerprint(case)
    diagnose(case.model, loader)
    assert fingerprint(case) == before


def test_a_fault_that_makes_the_model_raise_is_found():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    model[0].running_var = None
    diagnosis = diagnose(model, [torch.zeros(2, 3)])
    assert [(one.rule, one.severity) for one in diagnosis.findings] == [("KN105", "error")]
    assert diagnosis.notes[0].startswith("The model raised on the first batch: ")


def test_a_failure_elsewhere_is_not_the_layers():
    """The input is wrong, and the batch norm without statistics was not reached."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(RuntimeError, match="the model raised on the first batch: RuntimeError: mat1 and mat2"):
        diagnose(model, [torch.zeros(2, 9)])
    diagnosis = diagnose(model, [torch.zeros(1, 3)])
    assert [(one.rule, one.severity) for one in diagnosis.findings] == [
        ("KN105", "error"), ("KN101", "info"), ("KN113", "info"),
    ]  # fmt: skip


def test_a_rule_that_raises_is_named_and_the_others_run(monkeypatch):
    def broken(evidence):
        raise ZeroDivisionError("by zero")

    rules = dict(own_rules())
    rules["KN103"] = replace(rules["KN103"], check=broken)
    monkeypatch.setattr("keelnorm.doctor.known_rules.own_rules", lambda: rules)
    diagnosis = diagnose(network(), images())
    assert diagnosis.skipped["KN103"] == "it raised ZeroDivisionError: by zero"
    assert ("KN101", "1") in found(diagnosis)
    assert "Not run: KN103 (it raised ZeroDivisionError: by zero)." in str(diagnosis)


@pytest.mark.parametrize("wrap", ["DataParallel", "compile", "AveragedModel"])
def test_wrappers(wrap):
    wrapped = {
        "DataParallel": nn.DataParallel,
        "compile": lambda model: torch.compile(model, backend="eager"),
        "AveragedModel": torch.optim.swa_utils.AveragedModel,
    }[wrap](network())
    diagnosis = diagnose(wrapped, images())
    prefix = "_orig_mod." if wrap == "compile" else "module."
    assert found(diagnosis) == [("KN103", f"{prefix}1"), ("KN101", f"{prefix}1"), ("KN113", f"{prefix}3")]
    remedy = "\n".join(line for one in diagnosis.findings for line in one.remedy)
    exec(remedy, {"model": wrapped, "kn": kn, "nn": nn, "torch": torch})
    assert not diagnose(wrapped, images()).findings


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network()).train()
        wrapped.module[3].eval()
        diagnosis = diagnose(wrapped, images())
    finally:
        torch.distributed.destroy_process_group()
    assert found(diagnosis)[:2] == [("KN103", "module.1"), ("KN107", "module.3")]
    assert diagnosis.findings[2].severity == "info"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model():
    with pytest.raises(TypeError, match="diagnose: the model is a ScriptModule, whose layers can't be seen"):
        diagnose(torch.jit.script(network()))


def test_converted_models_are_seen_as_before():
    plain = diagnose(network(), images())
    converted = diagnose(kn.convert(network())[0], images())
    assert found(converted) == found(plain)
    assert "kn.BatchNorm2d '1' has momentum 0.99" in converted.findings[0].message


def test_layers_of_other_packages(monkeypatch):
    load(monkeypatch)
    frozen = sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d(4)
    act = sys.modules["timm.layers.norm_act"].BatchNormAct2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen, nn.Conv2d(4, 4, 1), act, nn.Conv2d(4, 2, 1)).eval()
    frozen.running_var[0] = -1.0
    act.momentum = 1.0
    diagnosis = diagnose(model, images())
    assert diagnosis.layers == ("1", "3")
    assert [one for one in found(diagnosis) if one[0] in ("KN103", "KN109")] == [("KN109", "1"), ("KN103", "3")]


def test_classes_that_are_not_known_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.running_mean, self.running_var = nn.Buffer(torch.zeros(3)), nn.Buffer(torch.ones(3))

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"there is no batch norm in Odd. .*is not known.*kn.surgery.register\(Odd"):
        diagnose(Odd())
    assert "is not known" in diagnose(nn.Sequential(Odd(), nn.BatchNorm1d(3))).notes[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    diagnosis = diagnose(network().to(dtype), [batch.to(dtype) for batch in images()])
    assert ("KN103", "1") in found(diagnosis)


def test_a_single_layer():
    layer = nn.BatchNorm2d(3, momentum=0.99)
    diagnosis = diagnose(layer, [torch.zeros(2, 3, 4, 4)])
    assert found(diagnosis) == [("KN103", "")]
    exec("\n".join(diagnosis.findings[0].remedy), {"model": layer})
    assert layer.momentum == 0.01


def test_the_meta_device_has_no_values():
    with torch.device("meta"):
        model = network()
    assert ("KN103", "1") in found(diagnose(model))


def test_it_says_what_is_not_known_without_a_run():
    assert diagnose(Twice()).notes == [
        "What stands beside 2 of 2 batch norms is not known: batches= or example= show it."
    ]
    assert diagnose(network()).notes == []


def test_a_copy_is_diagnosed_alike():
    model = network()
    assert diagnose(model).to_dict() == diagnose(copy.deepcopy(model)).to_dict()
