"""A batch norm in two steps: statistics at once, the normalized result when it is known what follows."""

from __future__ import annotations

from torch import Tensor

from keelnorm.engine import composite, dispatch
from keelnorm.engine.activations import Activation
from keelnorm.engine.arguments import Kept, Needs, State
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
        need: Needs,
    ) -> tuple[Tensor | None, ...]:
        """dx, dresidual, dweight, dbias, as far as they are needed.

        Args:
            y: The result, where there was a residual and the activation is ReLU.
        """
        return dispatch.backward(dy, self._kept(x, saved, weight, bias if act.code else None, y, act), need)

    def differentiable(self, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """``bn(x)`` by the formula, as a function of x, weight and bias."""
        fixed = None if self.state.training else (saved[0], saved[2])
        xhat, _ = composite.normalized(x, fixed, self.state.eps)
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
        return composite.backward(dy, self._kept(x, saved, weight, bias, y, act), self.state.eps)

    def _kept(
        self, x: Tensor, saved: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor | None, act: Activation
    ) -> Kept:
        return Kept(x, saved, weight, bias, y, None, self.state.training, act)
