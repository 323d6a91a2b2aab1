"""The result of ``kn.diagnose``: findings, which rules were run, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelnorm.doctor import report_text, sarif, silencing
from keelnorm.doctor.finding import SEVERITIES, Finding, Severity, rank
from keelnorm.doctor.fixes import Fixed
from keelnorm.doctor.rule import Rule
from keelnorm.engine.error_messages import describe

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Diagnosis:
    """What ``kn.diagnose`` found; prints as a table, worst first.

    Args:
        findings: What was found, worst first, and in the order of the layers.
        rules: The rules that were run, by identifier.
        layers: The paths of the batch norms, in the order in which they run, where that is known.
        skipped: Why rules were not run, by identifier.
        silenced: Findings that ``silence`` covers.
        known: Findings that the baseline has.
        fixed: Findings whose remedy was applied, and what was done.
        notes: Sentences about what could not be seen.
        facts: Facts about the layers and what was measured of them, as plain values, in the order of ``layers``.

    Example:
        >>> import torch, keelnorm as kn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, momentum=0.99), torch.nn.ReLU())
        >>> diagnosis = kn.diagnose(model)
        >>> diagnosis.worst, [(one.rule, one.layers) for one in diagnosis.findings]
        ('warning', [('KN103', ('1',)), ('KN101', ('1',))])
        >>> print(*diagnosis.findings[0].remedy)
        model.get_submodule('1').momentum = 0.01
    """

    findings: tuple[Finding, ...]
    rules: Mapping[str, Rule]
    layers: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    silenced: tuple[Finding, ...] = ()
    known: tuple[Finding, ...] = ()
    fixed: tuple[Fixed, ...] = ()
    notes: Sequence[str] = ()
    facts: Sequence[Mapping[str, Any]] = ()

    @property
    def worst(self) -> Severity | None:
        """The severity of the worst finding; None without findings."""
        return max((finding.severity for finding in self.findings), key=rank, default=None)

    def at_least(self, severity: Severity) -> list[Finding]:
        """The findings that are as severe as this, or more.

        Raises:
            ValueError: There is no such severity.
        """
        if severity not in SEVERITIES:
            raise ValueError(f"at_least: severity must be one of {SEVERITIES}; got {describe(severity)}")
        return [finding for finding in self.findings if finding.is_at_least(severity)]

    def of(self, rule: str) -> list[Finding]:
        """The findings of a rule, by its identifier or name."""
        return [one for one in self.findings if rule in (one.rule, self.rules[one.rule].name)]

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as dicts, lists and plain values, for JSON."""
        return {
            "operation": "diagnose",
            "worst": self.worst,
            "layers": list(self.layers),
            "findings": [{**one.to_dict(), "name": self.rules[one.rule].name} for one in self.findings],
            "rules": list(self.rules),
            "skipped": dict(self.skipped),
            "silenced": [one.to_dict() for one in self.silenced],
            "known": [one.to_dict() for one in self.known],
            "fixed": [{**one.finding.to_dict(), "done": one.done} for one in self.fixed],
            "notes": list(self.notes),
            "facts": [dict(one) for one in self.facts],
        }

    def to_sarif(self, source: tuple[str, int] | None = None) -> dict[str, Any]:
        """The findings as SARIF 2.1.0, which code hosts show.

        Args:
            source: The file in which the model is defined, relative to the root of the repository, and the line. Code
                hosts show a finding there; layers are named too.

        Source:
            OASIS (2020), "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
        """
        return sarif.document(self.findings, self.rules, self.silenced, source)

    def write_baseline(self, path: str | PathLike[str]) -> None:
        """Write all findings to a file; ``kn.diagnose(..., baseline=path)`` then reports only new ones.

        Silenced findings are left out, and findings of the present baseline stay in.
        """
        silencing.write_baseline(path, (*self.findings, *self.known))

    def write_page(self, path: str | PathLike[str]) -> None:
        """Write a page of HTML that loads nothing: the findings, and each layer's drift, noise and gradient.

        Raises:
            ImportError: plotly or jinja2 is missing.
        """
        from keelnorm.doctor.pages.diagnosis_page import diagnosis_document
        from keelnorm.doctor.pages.findings_part import write_document

        write_document("write_page", lambda: diagnosis_document(self), Path(path))

    def __str__(self) -> str:
        return report_text.plain(self)

    def __rich__(self) -> RenderableType:
        return report_text.styled(self)
