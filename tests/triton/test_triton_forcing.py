"""The kernels that run on a device, the warning where they are missing, and the operators under torch.compile."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

import keelnorm as kn
from keelnorm.engine import ops
from keelnorm.engine.kernels import registry, triton


def test_they_are_listed_with_what_speaks_against_them(monkeypatch):
    (listed,) = (kernel for kernel in kn.kernels.available() if kernel.name == "triton")
    assert listed.usable == (triton.unusable() is None)
    assert listed.note
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    (listed,) = (kernel for kernel in kn.kernels.available() if kernel.name == "triton")
    assert (listed.usable, listed.note) == (False, "Triton is not installed")
    with pytest.raises(ValueError, match="'triton' can't be used \\(Triton is not installed\\)"):
        kn.kernels.use("triton")
    with pytest.raises(RuntimeError, match="autotune: there are no kernels to time: Triton is not installed"):
        kn.kernels.autotune()
    assert kn.kernels.active("cuda") == "reference"
    assert kn.kernels.chosen_by("cuda") == "Triton is not installed"


def test_without_triton_it_is_said_once(monkeypatch):
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    monkeypatch.setattr(registry, "_announced", set())
    with pytest.warns(RuntimeWarning, match="slower: Triton is not installed. Install Triton"):
        registry.announce_fallback("cuda")
    registry.announce_fallback("cuda")


def test_other_devices_run_on_the_reference_back_end():
    assert kn.kernels.active("meta") == "reference"
    assert registry.operators(torch.empty(2, 3, device="meta")) is None


def test_float64_goes_to_the_reference_back_end_and_that_is_said_once(monkeypatch, caplog):
    if triton.missing() is not None:
        pytest.skip(triton.missing())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(registry, "_announced", set())
    with kn.kernels.use("triton"):
        assert kn.kernels.active() == "triton"
        assert registry.operators(torch.empty(2, 3, dtype=torch.float64)) is None
        before = kn.kernels.calls()
        kn.BatchNorm1d(3).double()(torch.randn(5, 3, dtype=torch.float64))
        assert kn.kernels.calls()["reference"] > before["reference"]
    assert [each.getMessage() for each in caplog.records] == [
        "Triton's kernels do not take torch.float64: the reference back end runs, which is slower"
    ]
    assert kn.kernels.active() != "triton"


def test_compiled_code_gets_torchs_own_operators_unless_they_are_forced():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not registry.in_compiled_code(cuda)
    assert registry.in_compiled_code(cpu) == (kn.kernels.active() != "reference")
    assert not registry.in_compiled_code(torch.device("meta"))


def test_every_operator_is_there_with_the_arguments_of_its_schema():
    if triton.missing() is not None:
        pytest.skip(triton.missing())
    module = triton.load()
    for name in ops.ON_GPUS:
        schema = getattr(torch.ops.keelnorm, name).default._schema
        given = inspect.signature(getattr(module, name)).parameters
        assert list(given) == [{"num_batches_tracked": "batches"}.get(a.name, a.name) for a in schema.arguments], name
        optional = {parameter.name for parameter in given.values() if parameter.default is not parameter.empty}
        assert optional == {argument.name for argument in schema.arguments if argument.has_default_value()}, name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"keelnorm::{name}", "CUDA")


def test_keelnorm_imports_no_triton():
    code = "import sys, keelnorm; print([name for name in sys.modules if name.partition('.')[0] == 'triton'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_environment_forces_them():
    if triton.missing() is not None:
        pytest.skip(triton.missing())
    code = (
        "import json, torch, keelnorm as kn; kn.BatchNorm1d(3)(torch.randn(4, 3));"
        "print(json.dumps([kn.kernels.active(), kn.kernels.chosen_by(), kn.kernels.calls()['triton']]))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "KEELNORM_KERNELS": "triton"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    name, why, calls = json.loads(run.stdout)
    assert (name, calls) == ("triton", 1)
    assert "KEELNORM_KERNELS" in why
