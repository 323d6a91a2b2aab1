"""Batch-normalized LSTM and GRU over whole sequences, with the interface of torch.nn's."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import PackedSequence

from keelnorm.nn.recurrent.equations import GRU, LSTM
from keelnorm.nn.recurrent.recurrent_base import BatchNormRNN, Lengths


class BatchNormLSTM(BatchNormRNN):
    """``torch.nn.LSTM`` with batch normalization, of the recurrence or of its input.

    ``normalize="recurrent"``: BN_t normalizes over the sequences that have a step t, with separate statistics for each
    step:

        i, f, g, o = BN_t(W_ih x_t) + b_ih + BN_t(W_hh h_{t−1}) + b_hh        one BN each, γ only
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(BN_t(c_t))                                          with γ and β

    ``normalize="input"``: BN normalizes over all steps of all sequences at once:

        i, f, g, o = BN(W_ih x_t) + b_ih + W_hh h_{t−1} + b_hh,    c_t as above,    h_t = σ(o) ⊙ tanh(c_t)

    In evaluation the running statistics normalize. Padding never counts.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: As in
            ``torch.nn.LSTM``; ``proj_size`` is 0.
        normalize: ``"recurrent"``, the default, or ``"input"``.
        max_length: Number of steps with separate running statistics; in evaluation later steps use those of the last
            one, see :class:`StepwiseBatchNorm`. For "recurrent" only. Default 100.
        eps, momentum: Options of the normalizations.
        gamma: Initial value of γ; by default 0.1 for "recurrent" and 1 for "input".
        initial_noise: Standard deviation of the initial h in training if no ``hx`` is given: normal noise, drawn for
            each call. Default 0. It prevents exploding gradients if the first steps of all sequences are equal: their
            states are then equal too, and BN_t multiplies the gradient by γ/√ε per step.

    Shape:
        ``layer(input, hx=None, *, mask=None, lengths=None) -> output, (h_n, c_n)``, shapes as ``torch.nn.LSTM``:
        (T, N, input_size), with ``batch_first`` (N, T, input_size), without a batch (T, input_size), or a
        PackedSequence, for which the output is one too. ``mask``, boolean, of the input's shape without features, or
        ``lengths`` (N,) say which steps are there. Other steps leave the state as it is, have the output 0, and do not
        count as steps.

    State:
        The parameters of ``torch.nn.LSTM`` by their names, so its state_dict loads with ``strict=False``, and for each
        layer and direction the normalizations ``norm_ih_l0``, ``norm_hh_l0``, ``norm_c_l0`` (``..._reverse``; for
        "input" the first alone, an ordinary ``kn.BatchNorm1d``). The backward direction counts steps from each
        sequence's end. A forward in training updates each running statistic once.

    Differs:
        From ``torch.nn.LSTM`` by the normalization, ``mask`` and ``lengths``; there are no projections.

    Numerics:
        Gates and states are computed in float32 or wider, and returned in the input's dtype. If only one sequence of
        several has a step, the running statistics of that step normalize it.

    Cost:
        A loop over the steps in Python: several times the time of ``torch.nn.LSTM``. Per step and direction saved for
        the backward: the three normalizations' inputs and the gates.

    Raises:
        TypeError, ValueError: The input is not legal, or one sequence in training with "recurrent"; nothing has changed
            then.
        RuntimeError: The layer runs under ``torch.jit``.

    Example:
        >>> layer = BatchNormLSTM(3, 5, batch_first=True)
        >>> y, (h, c) = layer(torch.randn(4, 7, 3), lengths=[7, 2, 4, 4])
        >>> y.shape, bool((y[1, 1] == h[0, 1]).all()), y[1, 2:].abs().max().item()
        (torch.Size([4, 7, 5]), True, 0.0)

    Source:
        Cooijmans, Ballas, Laurent, Gülçehre, Courville (2016), "Recurrent Batch Normalization", arXiv:1603.09025,
        section 3 ("recurrent"). Laurent, Pereyra, Brakel, Zhang, Bengio (2016), "Batch Normalized Recurrent Neural
        Networks", arXiv:1510.01378, and Amodei et al. (2016), "Deep Speech 2", arXiv:1512.02595, section 3.2 ("input").
    """

    _kind = LSTM

    def forward(
        self,
        input: torch.Tensor | PackedSequence,
        hx: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        mask: torch.Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, tuple[torch.Tensor, torch.Tensor]]:
        """Return the output, and the state after each sequence's last step."""
        output, (h, c) = self._forward(input, hx, mask, lengths)
        return output, (h, c)


class BatchNormGRU(BatchNormRNN):
    """``torch.nn.GRU`` with batch normalization, of the recurrence or of its input.

    ``normalize="recurrent"``, with BN_t as in :class:`BatchNormLSTM`:

        r = σ(BN_t(W_ir x_t) + b_ir + BN_t(W_hr h_{t−1}) + b_hr)
        z = σ(BN_t(W_iz x_t) + b_iz + BN_t(W_hz h_{t−1}) + b_hz)
        n = tanh(BN_t(W_in x_t) + b_in + r ⊙ (BN_t(W_hn h_{t−1}) + b_hn))
        h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}

    ``normalize="input"``: BN normalizes the terms of x_t over all steps of all sequences; those of h_{t−1} are not
    normalized.

    Args, Shape, Differs, Numerics, Cost, Raises:
        As :class:`BatchNormLSTM`, with ``torch.nn.GRU`` for ``torch.nn.LSTM``; ``-> output, h_n``.

    State:
        The parameters of ``torch.nn.GRU``, and the normalizations ``norm_ih_l0`` and, for "recurrent", ``norm_hh_l0``.

    Example:
        >>> y, h = BatchNormGRU(3, 5, bidirectional=True)(torch.randn(7, 4, 3))
        >>> y.shape, h.shape
        (torch.Size([7, 4, 10]), torch.Size([2, 4, 5]))

    Source:
        As :class:`BatchNormLSTM`, applied to the GRU of Cho et al. (2014), arXiv:1406.1078, in torch's form. The first
        source there is about the LSTM; Amodei et al. use "input" with GRUs.
    """

    _kind = GRU

    def forward(
        self,
        input: torch.Tensor | PackedSequence,
        hx: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, torch.Tensor]:
        """Return the output, and the state after each sequence's last step."""
        output, (h,) = self._forward(input, hx, mask, lengths)
        return output, h
