"""KEELNORM_KERNELS, and keelnorm without the native library, each in a new process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.forcing import KERNELS, require_kernel, usable_native
from support.fresh import Scenario, run_fresh

import keelnorm as kn

#: Runs layers, and tells what ran, what was warned of, and how far the results are from torch's.
REPORT = """
import json, warnings, torch
import torch.nn.functional as F
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import keelnorm as kn
    kn.functional.batch_norm(torch.randn(4, 3, device="meta"), None, None, training=True)  # never native
    early = len(caught)
    before, errors = kn.kernels.calls(), []
    for _ in range(3):
        x = torch.randn(4, 3, 5)
        layer, other = kn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
        errors.append((layer(x, activation="relu") - other(x).relu()).abs().max().item())
print(json.dumps({
    "active": kn.kernels.active(),
    "file": kn.__file__,
    "ran": [name for name, count in kn.kernels.calls().items() if count != before[name]],
    "available": [(kernel.name, kernel.usable, kernel.note) for kernel in kn.kernels.available()],
    "early": early,
    "warnings": [(warning.category.__name__, str(warning.message)) for warning in caught],
    "error": max(errors),
}))
"""


def copy_of_the_package(folder, *, library=None, reason=None):
    """keelnorm's Python sources in ``folder``, with other bytes for the native library, or none."""
    package = Path(folder, "keelnorm")
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "not_built.txt", "csrc")
    shutil.copytree(Path(kn.__file__).parent, package, ignore=left_out)
    if library is not None:
        (package / "engine/kernels/cpu/libkeelnorm.so").write_bytes(library)
    if reason is not None:
        (package / "engine/kernels/cpu/not_built.txt").write_text(reason)
    return str(folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    without, broken = (tmp_path_factory.mktemp(name) for name in ("without", "broken"))
    copy_of_the_package(without, reason="there was no compiler\n")
    copy_of_the_package(broken, library=b"no library")
    scenarios = {name: Scenario(REPORT, {"KEELNORM_KERNELS": name}) for name in (*KERNELS, "auto", "", "sse9")}
    scenarios["unset"] = Scenario(REPORT)
    scenarios["without"] = Scenario(REPORT, folder=str(without))
    scenarios["without, reference"] = Scenario(REPORT, {"KEELNORM_KERNELS": "reference"}, str(without))
    scenarios["without, avx2"] = Scenario(REPORT, {"KEELNORM_KERNELS": "avx2"}, str(without))
    scenarios["broken"] = Scenario(REPORT, folder=str(broken))
    return run_fresh(scenarios)


def report_of(outcome):
    assert outcome.status == 0, outcome.errors
    return json.loads(outcome.output)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_variable_forces_kernels(outcomes, name):
    require_kernel(name)
    report = report_of(outcomes[name])
    assert report["active"] == name
    assert report["ran"] == [name]
    assert report["warnings"] == []
    assert report["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "", "unset"])
def test_without_a_choice_the_best_run(outcomes, name):
    usable = [kernel.name for kernel in kn.kernels.available() if kernel.usable]
    report = report_of(outcomes[name])
    assert report["active"] == usable[-1]
    assert report["ran"] == [usable_native()[-1] if usable_native() else "reference"]  # of float32


@pytest.mark.slow
def test_an_illegal_value_is_an_error(outcomes):
    outcome = outcomes["sse9"]
    assert outcome.status == 1
    assert "ValueError: kernels 'sse9' can't be used" in outcome.errors
    assert all(kernel.name in outcome.errors for kernel in kn.kernels.available() if kernel.usable)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("without", "it was not built when keelnorm was installed (there was no compiler)"),
        ("broken", "it does not load into this torch: "),
    ],
)
def test_without_the_library_the_reference_runs_and_says_so_once(outcomes, name, reason):
    report = report_of(outcomes[name])
    assert Path(report["file"]) != Path(kn.__file__)
    assert report["ran"] == ["reference"]
    assert report["error"] < 1e-5
    assert report["early"] == 0
    ((category, message),) = report["warnings"]
    assert category == "RuntimeWarning"
    assert reason in message
    assert "KEELNORM_KERNELS=reference" in message
    (reference, native, triton) = report["available"]
    assert reference[:2] == ["reference", True]
    assert native[:2] == ["native", False]
    assert reason in native[2]
    assert triton[0] == "triton"


@pytest.mark.slow
def test_without_the_library_a_choice_of_the_reference_is_silent(outcomes):
    report = report_of(outcomes["without, reference"])
    assert report["ran"] == ["reference"]
    assert report["warnings"] == []


@pytest.mark.slow
def test_without_the_library_a_native_choice_is_an_error(outcomes):
    outcome = outcomes["without, avx2"]
    assert outcome.status == 1
    assert "kernels 'avx2' can't be used" in outcome.errors
    assert "this machine has reference" in outcome.errors
