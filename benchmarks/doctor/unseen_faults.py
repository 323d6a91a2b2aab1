"""Faults of batch normalization as they arise in practice, to measure what share of them the doctor finds.

They come from the literature, from forum questions, from issues and from experience, not from the doctor's rules. Each
is put in by the code that causes it where that is possible: a few passes in training mode, a state dict with a wrong
part, a replaced module, a loss that does too much.
"""

from __future__ import annotations

from benchmarks.doctor import unseen_data_faults, unseen_use_faults, unseen_weight_faults
from benchmarks.doctor.fault import Fault

FAULTS: list[Fault] = [*unseen_data_faults.FAULTS, *unseen_use_faults.FAULTS, *unseen_weight_faults.FAULTS]
