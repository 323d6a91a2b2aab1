"""Batch-normalized LSTM and GRU cells: one time step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from keelnorm.engine.rollback import unchanged
from keelnorm.functional import refuse_jit
from keelnorm.moments import compute_dtype
from keelnorm.nn._shared.module_errors import KeelnormModule
from keelnorm.nn.recurrent.equations import (
    GRU,
    LSTM,
    Equations,
    State,
    add_normalizations,
    add_weights,
    check_features,
    check_size,
    check_state,
    initialize,
    normalizations,
    weights,
)
from keelnorm.nn.recurrent.stepwise import Run, check_step


class _BatchNormCell(KeelnormModule):
    """Base of both cells."""

    _kind: Equations

    input_size: int
    hidden_size: int
    bias: bool
    max_length: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_length: int = 100,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        check_size(type(self).__name__, "input_size", input_size)
        check_size(type(self).__name__, "hidden_size", hidden_size)
        self.input_size, self.hidden_size, self.bias, self.max_length = input_size, hidden_size, bias, max_length
        memory = {"device": device, "dtype": dtype}
        options = {"max_length": max_length, "eps": eps, "momentum": momentum, "gamma": gamma, **memory}
        add_weights(self, self._kind, input_size, hidden_size, bias, "", memory)
        add_normalizations(self, self._kind, hidden_size, "", options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights as torch.nn's cell does, and reset the normalizations."""
        initialize(self, self.hidden_size)

    def _forward(self, x: Tensor, hx: Any, step: int) -> State:
        what, kind, given = type(self).__name__, self._kind, weights(self)
        refuse_jit(what)
        check_step(what, step)
        check_features(what, x, self.input_size, given.ih, (1, 2))
        state = check_state(what, kind, hx, (*x.shape[:-1], self.hidden_size), x)
        norms = normalizations(self, kind)
        rows = x if x.dim() == 2 else x.unsqueeze(0)
        for norm in norms:
            norm.check_legal([rows.shape[0]], step)
        wide = compute_dtype(x)
        state = tuple((part if x.dim() == 2 else part.unsqueeze(0)).to(wide) for part in state)
        with unchanged(self):
            runs = [Run(norm) for norm in norms]
            state = kind.step(F.linear(rows, given.ih), state, given, runs, step)
            for run in runs:
                run.finish()
        return tuple((part if x.dim() == 2 else part.squeeze(0)).to(x.dtype) for part in state)

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")


class BatchNormLSTMCell(_BatchNormCell):
    """One step of a batch-normalized LSTM: ``cell(x, (h, c), step=t) -> (h, c)``.

    BN_t is the batch normalization of :class:`StepwiseBatchNorm` at step t: over the batch in training, with the
    running statistics of step t in evaluation. σ is the logistic function, ⊙ the elementwise product:

        i, f, g, o = BN_t(W_ih x) + b_ih + BN_t(W_hh h) + b_hh        one BN each, γ only
        c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g)
        h' = σ(o) ⊙ tanh(BN_t(c'))                                    with γ and β

    The cell state itself is passed on without normalization, so that gradients flow through it.

    Args:
        input_size, hidden_size, bias, device, dtype: As in ``torch.nn.LSTMCell``.
        max_length, eps, momentum, gamma: Options of the three normalizations, see :class:`StepwiseBatchNorm`.

    Shape:
        x (N, input_size), h and c (N, hidden_size), zeros if no state is given; or all without N.

    State:
        ``weight_ih``, ``weight_hh``, ``bias_ih``, ``bias_hh`` as in ``torch.nn.LSTMCell``, and the normalizations
        ``norm_ih``, ``norm_hh`` and ``norm_c``; a forward in training updates their running statistics of step t.

    Differs:
        From ``torch.nn.LSTMCell`` by the normalization and by the argument ``step``, counted from 0.

    Numerics:
        Gates and states are computed in float32 or wider, and returned in x's dtype.

    Raises:
        TypeError, ValueError: The input is not legal, or one sample in training at step 0; nothing has changed then.

    Example:
        >>> cell, state = BatchNormLSTMCell(3, 5), None
        >>> for t, x in enumerate(torch.randn(7, 4, 3)):
        ...     state = cell(x, state, step=t)
        >>> state[0].shape
        torch.Size([4, 5])

    Source:
        Cooijmans, Ballas, Laurent, Gülçehre, Courville (2016), "Recurrent Batch Normalization", arXiv:1603.09025,
        section 3; the order of the gates and the two biases are torch's.
    """

    _kind = LSTM

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, step: int) -> tuple[Tensor, Tensor]:
        """Compute one step."""
        h, c = self._forward(input, hx, step)
        return h, c


class BatchNormGRUCell(_BatchNormCell):
    """One step of a batch-normalized GRU: ``cell(x, h, step=t) -> h``.

    The input and the hidden term are normalized as in :class:`BatchNormLSTMCell`, over all three gates at once:

        r = σ(BN_t(W_ir x) + b_ir + BN_t(W_hr h) + b_hr)
        z = σ(BN_t(W_iz x) + b_iz + BN_t(W_hz h) + b_hz)
        n = tanh(BN_t(W_in x) + b_in + r ⊙ (BN_t(W_hn h) + b_hn))
        h' = (1 − z) ⊙ n + z ⊙ h

    h' is passed on without normalization, like the cell state of the LSTM.

    Args, Shape, Differs, Numerics, Raises:
        As :class:`BatchNormLSTMCell`; the state is h alone.

    State:
        The parameters of ``torch.nn.GRUCell``, and the normalizations ``norm_ih`` and ``norm_hh``.

    Example:
        >>> BatchNormGRUCell(3, 5)(torch.randn(4, 3), step=0).shape
        torch.Size([4, 5])

    Source:
        The normalization of Cooijmans et al. (2016), arXiv:1603.09025, section 3, applied to the GRU of Cho et al.
        (2014), arXiv:1406.1078, in torch's form, which has the reset gate after the product with W_hn.
    """

    _kind = GRU

    def forward(self, input: Tensor, hx: Tensor | None = None, *, step: int) -> Tensor:
        """Compute one step."""
        return self._forward(input, hx, step)[0]
