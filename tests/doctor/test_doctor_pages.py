"""The pages of a diagnosis and of a monitor: what they show, and that they load nothing."""

from __future__ import annotations

import pytest
import torch
from support import browser
from torch import nn

import keelnorm as kn
from keelnorm.doctor.pages.diagnosis_page import diagnosis_document
from keelnorm.doctor.pages.record_page import _shared_beginning, record_document


def network(depth=5):
    torch.manual_seed(0)
    parts = []
    for channels in (3, *(8,) * (depth - 1)):
        parts += [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def batches(number=3):
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 8, 8), torch.randint(2, (16,))) for _ in range(number)]


def ailing():
    """A model whose name and layers would be markup in a page."""
    model = network()
    model.train()
    with torch.no_grad():
        for _ in range(20):
            for x, _ in batches():
                model(x)
    model[4].running_mean.add_(4.0)
    return nn.ModuleDict({"<b>body": model})


def forward(model, batch):
    return model["<b>body"](batch[0])


def loss(model, batch):
    return nn.functional.cross_entropy(forward(model, batch), batch[1])


def diagnosis():
    return kn.diagnose(ailing(), batches(), forward=forward, loss=loss)


def test_what_the_page_of_a_diagnosis_shows():
    found = diagnosis()
    document = diagnosis_document(found)
    first = document["findings"][0]
    assert (first["rule"], first["severity"]) == ("KN201", "warning")
    assert first["remedy"] == "\n".join(found.findings[0].remedy)
    [section] = document["sections"]
    changes, gradients = section["figures"]
    assert [series["label"] for series in changes["series"]] == [
        "running statistics", "statistics of one batch", "statistics of 16 samples",
    ]  # fmt: skip
    facts = {one["path"]: one for one in found.facts}
    drifts = [one["drift"] or None for one in found.facts]
    assert changes["series"][0]["y"] == drifts
    assert drifts.index(max(filter(None, drifts))) == 1
    assert gradients["series"][0]["y"] == [one["gradient"] for one in found.facts]
    assert section["answer"].startswith("The running statistics of ")
    assert "most in <b>body.4" in section["answer"]
    [table] = section["tables"]
    row = table["rows"][1]
    assert row[:2] == ["2", "<b>body.4"]
    assert row[2].startswith("KN201 drifted-statistics")
    assert row[3] == f"{facts['<b>body.4']['drift']:.3g}"


def test_a_page_without_data():
    document = diagnosis_document(kn.diagnose(network()))
    [section] = document["sections"]
    assert section["figures"] == []
    assert section["answer"] == "Nothing was measured: batches show drift and noise."
    assert any(note.startswith("Not run: ") for note in document["notes"])


def followed():
    model = network()
    monitor = kn.Monitor(model, 2, select="KN109")

    def train():
        with monitor:
            for index in range(10):
                model[1].running_var[0] = float("inf") if index > 4 else 1.0
                x, y = batches(1)[0]
                nn.functional.cross_entropy(model(x), y).backward()

    with pytest.warns(kn.doctor.MonitorWarning):
        train()
    return monitor


def test_what_the_page_of_a_monitor_shows():
    monitor = followed()
    document = record_document(monitor)
    assert [(one["rule"], one["since"]) for one in document["findings"]] == [("KN109", 8)]
    sections = {one["name"]: one for one in document["sections"]}
    assert list(sections) == ["drift", "noise", "gradient", "weights", "gamma"]
    course, by_layer = sections["noise"]["figures"]
    assert course["series"][0]["x"] == [2, 4, 6, 8, 10]
    noise = [[one.layers[path].noise for path in one.layers] for one in monitor.observations]
    assert course["series"][0]["y"] == [sorted(row)[2] for row in noise]
    assert course["series"][0]["high"] == [max(row) for row in noise]
    assert [series["label"] for series in by_layer["series"]] == ["13", "10", "7", "4", "1"]
    assert by_layer["series"][-1]["y"] == [row[0] for row in noise]
    assert sections["noise"]["tables"][0]["rows"][0] == ["1", f"{noise[0][0]:.3g}", f"{noise[-1][0]:.3g}"]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("keelnorm.engine.optional_imports.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"write_page: a page needs jinja2, plotly: .*pip install"):
        kn.diagnose(network()).write_page(tmp_path / "doctor.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(browser.EXECUTABLE is None, reason=browser.MISSING)
def test_in_a_browser(tmp_path):
    diagnosis().write_page(tmp_path / "doctor.html")
    followed().write_page(tmp_path / "monitor.html")
    with browser.opened() as view:
        for name in ("doctor.html", "monitor.html"):
            for width in (1280, 390):
                view.open(tmp_path / name, width)
                assert view.problems == []
                assert view.requests.pop().startswith("file:")
                assert view.requests == []
                assert view.evaluate("document.documentElement.scrollWidth") <= width
                assert view.evaluate("[...document.querySelectorAll('.plot')].every(one => one.querySelector('svg'))")
            assert view.evaluate("document.querySelector('.finding .severity').textContent") in ("warning", "error")
            assert view.evaluate("document.querySelector('.finding b')") is None


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["body.a.bn", "body.b.bn"], "body."),
        (["body.stage1.bn", "body.stage2.bn"], "body."),
        (["body.bn1", "body.bn2"], "body."),
        (["body.bn1", "bn2"], ""),
        (["1", "4"], ""),
        (["body.bn"], ""),
        ([""], ""),
    ],
)
def test_what_all_names_begin_with(paths, wanted):
    assert _shared_beginning(paths) == wanted
