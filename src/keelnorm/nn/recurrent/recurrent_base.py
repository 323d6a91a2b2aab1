"""The base of the batch-normalized LSTM and GRU: arguments, layers, directions, and the loop over the steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from keelnorm.engine.error_messages import describe
from keelnorm.engine.rollback import unchanged
from keelnorm.functional import refuse_jit
from keelnorm.moments import compute_dtype
from keelnorm.nn._shared.module_errors import KeelnormModule
from keelnorm.nn.batch_norm import BatchNorm1d
from keelnorm.nn.recurrent.equations import (
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


class BatchNormRNN(KeelnormModule):
    """Base of both layers; they add the equations and the form of the state."""

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
        """The number of each layer and the suffix of its parameters' names, in torch's order."""
        ends = ("", "_reverse")[: self._directions]
        return [(layer, f"_l{layer}{end}") for layer in range(self.num_layers) for end in ends]

    def reset_parameters(self) -> None:
        """Initialize the weights as torch.nn's layer does, and reset the normalizations."""
        initialize(self, self.hidden_size)
        if self.normalize == "input":
            for norm in self.children():
                nn.init.constant_(norm.weight, self.gamma)  # type: ignore[arg-type]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no packed copy of the parameters. Code for torch.nn's layers calls this."""

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
        """Whether there is a batch dimension, and the input in the order of processing."""
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
        """Run all layers: output rows (M, D·H) in x's dtype, and the final states, (L·D, N, H) each."""
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
        """Run one layer in one direction: output rows (M, H), and the final state."""
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
        y, state = _run_steps(kind, gx, sizes, state, given, runs)
        for run in runs or ():
            run.finish()
        return y, state

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        said = f"{self.input_size}, {self.hidden_size}, normalize={self.normalize!r}"
        usual = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        usual["initial_noise"] = 0.0
        return said + "".join(
            f", {name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value
        )


def _run_steps(
    kind: Equations, gx: Tensor, sizes: list[int], state: State, given: Weights, runs: list[Run] | None
) -> tuple[Tensor, State]:
    """Run step after step over the input terms (M, gates·H); sequences that have ended keep their state."""
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
