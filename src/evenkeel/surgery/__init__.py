"""Operations on the batch norms of any model: each returns the model and a report of what was done.

Imported when the first of them is asked for, as ``ek.convert`` and so on: ``import evenkeel`` stays light.
"""

from evenkeel.surgery.adapt import adapt, reset_adaptation
from evenkeel.surgery.convert import convert, revert
from evenkeel.surgery.folding import fold
from evenkeel.surgery.recalibrate import recalibrate
from evenkeel.surgery.report import Report

__all__ = ["Report", "adapt", "convert", "fold", "recalibrate", "reset_adaptation", "revert"]
