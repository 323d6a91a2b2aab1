"""A batch norm in two steps: statistics at once, the normalized result when it is known what follows."""

from __future__ import annotations

from torch import Tensor

from keelnorm.engine import composite, dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State


def is_plain(parameter: Tensor | None) -> bool:
    """Return whether a parameter is an ordinary tensor whose changes in place are counted, or None."""
    return parameter is None or (type(parameter) in dispatch.PLAIN and not parameter.is_inference())


class Normalization:
    """A batch norm in two steps, for a result that waits.

    Args:
        state: The layer's state, without a mask.
        weight, bias: The layer's parameters.

    Attributes:
        by_reference: Whether the reference computed the last result.
    """

    __slots__ = ("bias", "by_reference", "state", "weight")
    state: State
    weight: Tensor | None
    bias: Tensor | None
    by_reference: bool

    def __init__(self, state: State, weight: Tensor | None, bias: Tensor | None) -> None:
        self.state, self.weight, self.bias = state, weight, bias

    def run(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation | None
    ) -> tuple[Tensor | None, Tensor]:
        """Update the running statistics; return ``act(bn(x))``, None where ``act`` is None, and (mean, var, rstd)."""
        if act is None:
            return None, dispatch.measure(x, self.state)
        y, saved, self.by_reference = dispatch.forward(x, None, weight, bias, None, self.state, act)
        return y, saved

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        act: Activation,
    ) -> Tensor:
        """Return ``act(bn(x) + residual)`` with the statistics that :meth:`run` found, without a graph."""
        y, _, self.by_reference = dispatch.forward(x, residual, weight, bias, saved, self.state, act)
        return y

    def kept(
        self, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, act: Activation
    ) -> Kept:
        """Return the bundle that the backward takes.

        Args:
            y: The result, where a residual was added and the activation is ReLU.
        """
        return Kept(
            x=x, saved=saved, weight=weight, bias=bias if act.code else None, y=y, residual=None,
            training=self.state.training, act=act,
        )  # fmt: skip

    def backward(self, dy: Tensor, kept: Kept, need: Needs) -> tuple[Tensor | None, ...]:
        """Return dx, dresidual, dweight, dbias, as far as they are needed."""
        return dispatch.backward(dy, kept, need)

    def differentiable(self, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``bn(x)`` by the formula, differentiable in x, weight and bias."""
        fixed = None if self.state.training else (saved[0], saved[2])
        xhat, _ = composite.normalized(x, fixed, self.state.eps)
        return composite.scaled(xhat, weight, bias).to(x.dtype)

    def differentiable_backward(self, dy: Tensor, kept: Kept) -> tuple[Tensor | None, ...]:
        """Return all four gradients as differentiable functions; see :meth:`backward`."""
        return composite.backward(dy, kept, self.state.eps)
