"""Batch normalization for PyTorch: fast, right where it usually goes wrong, and shown by evidence."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from evenkeel import surgery
    from evenkeel.surgery import *  # noqa: F403

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
#: What evenkeel.surgery has; it is imported when one of these is asked for.
_SURGERY = (
    "Report",
    "adapt",
    "convert",
    "export_onnx",
    "fold",
    "from_flax",
    "from_keras",
    "merge_statistics",
    "param_groups",
    "prepare_export",
    "recalibrate",
    "reset_adaptation",
    "revert",
    "to_flax",
    "to_keras",
    "to_torch",
)
__all__ += ["surgery", *_SURGERY]


def __getattr__(name: str) -> Any:
    if name == "surgery" or name in _SURGERY:
        from importlib import import_module

        surgery = import_module("evenkeel.surgery")
        return surgery if name == "surgery" else getattr(surgery, name)
    raise AttributeError(f"module 'evenkeel' has no attribute {name!r}")
