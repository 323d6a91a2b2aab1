"""Batch normalization for PyTorch: fast, right where it usually goes wrong, and shown by evidence."""

from evenkeel import control, distributed, functional, kernels, nn, schedule
from evenkeel.control import (
    accumulate_statistics,
    assert_frozen,
    backward_as_one_batch,
    follow_scaler,
    freeze,
    frozen,
    pause_statistics,
    unfreeze,
)
from evenkeel.distributed import sync_statistics
from evenkeel.memory import reuse_memory
from evenkeel.moments import Moments
from evenkeel.nn import *  # noqa: F403  (its __all__ says which)
from evenkeel.schedule import MomentumSchedule

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "MomentumSchedule",
    "__version__",
    "accumulate_statistics",
    "assert_frozen",
    "backward_as_one_batch",
    "control",
    "distributed",
    "follow_scaler",
    "freeze",
    "frozen",
    "functional",
    "kernels",
    "nn",
    "pause_statistics",
    "reuse_memory",
    "schedule",
    "sync_statistics",
    "unfreeze",
]
__all__ += nn.__all__
