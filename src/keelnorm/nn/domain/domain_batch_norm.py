"""Domain-specific batch normalization: running statistics, and optionally γ and β, for each domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine import dispatch
from keelnorm.engine.activations import Activation, ActivationLike
from keelnorm.engine.arguments import Options, Padding, State, check_arguments, check_channels
from keelnorm.engine.error_messages import describe
from keelnorm.engine.torch_internals import BatchNormBase
from keelnorm.moments import Moments, Weighting
from keelnorm.nn._shared.normalize import normalize_by_batch
from keelnorm.nn._shared.partition import Partition
from keelnorm.nn._shared.scoped_choice import Choices
from keelnorm.nn._shared.take_over import adopt, expand_rows, options_of
from keelnorm.nn._shared.variant import Variant
from keelnorm.nn.domain.domain_names import Domain, names_of, rows_of


class DomainBatchNorm(Variant):
    """Batch normalization with separate statistics for each domain, which the call or a ``with`` block chooses.

    The samples of a domain d are normalized as if they were alone: with their own moments in training, with the
    domain's running statistics in evaluation.

        y = act((x − mean_d) / √(var_d + eps) · weight_d + bias_d + residual)

    ``with use_domain(model, "target"):`` chooses for a whole model, ``layer(x, domain="target")`` for one call. Instead
    of a name there may be a domain's number, or an int64 tensor (N,) with a number per sample.

    Args:
        num_features: Number of channels C.
        domains: Distinct names; or the number D of domains, which are then called "0", "1" and so on.
        eps, momentum, affine, track_running_stats, device, dtype: As for ``torch.nn.BatchNorm2d``.
        share_affine: Whether all domains use one weight and bias, (C,); else each has its own, (D, C). Default True.

    Shape:
        (N, C, *S) -> (N, C, *S)

    State:
        ``running_mean`` and ``running_var`` (D, C), ``num_batches_tracked`` (D,), a row for each domain in the order of
        ``domains``. A batch updates the rows of its domains. A plain batch normalization's checkpoint loads into every
        row. The choice of ``use_domain`` is ``layer.domain``; it is not in the state_dict.

    Differs:
        A call without a choice is an error: there is no default domain.

    Cost:
        One domain for the batch: the fused kernel, and one more pass over x for the running statistics. A number per
        sample: the same for each domain in the batch, reading the numbers on the host, and a copy of x and y unless the
        samples are sorted by domain.

    Raises:
        TypeError, ValueError: No domain is chosen, or one that does not exist; a domain has one value per channel in
            training (the message names it); or as :class:`~keelnorm.BatchNorm`. The running statistics are then as
            before.

    Example:
        >>> layer = DomainBatchNorm(16, ["source", "target"])
        >>> y = layer(torch.randn(4, 16, 8, 8), domain="target", activation="relu")
        >>> layer.num_batches_tracked.tolist()
        [0, 1]

    Source:
        Chang, You, Seo, Kwak, Han (2019), "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation",
        arXiv:1906.03950, section 3 (γ and β per domain too: ``share_affine=False``); Li, Wang, Shi, Liu, Hou (2016),
        "Revisiting Batch Normalization For Practical Domain Adaptation", arXiv:1603.04779 (AdaBN: statistics alone).
    """

    takes_mask = True
    own_data: str | None = "of each domain"
    own_evaluation: str | None = "with the statistics of the domain"

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        domains: Sequence[str] | int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        share_affine: bool = True,
    ) -> None:
        names = names_of(type(self).__name__, domains)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        #: The domains' names, in the order of the rows.
        self.domains = names
        self.share_affine = share_affine
        self._choices: Choices[Domain] = Choices()
        self._domain: Domain | None = None
        rows = len(names)
        if track_running_stats:
            assert self.running_mean is not None and self.running_var is not None
            assert self.num_batches_tracked is not None
            self.running_mean = self.running_mean.repeat(rows, 1)
            self.running_var = self.running_var.repeat(rows, 1)
            self.num_batches_tracked = self.num_batches_tracked.repeat(rows)
            self.count_skipped()
        if affine and not share_affine:
            self.weight = torch.nn.Parameter(self.weight.detach().repeat(rows, 1))
            self.bias = torch.nn.Parameter(self.bias.detach().repeat(rows, 1))

    @property
    def domain(self) -> Domain | None:
        """The choice of the :func:`use_domain` block opened last; else the value that was set."""
        chosen = self._choices.latest()
        return self._domain if chosen is None else chosen

    @domain.setter
    def domain(self, domain: Domain | None) -> None:
        self._domain = domain

    @classmethod
    def from_batch_norm(
        cls, bn: BatchNormBase, domains: Sequence[str] | int, *, share_affine: bool = True
    ) -> DomainBatchNorm:
        """Make a layer in which every domain starts as ``bn``.

        A shared weight and bias are the parameters of ``bn`` themselves, so an optimizer that holds them stays valid.

        Raises:
            TypeError: ``bn`` is not ``torch.nn``'s or keelnorm's drop-in layer, or has hooks.

        Example:
            >>> DomainBatchNorm.from_batch_norm(torch.nn.BatchNorm2d(16), 3).running_mean.shape
            torch.Size([3, 16])
        """
        layer = cls(domains=domains, share_affine=share_affine, **options_of(f"{cls.__name__}.from_batch_norm", bn))
        adopt(layer, bn)
        for name, parameter in bn.named_parameters() if share_affine else ():
            setattr(layer, name, parameter)
        return layer

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        domain: Domain | None = None,
        activation: ActivationLike = None,
        inplace: bool = False,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        weighting: Weighting = "frequency",
        padding: Padding = "zero",
    ) -> Tensor:
        """Compute ``activation(bn(x) + residual)`` with the domain's statistics.

        ``domain`` is a name, a number, or a number per sample, int64 (N,); by default the choice of ``use_domain``. The
        other arguments are as for every variant.
        """
        rows = rows_of(type(self).__name__, self.domains, self.domain if domain is None else domain)
        return self._call(
            input, residual, Options(activation, inplace, mask, sample_weight, weighting, padding), rows=rows
        )

    def check(self, x: Any, residual: Any, rows: int | list[int] = 0) -> None:
        """Raise unless the domain of the (first) sample can normalize x."""
        self._check(rows[0] if isinstance(rows, list) else rows, x, residual)

    def compute(
        self, x: Tensor, residual: Tensor | None, act: Activation, mask: Tensor | None, rows: int | list[int] = 0
    ) -> Tensor:
        """Normalize each domain's samples, and update the rows of these domains."""
        found: dict[int, Moments] = {}
        if isinstance(rows, list):
            y = self._by_sample(x, residual, rows, act, mask, found)
        else:
            y = self._one(rows, x, residual, act, mask, found)
        if found and self.counts():
            self.update_running(_rows(found, len(self.domains)))
        return y

    def _one(
        self,
        row: int,
        x: Tensor,
        residual: Tensor | None,
        act: Activation,
        mask: Tensor | None,
        found: dict[int, Moments],
    ) -> Tensor:
        """Normalize the samples of one domain, and put their moments into ``found``."""
        weight, bias, state = self._bank(row)
        if not state.training:
            return dispatch.batch_norm(x, residual, weight, bias, state, act)
        y, moments = normalize_by_batch(x, residual, weight, bias, self.eps, act, mask, self.counts())
        if moments is not None:
            found[row] = moments
        return y

    def _by_sample(
        self,
        x: Tensor,
        residual: Tensor | None,
        rows: list[int],
        act: Activation,
        mask: Tensor | None,
        found: dict[int, Moments],
    ) -> Tensor:
        """Normalize samples of several domains: split them by domain, normalize each part, restore the order."""
        if x.shape[0] != len(rows):
            raise ValueError(
                f"{type(self).__name__}: {len(rows)} domains came for the samples of {describe(x)}; each needs its own"
            )
        groups = Partition(rows, x.device)
        parts = list(zip(groups.present, groups.split(x), groups.split(residual), strict=True))
        for part in parts:
            self._check(*part)
        masks = groups.split(None if mask is None else mask.expand(len(rows), *mask.shape[1:]))
        return groups.join([self._one(*part, act, valid, found) for part, valid in zip(parts, masks, strict=True)])

    def _bank(self, row: int) -> tuple[Tensor | None, Tensor | None, State]:
        """Weight, bias and state of a domain."""
        state = self._checked()
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if not self.share_affine:
            weight, bias = _row(weight, row), _row(bias, row)
        running_mean, running_var = _row(state.running_mean, row), _row(state.running_var, row)
        batches = _row(state.num_batches_tracked, row)
        return (
            weight,
            bias,
            state._replace(running_mean=running_mean, running_var=running_var, num_batches_tracked=batches),
        )

    def _check(self, row: int, x: Tensor, residual: Tensor | None) -> None:
        """Raise unless the domain can normalize x."""
        weight, bias, state = self._bank(row)
        what = f"{type(self).__name__}, domain {self.domains[row]!r}"
        check_arguments(what, x, residual, weight, bias, state, self._ranks)
        check_channels(what, x, self.num_features)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        expand_rows(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The options, for the layer's repr."""
        return f"domains={list(self.domains)}, share_affine={self.share_affine}, {super().extra_repr()}"


def _row(values: Tensor | None, row: int) -> Tensor | None:
    if values is not None and (values.dim() == 0 or values.shape[0] <= row):
        raise ValueError(
            f"DomainBatchNorm: each domain has a row of weights and running statistics; got {describe(values)}"
        )
    return None if values is None else values[row]


def _rows(found: dict[int, Moments], count: int) -> Moments:
    """Stack the moments of some domains to (D, C); those of the other domains are empty."""
    like = next(iter(found.values())).mean
    parts = [found.get(row) or Moments.empty(len(like), device=like.device) for row in range(count)]
    return Moments(
        torch.stack([part.count.expand_as(part.mean) for part in parts]),
        torch.stack([part.mean for part in parts]),
        torch.stack([part.m2 for part in parts]),
    )
