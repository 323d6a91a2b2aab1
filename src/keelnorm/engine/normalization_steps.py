"""A batch norm in its parts, for a result that waits."""

from __future__ import annotations

from torch import Tensor

from keelnorm.engine import composite, dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import State
from keelnorm.engine.layout import per_channel


def is_plain(parameter: Tensor | None) -> bool:
    """Whether changes in place of a parameter are counted, and it is nothing but memory; None is no parameter."""
    return parameter is None or (type(parameter) in dispatch.PLAIN and not parameter.is_inference())


class Normalization:
    """A batch norm in its parts, for a result that waits: what it takes from x at once, and what is computed later.

    Args:
        state: The layer's, without a mask.
        weight, bias: Its parameters.
    """

    __slots__ = ("bias", "state", "weight")
    state: State
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, state: State, weight: Tensor | None, bias: Tensor | None) -> None:
        self.state, self.weight, self.bias = state, weight, bias

    def run(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, act: Activation | None
    ) -> tuple[Tensor | None, Tensor]:
        """``act(bn(x))``, and (mean, var, rstd); the running statistics are updated. None for ``act``: only that."""
        if act is None:
            return None, dispatch.measure(x, self.state)
        return dispatch.forward(x, None, weight, bias, None, self.state, act)

    def apply(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor,
        act: Activation,
    ) -> Tensor:
        """``act(bn(x) + residual)`` with what :meth:`run` has found; no graph."""
        return dispatch.forward(x, residual, weight, bias, saved, self.state, act)[0]

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        act: Activation,
        need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        """dx, dresidual, dweight, dbias, as far as they are needed.

        Args:
            y: The result, where there was a residual and the activation is ReLU.
        """
        return dispatch.backward(
            dy, x, saved, weight, bias if act.code else None, y, None, self.state.training, act, *need
        )

    def differentiable(self, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``bn(x)`` by the formula, as a function of x, weight and bias."""
        xhat, _ = composite.normalized(x, self._fixed(saved), self.state.eps)
        y = xhat if weight is None else xhat * per_channel(weight.to(xhat.dtype), x)
        return (y if bias is None else y + per_channel(bias.to(xhat.dtype), x)).to(x.dtype)

    def differentiable_backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        act: Activation,
    ) -> tuple[Tensor | None, ...]:
        """As :meth:`backward`, all of them, as differentiable functions."""
        return composite.backward(dy, x, weight, bias, self._fixed(saved), y, None, self.state.eps, act)

    def _fixed(self, saved: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.state.training else (saved[0], saved[2])
