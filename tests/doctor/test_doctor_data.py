"""What batches show: how often the model runs, what is recorded, what stays as it was, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import keelnorm as kn
from keelnorm.doctor import Case
from keelnorm.doctor.case_check import evidence_of, fingerprint
from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.evidence import collect
from keelnorm.doctor.evidence.model_outputs import labels_of
from keelnorm.doctor.rules._examples import data_of, network, settled
from keelnorm.surgery.observation.nested_tensors import main_output


class Counting(nn.Module):
    """Counts its calls, beside the model."""

    def __init__(self):
        super().__init__()
        self.body, self.calls = network(), []

    def forward(self, x):
        self.calls.append(len(x))
        return self.body(x)


def test_the_model_runs_three_times_on_each_batch():
    model, batches = Counting(), data_of()
    kn.diagnose(model, batches)
    assert [size for size in model.calls if size == 32] == 18 * [32]
    assert [size for size in model.calls if size != 32] == [2]  # what stands beside the layers
    model.calls.clear()
    kn.diagnose(model, batches, select="KN1")
    assert model.calls == [2]


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_what_is_recorded(training):
    model = network().train(training)
    settled(model, data_of(seed=3))
    batches = data_of()
    data = evidence_of(Case(model.train(training), batches=batches)).data
    x = torch.cat(batches)
    first = model[0](x)
    for seen in (data.as_is["1"], data.true["1"]):
        torch.testing.assert_close(seen.moments.mean, first.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.moments.var, first.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-6)
    model.eval()
    behind = model[3](torch.relu(model[1](first))).double()
    torch.testing.assert_close(data.as_is["4"].moments.mean, behind.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    reference, _ = kn.recalibrate(network_like(model), batches)
    torch.testing.assert_close(data.true["4"].moments.mean.float(), reference[4].running_mean, rtol=1e-4, atol=1e-6)
    there, here = reference(x).double(), model(x).double()
    wanted = float((here - there).square().mean().sqrt() / there.std(correction=0))
    assert data.against_true.difference == pytest.approx(wanted, rel=1e-3)
    assert data.against_true.changed == float((here.argmax(1) != there.argmax(1)).double().mean())
    torch.testing.assert_close(data.as_is["1"].outputs.highest.float(), model[1](first).amax((0, 2, 3)))
    assert data.sizes == (32,) * 6
    assert data.complete


def network_like(model):
    other = network()
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model = nn.Sequential(network(), nn.Dropout(0.5)).train(training)
    case = Case(model, batches=data_of(batches=2))
    before = fingerprint(case)
    kn.diagnose(model, case.batches)
    assert fingerprint(case) == before
    model[0][3].register_forward_pre_hook(_raising, with_kwargs=True)
    before = fingerprint(case)
    with pytest.raises(RuntimeError, match="the model raised on a batch: ValueError: no more than four"):
        kn.diagnose(model, case.batches)
    assert fingerprint(case) == before


def _raising(layer, args, keywords):
    if len(args[0]) > 4:
        raise ValueError("no more than four")


def test_a_loader_that_shuffles_gives_the_same_batches_again():
    loader = DataLoader(TensorDataset(torch.cat(data_of())), batch_size=32, shuffle=True)
    data = evidence_of(Case(network(), batches=loader)).data
    assert data.is_same
    assert data.against_true is not None


def test_a_loader_with_a_generator_of_its_own_does_not():
    """Its runs can't be paired, and the outputs are not compared."""
    loader = DataLoader(
        TensorDataset(torch.cat(data_of())), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    data = evidence_of(Case(network(), batches=loader)).data
    assert not data.is_same
    assert data.against_true is None
    assert any("other batches in each pass" in note for note in kn.diagnose(network(), loader).notes)


def test_an_iterator_is_run_three_times_all_the_same():
    model, batches = network(), data_of()
    settled(model, batches, rounds=10)
    model[4].running_mean.add_(3.0)
    whole, once = (kn.diagnose(model, given, select="KN201") for given in (batches, iter(batches)))
    assert [one.layers for one in whole.findings] == [("4",)]
    assert once.to_dict()["findings"] == whole.to_dict()["findings"]


def test_max_batches():
    data = kn.diagnose(network(), data_of(), max_batches=2, select="KN212")
    assert not data.findings
    model, batches = network(), [*data_of(batches=2), torch.randn(1, 3, 8, 8)]
    assert [one.rule for one in kn.diagnose(model, batches, select="KN212").findings] == ["KN212"]
    assert not kn.diagnose(model, batches, select="KN212", max_batches=2).findings


@pytest.mark.parametrize("wrap", ["data parallel", "compiled", "converted"])
def test_wrapped_and_converted_models(wrap):
    model, batches = network(), data_of()
    settled(model, batches, rounds=10)
    model[4].running_mean.add_(3.0)
    paths = {"data parallel": "module.4", "compiled": "_orig_mod.4", "converted": "4"}
    wraps: dict[str, Any] = {
        "data parallel": nn.DataParallel,
        "compiled": lambda one: torch.compile(one, backend="eager"),
        "converted": lambda one: kn.convert(one)[0],
    }
    found = kn.diagnose(wraps[wrap](model), batches, select="KN201").findings
    assert [one.layers for one in found] == [(paths[wrap],)]


def test_half_precision_inputs_are_summed_in_more():
    layer = nn.BatchNorm1d(2).bfloat16()
    x = (torch.randn(64, 2) + 5).bfloat16()
    seen = evidence_of(Case(nn.Sequential(layer, nn.ReLU()), batches=[x])).data.true["0"].moments
    torch.testing.assert_close(seen.mean, x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(seen.var, x.double().var(0, correction=0), rtol=1e-6, atol=0)


def test_weighted_calls_are_not_judged():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = kn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x, sample_weight=torch.ones(len(x)))

    evidence = evidence_of(Case(Weighted(), batches=[torch.randn(8, 3)]))
    assert evidence.data.true == {}
    diagnosis = kn.diagnose(Weighted(), [torch.randn(8, 3)], select="KN2")
    assert diagnosis.findings == ()
    assert any("called with weights or in another shape: norm" in note for note in diagnosis.notes)


def test_what_stands_for_the_output_and_the_labels():
    class Result:
        logits = torch.ones(2, 3)

    x, y = torch.zeros(2, 3), torch.tensor([0, 2])
    assert main_output(Result()) is Result.logits
    assert main_output({"loss": torch.ones(()), "logits": x}) is x
    assert main_output((y, [x])) is x
    assert main_output("text") is None
    assert torch.equal(labels_of((x, y), 2), y)
    assert torch.equal(labels_of({"pixel_values": x, "labels": y}, 2), y)
    assert labels_of((x, y.float()), 2) is None
    assert labels_of((x, y), 3) is None
    assert labels_of(x, 2) is None


def test_fixing_recalibrates_what_has_drifted():
    model, batches = network(), data_of()
    settled(model, [3 * batch for batch in batches], rounds=10)
    diagnosis = kn.diagnose(model, batches, fix=True)
    assert {one.finding.rule for one in diagnosis.fixed} == {"KN201"}
    assert not kn.diagnose(model, batches).at_least("warning")


def test_facts_about_a_model_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU())
    assert {one.rule for one in kn.diagnose(model, data_of(), select="KN2").findings} == set()


