"""Published architectures, converted and folded: right in float64, and nothing left without a reason."""

from __future__ import annotations

import pytest

from evenkeel.bench.model_check import check
from evenkeel.bench.model_run import ModelRow
from evenkeel.bench.model_zoo import ARCHITECTURES

#: Where a child is given a list, sets items of one, or a batch norm and its activation are called in different modules.
PARTLY_FUSED = {
    "DLA-34": 27 / 33,
    "HRNet-W18 small": 66 / 73,
    "NASNet-A mobile": 128 / 132,
    "DenseNet-121, 3-D": 120 / 121,
}


def test_there_are_enough():
    assert len(ARCHITECTURES) >= 25


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    one = ARCHITECTURES[name]
    if not one.is_there:
        pytest.skip(f"the package {one.package} is not installed")
    counts = check(one, 2, small=True)
    row = ModelRow(name, one.package, counts)
    assert row.is_right, counts
    assert counts["batch_norms"] > 0
    assert counts["folded"] >= counts["foldable"]
    assert counts["fused"] <= counts["fusible"]
    assert counts["fused"] == pytest.approx(counts["fusible"] * PARTLY_FUSED.get(name, 1.0))
