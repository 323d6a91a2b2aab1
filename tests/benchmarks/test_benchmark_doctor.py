"""Faults in a small network: those that the rules were written for are found, and every fault can be put in."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import keelnorm as kn
from benchmarks.doctor import __main__ as program
from benchmarks.doctor import figures_page, published
from benchmarks.doctor.fault import Patient
from benchmarks.doctor.put_into import norms_of
from benchmarks.doctor.scoring import accuracy, diagnosed, scored
from benchmarks.doctor.seen_faults import FAULTS as SEEN
from benchmarks.doctor.unseen_faults import FAULTS as UNSEEN

CASES = [pytest.param(fault, id=fault.name) for fault in SEEN]


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.fixture(scope="module")
def patient():
    """A network that tells colours apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        block(3, 8), nn.MaxPool2d(4), block(8, 16), nn.MaxPool2d(2), block(16, 16), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def draw():
        y = torch.randint(10, (32,), generator=generator)
        colours = torch.stack([y % 3 - 1.0, y % 4 - 1.5, y % 5 - 2.0], 1).view(32, 3, 1, 1)
        noise = torch.randn(32, 3, 32, 32, generator=generator) + 0.5 * torch.randn(32, 3, 1, 1, generator=generator)
        return colours + noise, y

    optimizer = torch.optim.SGD(kn.param_groups(model, 5e-4), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=120)
    for _ in range(120):
        x, y = draw()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    healthy = Patient(model, optimizer, [draw() for _ in range(6)], nn.CrossEntropyLoss())
    return healthy, diagnosed(healthy), [draw() for _ in range(4)]


def test_the_network_is_healthy(patient):
    healthy, before, held_out = patient
    assert not before.findings
    assert accuracy(healthy.model, held_out) > 0.5


@pytest.mark.parametrize("fault", CASES)
def test_a_fault_is_found_at_its_layer(patient, fault):
    healthy, before, held_out = patient
    state = copy.deepcopy(healthy.model.state_dict())
    one = scored(fault, "small", healthy, before, held_out, seed=3)
    assert one.rule is not None, one.said
    assert one.accuracy == accuracy(healthy.model, held_out), "the healthy one stays"
    for name, value in healthy.model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.slow
@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name) for fault in UNSEEN])
def test_a_fault_can_be_put_in(patient, fault):
    """Whether it is found is scored by ``python -m benchmarks.doctor``, and not looked at here."""
    healthy, before, held_out = patient
    one = scored(fault, "small", healthy, before, held_out, seed=3)
    assert not one.said.startswith("raised"), one.said


def test_the_page(patient):
    healthy, before, held_out = patient
    cases = [scored(fault, "small", healthy, before, held_out, seed=3).to_dict() for fault in SEEN[:3]]
    cases[2]["rule"] = None
    document = {
        "steps": 120,
        "healthy": [{"network": "small", "accuracy": 0.9, "layers": len(norms_of(healthy.model)), "findings": []}],
        "seen": cases,
    }
    text = figures_page.page(document)
    assert "| seen | 3 | 2 (67 %) |" in text
    assert "| small | 3 | 90 % | 0 | 0 | 0 |" in text
    assert "| momentum 0 | 1 |  | small |" in text


def test_a_run_goes_on_with_what_is_stored(tmp_path, monkeypatch, patient, capsys):
    healthy, *_ = patient
    data = tuple(torch.cat([batch[k] for batch in healthy.batches * 2]) for k in (0, 1))
    monkeypatch.setattr(program, "pictures", lambda folder, part, number: data)
    monkeypatch.setattr(program, "require_packages", lambda names: None)
    made = []

    def trained(name, data, steps):
        made.append(name)
        if name == "stopped":
            raise KeyboardInterrupt
        return copy.deepcopy(healthy)

    monkeypatch.setattr(program, "trained", trained)
    words = ["--data", ".", "--faults", "seen", "--each", "1", "--out", str(tmp_path / "doctor.json")]
    with pytest.raises(KeyboardInterrupt):
        program.main([*words, "--networks", "first", *["stopped"] * 33])
    made.clear()
    program.main([*words, "--networks", "first", "second", *["first"] * 32, "--page", str(tmp_path / "page.md")])
    assert made == ["second"]
    assert "first: stored" in capsys.readouterr().err
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| first | 3 |" in text
    assert "| second | 3 |" in text
    with pytest.raises(SystemExit, match="of another run"):
        program.main([*words, "--steps", "3"])


@pytest.mark.slow
def test_published_architectures(tmp_path, monkeypatch):
    """One architecture on drawn pictures: new, trained, evaluating; a run that was stopped does not begin again."""

    def drawn(folder, part, number):
        return torch.randn(number, 3, 32, 32), torch.arange(number) % 10

    monkeypatch.setattr(published, "pictures", drawn)
    out = tmp_path / "published.json"
    told: list[str] = []
    words = ["--data", str(tmp_path), "--networks", "U-Net", "--steps", "2", "--out", str(out)]
    published.main(words, told.append)
    rows = json.loads(out.read_text())
    assert [(row["state"], row["steps"]) for row in rows] == [("new", 0), ("trained", 2), ("evaluating", 2)]
    assert {row["network"] for row in rows} == {"U-Net"}
    assert len(told) == 3
    published.main(words, told.append)
    assert len(told) == 3
    page = figures_page.page({"healthy": [], "steps": 3}, rows)
    assert "Of 3 diagnoses of 1 architectures, 0 have an error and" in page
    assert "| U-Net | 18 |" in page