def test_a_training_step_of_a_frozen_model_is_left_out():
    model = network().requires_grad_(False)
    diagnosis = kn.diagnose(model, [(x, torch.zeros(32).long()) for x in data_of()], loss=nn.CrossEntropyLoss())
    assert diagnosis.skipped["KN302"] == "needs a parameter that requires a gradient"


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: 1.5, "loss must return a tensor; got 1.5"),
        (lambda model, batch: model(batch), "one number that requires a gradient"),
        (lambda model, batch: model(batch).sum().detach(), "one number that requires a gradient"),
        (nn.CrossEntropyLoss(), "needs batches of input and target"),
        (3, "loss must be a module or loss"),
    ],
)
def test_a_loss_that_is_none(loss, words):
    model = network()
    case = Case(model, batches=data_of(batches=2))
    before = fingerprint(case)
    with pytest.raises((TypeError, ValueError), match=words):
        kn.diagnose(model, case.batches, loss=loss)
    assert fingerprint(case) == before


def test_a_loss_without_batches():
    with pytest.raises(ValueError, match="loss= needs batches="):
        kn.diagnose(network(), loss=nn.CrossEntropyLoss())


def test_gradients_of_the_user_stay():
    model = network()
    model(data_of()[0]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    kept = {name: id(p.grad) for name, p in model.named_parameters()}
    kn.diagnose(model, data_of(batches=1), loss=lambda one, batch: one(batch).square().mean())
    for name, parameter in model.named_parameters():
        assert id(parameter.grad) == kept[name]
        assert torch.equal(parameter.grad, before[name])


def test_rules_see_the_model_as_it_is():
    """The runs over the data and the training step change its statistics, and put them back before rules look."""
    model = network()
    settled(model, data_of(seed=3))
    evidence = evidence_while_open(model)
    for layer in evidence.layers:
        assert torch.equal(layer.module.running_mean.double(), layer.running_mean)
        assert int(layer.module.num_batches_tracked) == layer.batches


def evidence_while_open(model):
    """As rules get it, before the whole of the model is put back."""
    paths = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return collect(model, paths, batches=Batches(data_of()), loss=lambda one, batch: one(batch).square().mean())


def test_rules_that_miss_a_run_say_why():
    model = network()
    spoiled: Any = model[4]
    spoiled.momentum = -1.0  # an error, so that the diagnosis goes on
    model[3].register_forward_pre_hook(_raising, with_kwargs=True)
    diagnosis = kn.diagnose(model, data_of(batches=1))
    assert diagnosis.skipped["KN201"] == "the model raised"
