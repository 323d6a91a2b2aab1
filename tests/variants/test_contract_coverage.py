"""Every variant that is public takes part in the contract suite."""

from __future__ import annotations

from variants.collected import VARIANTS

import keelnorm as kn
from keelnorm.nn._shared.variant import Variant

#: Has tests of its own in tests/recurrent: its input is one time step.
ELSEWHERE = {"StepwiseBatchNorm"}


def test_every_variant_has_a_case() -> None:
    public = {kind for name in kn.nn.__all__ if isinstance(kind := getattr(kn.nn, name), type)}
    tried = {type(variant.make(3)) for variant in VARIANTS}
    names = {kind.__name__ for kind in public if issubclass(kind, Variant)}
    assert not names - {kind.__name__ for kind in tried} - ELSEWHERE, "these have no case in tests/variants/cases_*.py"
