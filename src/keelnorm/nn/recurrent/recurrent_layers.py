"""Batch-normalized LSTM and GRU over whole sequences, with the interface of torch.nn's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from keelnorm.engine.error_messages import describe
from keelnorm.engine.rollback import unchanged
from keelnorm.functional import refuse_jit
from keelnorm.moments import compute_dtype
from keelnorm.nn._shared.constructor_errors import Constructed
from keelnorm.nn.batch_norm import BatchNorm1d, refuse_script
from keelnorm.nn.recurrent.equations import (
    GRU,
    LSTM,
    Equations,
    State,
    Weights,
    add_normalizations,
    add_weights,
    check_features,
    check_size,
    check_state,
    initialize,
    normalizations,
    weights,
)
from keelnorm.nn.recurrent.packed_sequences import Sequences, valid_steps
from keelnorm.nn.recurrent.stepwise import Run

Normalize = Literal["recurrent", "input"]
Lengths = Tensor | Sequence[int]


class _BatchNormRNN(Constructed):
    """What both layers share: everything but the equations and the form of the state."""

    _kind: Equations

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    normalize: Normalize
    max_length: int
    initial_noise: float
    gamma: float

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalize: Normalize = "recurrent",
        max_length: int = 100,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float | None = None,
        initial_noise: float = 0.0,
    ) -> None:
        super().__init__()
        what = type(self).__name__
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            check_size(what, name, value)
        if proj_size != 0:
            raise ValueError(
                f"{what}: there are no projections here, so proj_size must be 0; got {describe(proj_size)}"
            )
        if normalize not in ("recurrent", "input"):
            raise ValueError(f"{what}: normalize is 'recurrent' or 'input'; got {describe(normalize)}")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"{what}: dropout is a probability, from 0 to 1; got {describe(dropout)}")
        if isinstance(initial_noise, bool) or not 0 <= initial_noise < math.inf:
            raise ValueError(
                f"{what}: initial_noise is a standard deviation, 0 or more and finite; got {describe(initial_noise)}"
            )
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"{what}: dropout acts between layers, and there is one", UserWarning, stacklevel=3)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.proj_size = proj_size
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.normalize, self.max_length, self.initial_noise = normalize, max_length, initial_noise
        self.gamma = (0.1 if normalize == "recurrent" else 1.0) if gamma is None else gamma
        memory: dict[str, Any] = {"device": device, "dtype": dtype}
        for layer, suffix in self._suffixes():
            size = input_size if layer == 0 else hidden_size * self._directions
            add_weights(self, self._kind, size, hidden_size, bias, suffix, memory)
            if normalize == "recurrent":
                options = {"max_length": max_length, "gamma": self.gamma, "eps": eps, "momentum": momentum}
                add_normalizations(self, self._kind, hidden_size, suffix, options | memory)
            else:
                norm = BatchNorm1d(self._kind.gates * hidden_size, eps, momentum, **memory)
                self.add_module(f"norm_ih{suffix}", norm)
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> list[tuple[int, str]]:
        """The number of each layer and the end of its parameters' names, in torch's order."""
        ends = ("", "_reverse")[: self._directions]
        return [(layer, f"_l{layer}{end}") for layer in range(self.num_layers) for end in ends]

    def reset_parameters(self) -> None:
        """As torch.nn's layer, and the normalizations as they were made."""
        initialize(self, self.hidden_size)
        if self.normalize == "input":
            for norm in self.children():
                nn.init.constant_(norm.weight, self.gamma)  # type: ignore[arg-type]

    def flatten_parameters(self) -> None:
        """Nothing: there is no packed copy of the parameters. Programs for torch.nn's layers call this."""

    def _forward(
        self, input: Any, hx: Any, mask: Tensor | None, lengths: Lengths | None
    ) -> tuple[Tensor | PackedSequence, State]:
        what, kind = type(self).__name__, self._kind
        refuse_jit(what)
        batched, seqs = self._sequences(what, input, mask, lengths)
        x, blocks = seqs.data, len(self._suffixes())
        shape = (blocks, seqs.batch, self.hidden_size) if batched else (blocks, self.hidden_size)
        initial = check_state(what, kind, hx, shape, x)
        if hx is None and self.training and self.initial_noise > 0:
            h, *rest = initial
            initial = (h + float(self.initial_noise) * torch.randn_like(h), *rest)
        if self.normalize == "recurrent":
            for _, suffix in self._suffixes():
                for norm in normalizations(self, kind, suffix):
                    norm.check_legal(seqs.sizes)
        wide = compute_dtype(x)
        initial = tuple(seqs.sort(part if batched else part.unsqueeze(1)).to(wide) for part in initial)
        with unchanged(self):
            y, final = self._layers(x, seqs, initial)
        final = tuple(seqs.unsort(part).to(x.dtype) for part in final)
        output = seqs.restore(y)
        if not batched:
            assert isinstance(output, Tensor)
            return output.squeeze(1), tuple(part.squeeze(1) for part in final)
        if self.batch_first and isinstance(output, Tensor):
            output = output.transpose(0, 1)
        return output, final

    def _sequences(self, what: str, input: Any, mask: Tensor | None, lengths: Lengths | None) -> tuple[bool, Sequences]:
        """Whether there is a batch dimension, and the input in the order in which it is walked."""
        weight = weights(self, "_l0").ih
        if isinstance(input, PackedSequence):
            if mask is not None or lengths is not None:
                raise ValueError(f"{what}: a packed sequence knows its lengths; give neither mask nor lengths with it")
            check_features(what, input.data, self.input_size, weight, (2,))
            return True, Sequences.from_packed(input)
        check_features(what, input, self.input_size, weight, (2, 3))
        if input.dim() == 3:
            x = input.transpose(0, 1) if self.batch_first else input
            return True, Sequences.from_padded(x, valid_steps(what, x, mask, lengths, self.batch_first))
        if mask is not None or lengths is not None:
            raise ValueError(f"{what}: mask and lengths are for a batch; got {describe(input)}, which is one sequence")
        return False, Sequences.from_padded(input.unsqueeze(1))

    def _layers(self, x: Tensor, seqs: Sequences, initial: State) -> tuple[Tensor, State]:
        """Output rows (M, D·H) in x's dtype, and the final states, (L·D, N, H) each."""
        dtype = x.dtype
        backwards = seqs.backwards() if self.bidirectional else None
        finals: list[State] = []
        outputs: list[Tensor] = []
        for block, (layer, suffix) in enumerate(self._suffixes()):
            reverse = backwards if block % self._directions else None
            if layer > 0 and block % self._directions == 0:
                x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
                x = F.dropout(x, self.dropout, self.training)
                outputs = []
            state = tuple(part[block] for part in initial)
            y, final = self._block(x if reverse is None else x[reverse], seqs.sizes, state, suffix)
            y = y.to(dtype)
            outputs.append(y if reverse is None else y[reverse])
            finals.append(final)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return y, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _block(self, x: Tensor, sizes: list[int], state: State, suffix: str) -> tuple[Tensor, State]:
        """One layer in one direction: the rows (M, H) of its output, and its final state."""
        kind, given = self._kind, weights(self, suffix)
        if not sizes:
            return x.new_zeros(0, self.hidden_size), state
        gx = F.linear(x, given.ih)
        runs = None
        if self.normalize == "recurrent":
            runs = [Run(norm) for norm in normalizations(self, kind, suffix)]
        else:
            gx = getattr(self, f"norm_ih{suffix}")(gx)
            gx = gx if given.bias_ih is None else gx + given.bias_ih
        y, state = _walk(kind, gx, sizes, state, given, runs)
        for run in runs or ():
            run.finish()
        return y, state

    def extra_repr(self) -> str:
        said = f"{self.input_size}, {self.hidden_size}, normalize={self.normalize!r}"
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        usual["initial_noise"] = 0.0
        return said + "".join(
            f", {name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value
        )

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def _walk(
    kind: Equations, gx: Tensor, sizes: list[int], state: State, given: Weights, runs: list[Run] | None
) -> tuple[Tensor, State]:
    """Step after step over the input terms (M, gates·H); sequences that end keep the state they have."""
    outputs: list[Tensor] = []
    ended: list[State] = []
    for t, (part, size) in enumerate(zip(gx.split(sizes), sizes, strict=True)):
        if size < state[0].shape[0]:
            ended.append(tuple(values[size:] for values in state))
            state = tuple(values[:size] for values in state)
        state = kind.step(part, state, given, runs, t)
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return torch.cat(outputs), state


