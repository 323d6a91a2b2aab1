"""Operations on the batch norms of any model; those that change one return it and a report of what was done.

Imported when the first of them is asked for, as ``kn.convert`` and so on: ``import keelnorm`` stays light.
"""

from keelnorm.surgery.conversion.convert import convert, revert
from keelnorm.surgery.conversion.to_torch import to_torch
from keelnorm.surgery.folding.fold import fold
from keelnorm.surgery.interchange.flax import from_flax, to_flax
from keelnorm.surgery.interchange.keras import from_keras, to_keras
from keelnorm.surgery.interchange.onnx_export import export_onnx
from keelnorm.surgery.interchange.prepare_export import prepare_export
from keelnorm.surgery.known_layers import register as register
from keelnorm.surgery.observation.kept_memory import kept_memory
from keelnorm.surgery.report import Report
from keelnorm.surgery.statistics.adapt import adapt, reset_adaptation
from keelnorm.surgery.statistics.merge import merge_statistics
from keelnorm.surgery.statistics.recalibrate import recalibrate
from keelnorm.surgery.weight_decay_groups import param_groups

__all__ = [
    "Report",
    "adapt",
    "convert",
    "export_onnx",
    "fold",
    "from_flax",
    "from_keras",
    "kept_memory",
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
