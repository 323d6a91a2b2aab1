"""Operations on the batch norms of any model; those that change one return it and a report of what was done.

Imported when the first of them is asked for, as ``ek.convert`` and so on: ``import evenkeel`` stays light.
"""

from evenkeel.surgery.conversion.convert import convert, revert
from evenkeel.surgery.conversion.to_torch import to_torch
from evenkeel.surgery.folding.fold import fold
from evenkeel.surgery.interchange.flax import from_flax, to_flax
from evenkeel.surgery.interchange.keras import from_keras, to_keras
from evenkeel.surgery.interchange.onnx_export import export_onnx
from evenkeel.surgery.interchange.prepare_export import prepare_export
from evenkeel.surgery.known_layers import register as register
from evenkeel.surgery.param_groups import param_groups
from evenkeel.surgery.report import Report
from evenkeel.surgery.statistics.adapt import adapt, reset_adaptation
from evenkeel.surgery.statistics.merge import merge_statistics
from evenkeel.surgery.statistics.recalibrate import recalibrate

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
