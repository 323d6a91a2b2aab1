"""Batch normalization for PyTorch: fast, right where it usually goes wrong, and shown by evidence."""

from evenkeel import functional, kernels
from evenkeel.memory import reuse_memory
from evenkeel.moments import Moments
from evenkeel.nn import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Sequential

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Moments",
    "Sequential",
    "__version__",
    "functional",
    "kernels",
    "reuse_memory",
]
