"""The native kernels write all of their results, and touch nothing beside their arguments."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from support.cases import AROUND_VECTORS, DENSE, EPS, MOMENTUM, Options, make_problem
from support.forcing import NATIVE, require_kernel, usable_native
from support.fresh import Scenario, run_fresh
from support.guarded import Guarded
from support.operators import NONE, RELU
from support.poison import FRESH_DOUBLE

OPERATORS = torch.ops.keelnorm
# Planes of these lengths and as many channels; every tail of a vector, and several vectors abreast.
WIDTHS = (1, 2, *AROUND_VECTORS, 31, 33, 63, 65, 67)


def run_all(x, dy, residual, weight, bias, running_mean, running_var, y_kept=None):
    """Every native operator in its variants; all results in order."""
    batches = torch.tensor(0)
    found = []
    for activation in (NONE, RELU):
        for r in (None, residual):
            for training in (True, False):
                y, saved = OPERATORS.forward_(
                    x, r, weight, bias, running_mean, running_var, batches, training, training, MOMENTUM, EPS,
                    *activation,
                )  # fmt: skip
                kept = None if r is None or activation == NONE else (y if y_kept is None else y_kept.copy_(y))
                gradients = OPERATORS.backward(
                    dy, x, saved, weight, bias, kept, None, training, *activation, True, kept is not None, True, True
                )
                mean, _, rstd = saved
                means = torch.ones(2, x.shape[1], dtype=torch.float64)
                found += [y, saved, *(g for g in gradients if g is not None)]
                found.append(OPERATORS.apply(x, mean, rstd, weight, bias, r, *activation))
                found.append(OPERATORS.grad_stats(dy, x, mean, rstd, weight, bias, kept, None, *activation))
                found.append(OPERATORS.grad_input(dy, x, mean, rstd, weight, bias, kept, None, means, *activation))
    return [*found, OPERATORS.stats(x, None), running_mean, running_var]


def tensors_of(problem):
    """In the order of run_all, running statistics and y copied because they are written."""
    return (
        problem.x, problem.dy, problem.residual, problem.weight, problem.bias, problem.running_mean.clone(),
        problem.running_var.clone(),
    )  # fmt: skip


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("width", WIDTHS)
def test_misaligned_arguments(kernel, layout, width):
    """At every distance from an aligned address the same bits come out, and the neighbours stay as they are."""
    problem = make_problem((2, width, width), Options(activation="relu", residual=True)).laid_out(layout)
    wanted = run_all(*tensors_of(problem))
    for offset in range(16):
        guarded = [
            Guarded(tensor, layout if tensor.dim() > 1 else "contiguous", (offset + i) % 16)
            for i, tensor in enumerate((*tensors_of(problem), torch.empty_like(problem.x)))
        ]
        found = run_all(*(guard.tensor for guard in guarded))
        for i, (value, right) in enumerate(zip(found, wanted, strict=True)):
            assert torch.equal(value, right), f"result {i} at offset {offset}"
        assert all(guard.neighbours_unchanged() for guard in guarded), offset
        given = [*tensors_of(problem)[:5]]
        assert all(torch.equal(guard.tensor, tensor) for guard, tensor in zip(guarded[:5], given, strict=True))


@pytest.mark.parametrize("kernel", NATIVE, indirect=True)
@pytest.mark.parametrize("layout", DENSE)
def test_results_are_written_completely(kernel, layout):
    """Fresh memory holds NaN, or as float64 a number that is no result."""
    for width in WIDTHS:
        for shape in ((1, 3, width + 1), (3, width, 2), (2, width, width)):
            problem = make_problem(shape, Options(activation="relu", residual=True)).laid_out(layout)
            for value in run_all(*tensors_of(problem)):
                assert value.isfinite().all()
                assert (value != FRESH_DOUBLE).all()


GUARDED = """
import sys
sys.path.insert(0, {tests!r})
import keelnorm as kn
from kernels.test_memory import WIDTHS, run_all, tensors_of
from support.cases import Options, make_problem
from support.guarded import between_guard_pages

with kn.kernels.use({kernel!r}):
    for width in WIDTHS:
        for shape in ((1, 1, width), (2, width, 3), (3, width, width)):
            problem = make_problem(shape, Options(activation="relu", residual=True))
            for layout in ("contiguous", "channels_last"):
                for at_end in (True, False):
                    run_all(*(
                        between_guard_pages(t, layout if t.dim() > 1 else "contiguous", at_end=at_end)
                        for t in (*tensors_of(problem), problem.x)
                    ))
print("done")
"""
FAULT = """
import ctypes, sys, torch
sys.path.insert(0, {tests!r})
from support.guarded import between_guard_pages

x = between_guard_pages(torch.zeros(2, 3), "contiguous", at_end={at_end})
address = x.data_ptr() + (4 * x.numel() if {at_end} else -4)
print("before", flush=True)
ctypes.c_float.from_address(address).value
print("after")
"""


@pytest.fixture(scope="module")
def outcomes():
    tests = str(Path(__file__).parents[1])
    scenarios = {name: Scenario(GUARDED.format(tests=tests, kernel=name)) for name in usable_native()}
    for at_end in (True, False):
        scenarios[f"fault {at_end}"] = Scenario(FAULT.format(tests=tests, at_end=at_end))
    return run_fresh(scenarios)


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_is_read_or_written_outside_of_the_arguments(outcomes, name):
    """Before and after each of them lies a page whose access ends the process."""
    require_kernel(name)
    assert outcomes[name].errors == ""
    assert outcomes[name].output == "done\n"
    assert outcomes[name].status == 0


@pytest.mark.parametrize("at_end", [True, False])
def test_a_guard_page_does_end_the_process(outcomes, at_end):
    outcome = outcomes[f"fault {at_end}"]
    assert outcome.output == "before\n", outcome.errors
    assert outcome.status < 0


# ---- what the tests above rely on


def test_fresh_memory_is_poisoned():
    for fresh in (torch.empty(1000), torch.empty_like(torch.zeros(1000)), torch.zeros(1).new_empty(1000)):
        assert fresh.isnan().all()
    assert (torch.empty(1000, dtype=torch.float64) == FRESH_DOUBLE).all()
    assert torch.empty(1000, dtype=torch.bfloat16)[1::2].isnan().all()


@pytest.mark.parametrize("double", [False, True])
def test_fresh_memory_of_the_native_library_is_poisoned(double):
    """Through the very function that the library allocates its results with."""
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    size, stride = (ctypes.c_int64 * 1)(1000), (ctypes.c_int64 * 1)(1)
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    dtype = library.aoti_torch_dtype_float64() if double else library.aoti_torch_dtype_float32()
    device = library.aoti_torch_device_type_cpu()
    assert (
        library.aoti_torch_empty_strided(ctypes.c_int64(1), size, stride, dtype, device, 0, ctypes.byref(handle)) == 0
    )
    assert library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
    values = ((ctypes.c_double if double else ctypes.c_float) * 1000).from_address(data.value)
    fresh = torch.frombuffer(values, dtype=torch.float64 if double else torch.float32)
    assert (fresh == FRESH_DOUBLE).all() if double else fresh.isnan().all()
    assert library.aoti_torch_delete_tensor_object(handle) == 0
