"""Batch normalization for PyTorch: fast, right where it usually goes wrong, and shown by evidence."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keelnorm import control, distributed, functional, kernels, memory, nn
from keelnorm.control import (
    MomentumSchedule,
    accumulate_statistics,
    assert_frozen,
    backward_as_one_batch,
    follow_scaler,
    freeze,
    frozen,
    pause_statistics,
    unfreeze,
)
from keelnorm.distributed import sync_statistics
from keelnorm.memory import reuse_memory, save_memory
from keelnorm.moments import Moments
from keelnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormGRU,
    BatchNormGRUCell,
    BatchNormLSTM,
    BatchNormLSTMCell,
    BatchRenorm,
    ConditionalBatchNorm,
    CrossIterationBatchNorm,
    DomainBatchNorm,
    GhostBatchNorm,
    L1BatchNorm,
    LazyBatchNorm,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LinearRamp,
    MovingAverageBatchNorm,
    RangeBatchNorm,
    Sequential,
    SplitBatchNorm,
    StepwiseBatchNorm,
    SyncBatchNorm,
    VirtualBatchNorm,
    WhiteningBatchNorm,
    center_weights,
    collect_reference,
    convert_domains,
    use_domain,
    use_split,
)

if TYPE_CHECKING:
    from keelnorm import doctor, surgery
    from keelnorm.doctor.diagnose import diagnose
    from keelnorm.doctor.monitor.monitor import Monitor
    from keelnorm.surgery import (
        Report,
        adapt,
        convert,
        export_onnx,
        fold,
        from_flax,
        from_keras,
        kept_memory,
        merge_statistics,
        param_groups,
        prepare_export,
        recalibrate,
        reset_adaptation,
        revert,
        to_flax,
        to_keras,
        to_torch,
    )

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGRU",
    "BatchNormGRUCell",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "CrossIterationBatchNorm",
    "DomainBatchNorm",
    "GhostBatchNorm",
    "L1BatchNorm",
    "LazyBatchNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LinearRamp",
    "Moments",
    "MomentumSchedule",
    "Monitor",
    "MovingAverageBatchNorm",
    "RangeBatchNorm",
    "Report",
    "Sequential",
    "SplitBatchNorm",
    "StepwiseBatchNorm",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "WhiteningBatchNorm",
    "__version__",
    "accumulate_statistics",
    "adapt",
    "assert_frozen",
    "backward_as_one_batch",
    "center_weights",
    "collect_reference",
    "control",
    "convert",
    "convert_domains",
    "diagnose",
    "distributed",
    "doctor",
    "export_onnx",
    "fold",
    "follow_scaler",
    "freeze",
    "from_flax",
    "from_keras",
    "frozen",
    "functional",
    "kept_memory",
    "kernels",
    "memory",
    "merge_statistics",
    "nn",
    "param_groups",
    "pause_statistics",
    "prepare_export",
    "recalibrate",
    "reset_adaptation",
    "reuse_memory",
    "revert",
    "save_memory",
    "surgery",
    "sync_statistics",
    "to_flax",
    "to_keras",
    "to_torch",
    "unfreeze",
    "use_domain",
    "use_split",
]


if not TYPE_CHECKING:  # else type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import keelnorm.surgery or keelnorm.doctor when it, or one of its names, is first used."""
        if name in ("Monitor", "diagnose", "doctor"):
            doctor = import_module("keelnorm.doctor")
            return doctor if name == "doctor" else getattr(doctor, name)
        if name in __all__:
            surgery = import_module("keelnorm.surgery")
            return surgery if name == "surgery" else getattr(surgery, name)
        raise AttributeError(f"module 'keelnorm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
