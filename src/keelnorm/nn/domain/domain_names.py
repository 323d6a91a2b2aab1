"""Names of domains, and the rows of the banks that a call means by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from keelnorm.engine.error_messages import describe, is_count

#: One domain for all samples, by name or number; or a number per sample, int64 (N,).
Domain: TypeAlias = str | int | Tensor


def names_of(what: str, domains: Any) -> tuple[str, ...]:
    """The names of the domains that a constructor was given; "0", "1", ... for a number of them.

    Raises:
        ValueError: These are no distinct names and no number.
    """
    if is_count(domains):
        return tuple(map(str, range(domains)))
    if (
        isinstance(domains, Sequence)
        and not isinstance(domains, str)
        and all(isinstance(name, str) for name in domains)
    ):
        names = tuple(domains)
        if names and len(set(names)) == len(names):
            return names
    raise ValueError(f"{what}: domains are distinct names in a list, or their number; got {describe(domains)}")


def rows_of(what: str, domains: Sequence[str], domain: Any) -> int | list[int]:
    """The row of a domain, or the row of each sample.

    Raises:
        TypeError, ValueError: No domain was given, or one that does not exist.
    """
    if isinstance(domain, Tensor) and domain.dtype == torch.int64 and domain.dim() == 1 and len(domain) > 0:
        given: list[int] = domain.tolist()
        if min(given) >= 0 and max(given) < len(domains):
            return given
        came = f"numbers from {min(given)} to {max(given)}"
    elif isinstance(domain, str) and domain in domains:
        return domains.index(domain)
    elif isinstance(domain, int) and not isinstance(domain, bool) and 0 <= domain < len(domains):
        return domain
    else:
        came = describe(domain)
    legal = f"one of {list(domains)}, a number from 0 to {len(domains) - 1}, or an int64 tensor (N,) of these"
    if domain is None:
        raise ValueError(
            f"{what}: which domain? Call the layer with domain=..., or the model inside "
            f"`with use_domain(model, ...)`; legal are {legal}"
        )
    kind = ValueError if isinstance(domain, str | int | Tensor) else TypeError
    raise kind(f"{what}: the domain must be {legal}; got {came}")
