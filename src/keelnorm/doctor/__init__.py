"""The doctor: what is wrong with the batch norms of a model, and what to do.

Imported when it is asked for, as ``kn.diagnose`` or ``kn.doctor``: ``import keelnorm`` stays light.
"""

from keelnorm.doctor.case_check import check_rule
from keelnorm.doctor.diagnose import diagnose
from keelnorm.doctor.diagnosis import Diagnosis
from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.layer_numbers import LayerNumbers
from keelnorm.doctor.monitor.monitor import Monitor, MonitorWarning
from keelnorm.doctor.monitor.observation import Observation
from keelnorm.doctor.rule import Case, Rule, by_recalibrating

__all__ = [
    "Case",
    "Diagnosis",
    "Evidence",
    "Finding",
    "LayerFacts",
    "LayerNumbers",
    "Monitor",
    "MonitorWarning",
    "Observation",
    "Rule",
    "Severity",
    "by_recalibrating",
    "check_rule",
    "diagnose",
]
