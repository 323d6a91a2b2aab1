"""Which kernels run, and forcing them: as a call, for a block, nested, through exceptions."""

from __future__ import annotations

import re

import pytest
import torch
from support.forcing import (
    BFLOAT16_KERNELS,
    INSTRUCTION_SETS,
    KERNELS,
    ROOT,
    check_ran,
    require_kernel,
    usable_native,
)

import keelnorm as kn
from keelnorm.engine.kernels.registry import Kernel


def which_ran():
    """The kernels that a layer runs on now."""
    before = kn.kernels.calls()
    layer = kn.BatchNorm(3)
    layer(torch.randn(4, 3)).sum().backward()
    return {name for name, count in kn.kernels.calls().items() if count != before[name]}


def two_kernels():
    """The reference, and native kernels that float32 tensors on the CPU can run on."""
    require_kernel("baseline")
    return "reference", usable_native()[0]


def best():
    return [kernel.name for kernel in kn.kernels.available() if kernel.usable][-1]


def test_the_best_are_in_use_unless_others_are_forced():
    require_kernel("baseline")
    kn.kernels.use("auto")
    assert kn.kernels.active() == best()
    assert which_ran() == {usable_native()[-1]}  # of float32


def test_available_lists_each_once_with_a_note():
    names = [kernel.name for kernel in kn.kernels.available()]
    assert names[0] == "reference"
    assert len(set(names)) == len(names)
    assert all(kernel.note for kernel in kn.kernels.available())
    assert set(names) <= {*KERNELS, *BFLOAT16_KERNELS, "native", "triton"}


def test_every_listed_instruction_set_has_its_flags():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    flags = {"baseline", *re.findall(r'INSTRUCTION_SETS\["(\w+)"\] =', setup)}
    assert flags == set(INSTRUCTION_SETS), "INSTRUCTION_SETS in setup.py and csrc/instruction_sets.h differ"


def test_as_a_call_it_lasts():
    for name in two_kernels():
        kn.kernels.use(name)
        assert kn.kernels.active() == name
        assert which_ran() == {name}


def test_as_a_block_it_ends_with_it(kernel):
    kn.kernels.use("auto")
    best = kn.kernels.active()
    with kn.kernels.use(kernel):
        assert kn.kernels.active() == kernel
        assert which_ran() == {kernel}
    assert kn.kernels.active() == best


def test_nested_blocks_end_one_by_one():
    outer, inner = two_kernels()
    with kn.kernels.use(outer):
        with kn.kernels.use(inner):
            with kn.kernels.use("auto"):
                assert kn.kernels.active() == best()
            assert kn.kernels.active() == inner
            assert which_ran() == {inner}
        assert kn.kernels.active() == outer
        assert which_ran() == {outer}


def test_a_call_inside_a_block_ends_with_the_block():
    outer, inner = two_kernels()
    kn.kernels.use("auto")
    with kn.kernels.use(outer):
        kn.kernels.use(inner)
        assert kn.kernels.active() == inner
    assert kn.kernels.active() == best()


def test_an_exception_ends_the_block_and_passes():
    outer, inner = two_kernels()
    kn.kernels.use(outer)
    with pytest.raises(ZeroDivisionError), kn.kernels.use(inner):
        1 / 0  # noqa: B018 - raises
    assert kn.kernels.active() == outer
    assert which_ran() == {outer}


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "native", None, 2])
def test_an_illegal_name_changes_nothing(kernel, name):
    with pytest.raises(ValueError, match="can't be used") as raised:
        kn.kernels.use(name)
    message = str(raised.value)
    assert repr(name) in message
    usable = [kernel.name for kernel in kn.kernels.available() if kernel.usable]
    assert all(legal in message for legal in [*usable, "'auto'"])
    assert kn.kernels.active() == kernel
    assert which_ran() == {kernel}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_runs_on_what_is_forced(kernel, dtype):
    """With parameters and moments of x's dtype, and of float32."""
    for layer in (kn.BatchNorm(3, dtype=dtype), kn.BatchNorm(3)):
        for inplace in (False, True):
            before = kn.kernels.calls()
            x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
            layer(x * 1, activation="leaky_relu", inplace=inplace).sum().backward()
            check_ran(kernel, before, kn.kernels.calls())


def test_what_the_native_kernels_decline_runs_on_the_reference():
    with kn.kernels.use(two_kernels()[1]):
        before = kn.kernels.calls()
        kn.BatchNorm(3)(torch.randn(4, 3), torch.randn(4, 3, dtype=torch.float64))
        check_ran("reference", before, kn.kernels.calls())


# ---- what the suites rely on


def test_a_forced_kernel_that_did_not_run_is_a_failure():
    before = {"reference": 3, "baseline": 7}
    check_ran("baseline", before, {"reference": 3, "baseline": 8})
    with pytest.raises(pytest.fail.Exception, match="'baseline' were forced, but did not run"):
        check_ran("baseline", before, {"reference": 4, "baseline": 7})
    with pytest.raises(pytest.fail.Exception, match="others ran too"):
        check_ran("baseline", before, {"reference": 4, "baseline": 8})


def test_a_kernel_that_cannot_run_is_a_skip_with_its_reason(monkeypatch):
    listed = [Kernel("reference", True, ""), Kernel("baseline", True, ""), Kernel("avx512", False, "not this machine")]
    monkeypatch.setattr(kn.kernels, "available", lambda: listed)
    monkeypatch.setenv("KEELNORM_NATIVE", "1")
    require_kernel("baseline")
    with pytest.raises(pytest.skip.Exception, match="avx512: not this machine"):
        require_kernel("avx512")
    with pytest.raises(pytest.skip.Exception, match="avx2: not compiled"):
        require_kernel("avx2")


def test_a_library_that_is_missing_is_a_failure_where_it_is_required(monkeypatch):
    listed = [Kernel("reference", True, ""), Kernel("native", False, "the library is missing")]
    monkeypatch.setattr(kn.kernels, "available", lambda: listed)
    monkeypatch.delenv("KEELNORM_NATIVE", raising=False)
    require_kernel("reference")
    with pytest.raises(pytest.skip.Exception, match="avx2: the library is missing"):
        require_kernel("avx2")
    monkeypatch.setenv("KEELNORM_NATIVE", "1")
    with pytest.raises(pytest.fail.Exception, match=r"KEELNORM_NATIVE=1 requires .* the library is missing"):
        require_kernel("avx2")
