"""Control of running statistics: freezing, pausing and pooling them, for keelnorm's and torch.nn's layers."""

from keelnorm.control.accumulation import Accumulated, accumulate_statistics
from keelnorm.control.freezing import Frozen, assert_frozen, freeze, frozen, unfreeze
from keelnorm.control.grad_scaler import follow_scaler
from keelnorm.control.momentum_schedule import MomentumSchedule
from keelnorm.control.one_batch import backward_as_one_batch
from keelnorm.control.pausing import pause_statistics

__all__ = [
    "Accumulated",
    "Frozen",
    "MomentumSchedule",
    "accumulate_statistics",
    "assert_frozen",
    "backward_as_one_batch",
    "follow_scaler",
    "freeze",
    "frozen",
    "pause_statistics",
    "unfreeze",
]
