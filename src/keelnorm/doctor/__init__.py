"""The doctor: what is wrong with the batch norms of a model, and what to do.

Imported when it is asked for, as ``kn.diagnose`` or ``kn.doctor``: ``import keelnorm`` stays light.
"""

from keelnorm.doctor.diagnose import diagnose
from keelnorm.doctor.diagnosis import Diagnosis
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Case, Rule

__all__ = ["Case", "Diagnosis", "Finding", "Rule", "Severity", "diagnose"]
