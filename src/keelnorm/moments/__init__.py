"""Mergeable moments per channel: what every feature of keelnorm computes with."""

from keelnorm.moments.mergeable_moments import (
    LEAST_FREQUENCY,
    Moments,
    compute_dtype,
    degrees_of_freedom,
    wide_dtype,
)
from keelnorm.moments.moments_arguments import (
    WEIGHTINGS,
    Weighting,
    broadcast_mask,
    broadcast_weight,
    check_values,
    check_weighting,
)

__all__ = [
    "LEAST_FREQUENCY",
    "WEIGHTINGS",
    "Moments",
    "Weighting",
    "broadcast_mask",
    "broadcast_weight",
    "check_values",
    "check_weighting",
    "compute_dtype",
    "degrees_of_freedom",
    "wide_dtype",
]