class BatchNormLSTM(_BatchNormRNN):
    """``torch.nn.LSTM`` with batch normalization, of the recurrence or of its input.

    ``normalize="recurrent"``: with BN_t over the batch's sequences that still run at step t, and moments of its own for
    each step,

        i, f, g, o = BN_t(W_ih x_t) + b_ih + BN_t(W_hh h_{t−1}) + b_hh        one BN each, γ only
        c_t = σ(f) ⊙ c_{t−1} + σ(i) ⊙ tanh(g)
        h_t = σ(o) ⊙ tanh(BN_t(c_t))                                          with γ and β

    ``normalize="input"``: with BN over all steps of all sequences at once,

        i, f, g, o = BN(W_ih x_t) + b_ih + W_hh h_{t−1} + b_hh,    c_t as above,    h_t = σ(o) ⊙ tanh(c_t)

    In evaluation the running statistics normalize. Padding never enters a statistic.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: As in
            ``torch.nn.LSTM``; ``proj_size`` is 0.
        normalize: ``"recurrent"``, the default, or ``"input"``.
        max_length: Steps with running statistics of their own; later steps take the last one's in evaluation, see
            :class:`StepwiseBatchNorm`. For "recurrent" only. Default 100.
        eps, momentum: Of the normalizations.
        gamma: What γ is at the start; by default 0.1 for "recurrent" and 1 for "input".
        initial_noise: In training, where no ``hx`` is given, h starts as normal noise of this standard deviation, drawn
            anew each time, instead of 0 (the default). Against exploding gradients where the first steps of all
            sequences are alike: their states are then alike too, and BN_t multiplies the gradient by γ/√ε a step.

    Shape:
        ``layer(input, hx=None, *, mask=None, lengths=None) -> output, (h_n, c_n)``, shapes as ``torch.nn.LSTM``:
        (T, N, input_size), with ``batch_first`` (N, T, input_size), without a batch (T, input_size), or a
        PackedSequence, for which the output is one too. ``mask``, boolean, of the input's shape without features, or
        ``lengths`` (N,) say which steps are there. Steps that are not leave the state as it is, and their output is 0;
        only those that are there count as steps.

    State:
        The parameters of ``torch.nn.LSTM`` by their names, so that its state_dict loads with ``strict=False``, and for
        each layer and direction the normalizations ``norm_ih_l0``, ``norm_hh_l0``, ``norm_c_l0`` (``..._reverse``; for
        "input" the first alone, an ordinary ``kn.BatchNorm1d``). The backward direction counts steps from each
        sequence's end. A forward in training updates each running statistic once.

    Differs:
        From ``torch.nn.LSTM`` by the normalization, ``mask`` and ``lengths``, and by having no projections.

    Numerics:
        Gates and states are computed in float32 or wider, and returned in the input's dtype. A step at which one
        sequence of several is left is normalized with the running statistics of that step.

    Cost:
        A loop over the steps in Python: several times the time of ``torch.nn.LSTM``. Per step and direction saved for
        the backward: the three normalizations' inputs and the gates.

    Raises:
        TypeError, ValueError: for input that is not legal, and for a single sequence in training with "recurrent";
            nothing has changed then.
        RuntimeError: under ``torch.jit``.

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
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Output, and the state after each sequence's last step; see the class."""
        output, (h, c) = self._forward(input, hx, mask, lengths)
        return output, (h, c)


