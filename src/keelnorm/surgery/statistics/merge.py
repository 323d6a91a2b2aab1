"""Merge several state_dicts into one whose running statistics are those of all values together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe
from keelnorm.moments import LEAST_FREQUENCY, Moments, wide_dtype
from keelnorm.nn._shared.variant import OWN_SCALE
from keelnorm.surgery.report import Report
from keelnorm.surgery.statistics.compatible_weights import WHAT, Counts, check_states, per_norm

_MEAN, _VAR, _BATCHES = "running_mean", "running_var", "num_batches_tracked"


def merge_statistics(
    state_dicts: Sequence[Mapping[str, Any]], counts: Sequence[Counts], *, local: bool = False
) -> tuple[dict[str, Any], Report]:
    """Merge the state_dicts of models trained apart, with running statistics pooled over all their values.

    A batch norm is found by its keys, ``path.running_mean`` with ``path.running_var``. With n_k values in client k's
    statistics and n = Σ n_k, per channel:

        mean = Σ n_k·mean_k / n
        var = (Σ (n_k − 1)·var_k + Σ n_k·(mean_k − mean)²) / (n − 1)

    with unbiased variances, as running variances are. The second sum is the spread between clients, which an average of
    the variances would leave out. ``num_batches_tracked`` is summed. Statistics that have no counter and are equal in
    all clients are those of a frozen layer, such as torchvision's, and stay. Every other floating-point tensor, γ and β
    included, becomes the mean weighted by n_k; all other entries must be equal.

    Args:
        state_dicts: One for each client, with the same keys and shapes. They are not changed.
        counts: For each client the number of values per channel in its running statistics (N·S for N samples with S
            positions), at least 1: one number, or a sequence with one for each batch norm, in the order of the keys.
            Other tensors are weighted with the sequence's mean. A layer with a row of statistics per step or domain
            uses its count for each row that has seen a batch (``num_batches_tracked``), and 0 for the others.
        local: Whether to leave out every entry of a batch norm (FedBN): load the result with ``strict=False``, and each
            client keeps its own parameters and statistics. Counts are then weights, and need only be positive.

    Returns:
        A state_dict with the order, dtypes and devices of the first, in new memory, and a report with a row for each
        batch norm: the ``spread`` of the clients' means, √(Σ n_k·(mean_k − mean)² / Σ over all values of
        (value − mean)²), as root mean square over the channels, from 0 to 1; and the ``variance ratio`` of the pooled
        variance to the weighted mean of the variances, as mean over the channels.

    Numerics:
        float64 (float32 on devices without it), by :meth:`Moments.merge`. Running statistics that are moving averages
        represent n_k values only approximately; ``kn.accumulate_statistics`` makes them exact.

    Raises:
        TypeError: ``state_dicts`` or ``counts`` has values of another type.
        ValueError: There is no client; counts, keys or shapes do not match; entries that must be equal differ; running
            statistics are not finite. The error names the key and the client's index.

    Example:
        >>> layers = [torch.nn.BatchNorm1d(2, momentum=1.0) for _ in range(2)]
        >>> parts = torch.randn(8, 2), torch.randn(24, 2) + 1
        >>> _ = [layer(part) for layer, part in zip(layers, parts)]
        >>> merged, report = merge_statistics([layer.state_dict() for layer in layers], [8, 24])
        >>> torch.allclose(merged["running_var"], torch.cat(parts).var(0))
        True

    Source:
        Chan, Golub, LeVeque (1979), eq. 2.1, as :class:`Moments`; McMahan et al. (2017), arXiv:1602.05629, algorithm 1,
        for the mean; Li, Jiang, Zhang, Kamp, Dou (2021), "FedBN: Federated Learning on Non-IID Features via Local Batch
        Normalization", arXiv:2102.07623, for ``local``.
    """
    if isinstance(state_dicts, Mapping | torch.nn.Module | Tensor | str) or not isinstance(state_dicts, Iterable):
        raise TypeError(
            f"{WHAT}: state_dicts must be a sequence of state_dicts, one for each client; got {describe(state_dicts)}"
        )
    states = list(state_dicts)
    check_states(states)
    first = states[0]
    paths = [key.removesuffix(_MEAN) for key in first if _is_mean(key) and key.removesuffix(_MEAN) + _VAR in first]
    table = per_norm(counts, len(states), len(paths), 0 if local else 1)
    weights = torch.tensor([sum(row) / len(row) for row in table], dtype=torch.float64)
    weights /= weights.sum()

    pooled: dict[str, Tensor] = {}
    rows = []
    for i, path in enumerate(paths if not local else []):
        merged, row = _pool(states, path, [row[i] for row in table])
        pooled |= merged
        rows.append(row)
    result: dict[str, Any] = OrderedDict()
    for key, value in first.items():
        if local and _in_norm(key, paths):
            continue
        result[key] = (
            pooled[key].to(value, copy=True) if key in pooled else _combine(key, [s[key] for s in states], weights)
        )
    if hasattr(first, "_metadata"):  # the layers' versions, which load_state_dict reads
        result._metadata = first._metadata.copy()  # type: ignore[attr-defined]
    left_out = len(paths) if local else 0
    summary = {"clients": len(states), "batch norms": len(paths), "left out": left_out, "entries": len(result)}
    return result, Report(WHAT, summary, rows)


def _pool(states: list[Mapping[str, Any]], path: str, counts: list[float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pool the running statistics of one batch norm; its merged entries, and its row in the report."""
    if path + "running_cov" in states[0]:
        raise ValueError(
            f"{WHAT}: {path + 'running_cov'!r} is the covariance of a whitening layer, which can't be pooled; pass "
            "local=True to leave all batch norms out"
        )
    for state in states:
        kind = getattr(state, "_metadata", {}).get(path.removesuffix("."), {}).get(OWN_SCALE)
        if kind is not None:
            raise ValueError(
                f"{WHAT}: {path + _VAR!r} belongs to a {kind}, which does not pool as a variance does; pass local=True "
                "to leave all batch norms out"
            )
    moments = {path + name: states[0][path + name] for name in (_MEAN, _VAR)}
    if path + _BATCHES not in states[0] and all(
        torch.equal(state[k], v) for state in states for k, v in moments.items()
    ):
        return moments, {"path": path.removesuffix("."), "spread": 0.0, "variance ratio": 1.0}
    device = states[0][path + _MEAN].device
    parts, within = [], torch.zeros((), dtype=wide_dtype(device), device=device)
    for client, (state, n) in enumerate(zip(states, counts, strict=True)):
        mean, var = (state[path + name].detach().to(device, wide_dtype(device)) for name in (_MEAN, _VAR))
        for name, bad in ((_MEAN, ~mean.isfinite()), (_VAR, ~(var.isfinite() & (var >= 0)))):
            if bad.any():
                raise ValueError(
                    f"{WHAT}: {path + name!r} of client {client} has {int(bad.sum())} values of {bad.numel()} that are "
                    "not finite, or negative variances; leave the client out, or reset its statistics"
                )
        count = _count(n, state.get(path + _BATCHES), mean)
        known = count > 0
        parts.append(Moments(count, torch.where(known, mean, 0), torch.where(known, var * (count - 1), 0)))
        within = within + count * var
    total, n = Moments.merge_all(parts), sum(counts)
    between = sum(part.count * (part.mean - total.mean).square() for part in parts)
    if n < LEAST_FREQUENCY:
        raise ValueError(
            f"{WHAT}: a variance needs more than one value; got counts of {n:g} in all for {path + _VAR!r}"
        )
    spread = torch.where(total.m2 > 0, between / total.m2, 0).mean().sqrt()
    ratio = torch.where(total.m2 > 0, total.var_unbiased * total.count.clamp(min=1) / within, 1).mean()
    # A row that no client has used stays as in the first client.
    mean, var = (states[0][path + name].to(total.mean) for name in (_MEAN, _VAR))
    merged = {
        path + _MEAN: torch.where(total.count > 0, total.mean, mean),
        path + _VAR: torch.where(total.var_unbiased.isnan(), var, total.var_unbiased),
    }
    for name, value in merged.items():
        dtype = states[0][name].dtype
        if not bool(value.to(dtype).isfinite().all()):
            raise ValueError(f"{WHAT}: {name!r} has values that are too large for {dtype}; merge in a wider dtype")
    if path + _BATCHES in states[0]:
        merged[path + _BATCHES] = torch.stack([s[path + _BATCHES].to(device) for s in states]).sum(0)
    row = {"path": path.removesuffix("."), "spread": spread.item(), "variance ratio": ratio.item()}
    return merged, row


