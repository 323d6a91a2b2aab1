"""Which kernels run: list them, force one, explain a choice, tune the GPU's."""

from keelnorm.engine.kernels.explaining import autotune, explain
from keelnorm.engine.kernels.registry import Kernel, active, available, calls, chosen_by, use

__all__ = ["Kernel", "active", "autotune", "available", "calls", "chosen_by", "explain", "use"]
