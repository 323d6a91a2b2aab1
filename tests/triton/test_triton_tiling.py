"""Cuts of tensors: every value is in one tile of one program, within a GPU's limits; and their explanation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import keelnorm as kn
from keelnorm.engine.kernels.triton import availability, tiling
from keelnorm.engine.kernels.triton.tiling import View

SIZES = st.integers(1, 3000)
VIEWS = st.builds(View, SIZES, SIZES, SIZES, st.booleans())
ITEMSIZES = st.sampled_from([2, 4])
PROCESSORS = st.sampled_from([1, 4, 132])


def is_power(number):
    return number > 0 and number & (number - 1) == 0


@given(VIEWS)
def test_value_by_value_every_row_and_column_is_in_one_program(view):
    cut = tiling.elementwise(view)
    assert is_power(cut.a)
    assert is_power(cut.b)
    assert (cut.blocks - 1) * cut.a < view.rows <= cut.blocks * cut.a
    assert (cut.splits - 1) * cut.b < view.columns <= cut.splits * cut.b
    assert cut.splits <= tiling.MANY_PROGRAMS
    assert cut.a * cut.b <= tiling.TILE


@given(VIEWS, ITEMSIZES, PROCESSORS)
def test_a_reduction_has_every_tile_in_one_split_and_adds_few_floats(view, itemsize, processors):
    cut = tiling.reduction(view, itemsize, processors)
    assert (cut.splits - 1) * cut.per_program < cut.tiles <= cut.splits * cut.per_program
    assert cut.per_program <= tiling.ADDED_IN_FLOAT
    assert cut.a * cut.b <= tiling.TILE
    if view.last:
        assert cut.tiles * cut.a >= view.values
        assert (cut.blocks - 1) * cut.b < view.c <= cut.blocks * cut.b
    else:
        down, across = -(-view.n // cut.a), -(-view.s // cut.b)
        assert (cut.tiles, cut.blocks) == (down * across, view.c)


@given(VIEWS, ITEMSIZES)
def test_on_chip_a_program_holds_all_values_of_its_channels(view, itemsize):
    cut = tiling.on_chip(view, itemsize, tiling.FORWARD_ON_CHIP)
    if cut is None:
        least = min(tiling.power_of_two(view.c), tiling.SECTOR // itemsize)
        held = tiling.power_of_two(view.values) * least
        if not view.last:
            held = tiling.power_of_two(view.n) * tiling.power_of_two(view.s)
        assert held > tiling.FORWARD_ON_CHIP
        return
    assert cut.a * cut.b <= tiling.FORWARD_ON_CHIP
    assert cut.a >= (view.values if view.last else view.n)
    assert view.last or cut.b >= view.s
    assert cut.blocks * (cut.b if view.last else 1) >= view.c


def test_more_multiprocessors_mean_more_splits():
    view = View(256, 64, 56 * 56, True)
    few, many = (tiling.reduction(view, 2, count) for count in (16, 132))
    assert few.splits < many.splits
    assert many.blocks * many.splits > 3 * 132


def test_a_tensor_of_two_billion_values_has_wide_offsets():
    assert View(256, 2048, 64 * 64, False).wide
    assert not View(256, 64, 56 * 56, False).wide


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_explain_says_which_path_and_why(layout):
    small = kn.kernels.explain((8, 64, 7, 7), torch.bfloat16, layout, device="cuda")
    large = kn.kernels.explain((256, 64, 112, 112), torch.bfloat16, layout, device="cuda")
    if small.kernels == "reference":
        pytest.skip(small.why)
    assert small.kernels == large.kernels == "triton"
    assert "on chip" in small.details[0]
    assert "392 values" in small.details[0]
    assert "two passes" in large.details[0]
    assert "fixed order" in large.details[1]
    assert str(small).startswith("triton: ")


def test_explain_says_why_the_reference_runs():
    if kn.kernels.active("cuda") == "reference":
        pytest.skip(kn.kernels.chosen_by("cuda"))
    assert kn.kernels.explain((2, 3), torch.float64, device="cuda").kernels == "reference"
    assert "float64" in kn.kernels.explain((2, 3), torch.float64, device="cuda").why
    assert kn.kernels.explain((0, 3), device="cuda").why == "it has no values"
    with kn.kernels.use("reference"):
        assert "forced" in kn.kernels.explain((2, 3), device="cuda").why


def test_explain_on_the_cpu_is_what_runs_there():
    found = kn.kernels.explain((2, 3, 4, 4), device="cpu")
    assert found.kernels == kn.kernels.active()
    assert found.why == kn.kernels.chosen_by()


def test_explain_refuses_what_is_no_tensor():
    with pytest.raises(ValueError, match=r"layout must be one of \('contiguous', 'channels_last'\); got 'nchw'"):
        kn.kernels.explain((2, 3), layout="nchw")
    for shape in ((3,), (2, -1)):
        with pytest.raises(ValueError, match="two sizes or more from 0 on"):
            kn.kernels.explain(shape)


def test_wide_offsets_are_said():
    view = View(1024, 512, 4096, True)
    assert availability.in_words(view, availability.by_rule(view, 2, 132))[-1] == "offsets are 64 bits wide"
