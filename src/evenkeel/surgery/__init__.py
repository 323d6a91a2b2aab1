"""Operations on the batch norms of any model; those that change one return it and a report of what was done.

Imported when the first of them is asked for, as ``ek.convert`` and so on: ``import evenkeel`` stays light.
"""

from evenkeel.surgery.adapt import adapt, reset_adaptation
from evenkeel.surgery.convert import convert, revert
from evenkeel.surgery.flax import from_flax, to_flax
from evenkeel.surgery.folding import fold
from evenkeel.surgery.keras import from_keras, to_keras
from evenkeel.surgery.merging import merge_statistics
from evenkeel.surgery.onnx_export import export_onnx
from evenkeel.surgery.parameters import param_groups
from evenkeel.surgery.plain import to_torch
from evenkeel.surgery.preparing import prepare_export
from evenkeel.surgery.recalibrate import recalibrate
from evenkeel.surgery.registry import register as register
from evenkeel.surgery.report import Report

__all__ = [
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
    "register",
    "reset_adaptation",
    "revert",
    "to_flax",
    "to_keras",
    "to_torch",
]