def _count(n: float, batches: Any, mean: Tensor) -> Tensor:
    """The number of values in the statistics; for rows of statistics, 0 in rows that have seen no batch."""
    count = mean.new_tensor(n)
    if mean.dim() == 2 and isinstance(batches, Tensor) and batches.shape == mean.shape[:1]:
        return count * (batches.to(mean.device) > 0)[:, None]
    return count


def _combine(key: str, values: list[Any], weights: Tensor) -> Any:
    """Merge an entry that is no running statistic: the weighted mean of the clients' tensors, or the common value."""
    first, *others = values
    if not isinstance(first, Tensor):
        unequal = [client for client, other in enumerate(others, 1) if first != other]
    else:
        others = [other.detach().to(first.device) for other in others]
        unequal = [
            client
            for client, other in enumerate(others, 1)
            if first.dtype != other.dtype or not torch.equal(first, other)
        ]
        if not unequal:
            return first.detach().clone()
        if first.is_floating_point() or first.is_complex():
            wide = torch.promote_types(first.dtype, wide_dtype(first.device))
            start = first.detach().to(wide)
            shares = zip(weights.tolist()[1:], others, strict=True)
            return (start + sum(share * (other.to(wide) - start) for share, other in shares)).to(first.dtype)
    if unequal:
        raise ValueError(
            f"{WHAT}: {key!r} is neither a floating-point tensor nor a batch norm's counter, so it must be equal in "
            f"all clients; clients {unequal} differ from client 0. Make it equal, or remove it from the state_dicts"
        )
    return first


def _is_mean(key: str) -> bool:
    return key == _MEAN or key.endswith(f".{_MEAN}")


def _in_norm(key: str, paths: list[str]) -> bool:
    """Whether an entry belongs to a batch norm; if that is the whole model, only its own entries do."""
    return any(key.startswith(path) if path else "." not in key for path in paths)
