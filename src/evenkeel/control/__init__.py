"""Statistics under control: freezing, pausing and pooling, for evenkeel's and torch.nn's layers in any model."""

from evenkeel.control.accumulation import Accumulated, accumulate_statistics
from evenkeel.control.freezing import Frozen, assert_frozen, freeze, frozen, unfreeze
from evenkeel.control.grad_scaler import follow_scaler
from evenkeel.control.momentum_schedule import MomentumSchedule
from evenkeel.control.one_batch import backward_as_one_batch
from evenkeel.control.pausing import pause_statistics

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
