"""What a rule has found: which layers, how bad, why, how sure, and the code that repairs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

#: "error": results are wrong, or will be. "warning": it probably hurts. "info": it is by design, or costs a little.
Severity: TypeAlias = Literal["info", "warning", "error"]
#: The severities, mildest first.
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
#: What evidence consists of: the statistic, its threshold, and other numbers and names.
Plain: TypeAlias = float | int | str | bool | None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with some layers of a model.

    Args:
        rule: The rule's identifier, such as "KN101".
        severity: "info", "warning" or "error".
        layers: The paths of the layers; empty for the model as a whole.
        message: One sentence: what is wrong, where, and by how much.
        evidence: The statistic, the threshold and whatever else led to the finding, by name.
        remedy: Lines of code that repair it. They use ``model``, and where needed ``optimizer`` and ``batches``.
        p_value: The probability of evidence this strong in a healthy model; None for a fact, which needs no test.

    Example:
        >>> finding = Finding("KN103", "warning", ("bn1",), "momentum is 0.99", {"momentum": 0.99})
        >>> finding.identity, finding.is_at_least("warning"), finding.is_at_least("error")
        (('KN103', ('bn1',)), True, False)
    """

    rule: str
    severity: Severity
    layers: tuple[str, ...]
    message: str
    evidence: Mapping[str, Plain] = field(default_factory=dict)
    remedy: tuple[str, ...] = ()
    p_value: float | None = None

    @property
    def identity(self) -> tuple[str, tuple[str, ...]]:
        """What a finding is recognized by in another run: the rule and the layers."""
        return self.rule, self.layers

    def is_at_least(self, severity: Severity) -> bool:
        """Whether the finding is as severe as this, or more."""
        return rank(self.severity) >= rank(severity)

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain values, for JSON; numbers that are not finite become None."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "layers": list(self.layers),
            "message": self.message,
            "evidence": {name: _in_json(value) for name, value in self.evidence.items()},
            "remedy": list(self.remedy),
            "p_value": self.p_value,
        }


def rank(severity: Severity) -> int:
    """The place of a severity: 0 for info, 2 for error."""
    return SEVERITIES.index(severity)


def _in_json(value: Plain) -> Plain:
    return None if isinstance(value, float) and not math.isfinite(value) else value