class BatchNormGRU(_BatchNormRNN):
    """``torch.nn.GRU`` with batch normalization, of the recurrence or of its input.

    ``normalize="recurrent"``, with BN_t as in :class:`BatchNormLSTM`:

        r = σ(BN_t(W_ir x_t) + b_ir + BN_t(W_hr h_{t−1}) + b_hr)
        z = σ(BN_t(W_iz x_t) + b_iz + BN_t(W_hz h_{t−1}) + b_hz)
        n = tanh(BN_t(W_in x_t) + b_in + r ⊙ (BN_t(W_hn h_{t−1}) + b_hn))
        h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}

    ``normalize="input"``: with BN over all steps of all sequences for the terms of x_t, and none for those of h_{t−1}.

    Args, Shape, Differs, Numerics, Cost, Raises:
        As :class:`BatchNormLSTM`, with ``torch.nn.GRU`` for ``torch.nn.LSTM``; ``-> output, h_n``.

    State:
        The parameters of ``torch.nn.GRU``, and the normalizations ``norm_ih_l0`` and, for "recurrent", ``norm_hh_l0``.

    Example:
        >>> y, h = BatchNormGRU(3, 5, bidirectional=True)(torch.randn(7, 4, 3))
        >>> y.shape, h.shape
        (torch.Size([7, 4, 10]), torch.Size([2, 4, 5]))

    Source:
        As :class:`BatchNormLSTM`, whose first source treats the LSTM, applied to the GRU of Cho et al. (2014),
        arXiv:1406.1078, in torch's form; Amodei et al. use "input" with GRUs.
    """

    _kind = GRU

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Output, and the state after each sequence's last step; see the class."""
        output, (h,) = self._forward(input, hx, mask, lengths)
        return output, h
