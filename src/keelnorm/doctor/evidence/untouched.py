"""A block after which a model, and the random generators, are as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

from keelnorm.control.run_uncompiled import uncompiled
from keelnorm.surgery.snapshot import preserved


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients; afterwards, also after an exception, the model is as before.

    Put back are modes, buffers, ``requires_grad`` and ``grad`` of the parameters, and the random generators of torch,
    NumPy and Python. Compiled modules run uncompiled inside. Hooks are the block's own affair.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    generators = random.getstate(), np.random.get_state()
    try:
        with preserved(model), uncompiled():
            yield
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
