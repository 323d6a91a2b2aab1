"""Findings as SARIF 2.1.0, the format in which code hosts take the results of checkers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from keelnorm.doctor.finding import Finding, Severity
from keelnorm.doctor.rule import Rule

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
#: The key of a result's fingerprint; the number changes with what is hashed.
_FINGERPRINT = "keelnormFinding/v1"


def document(
    findings: Sequence[Finding],
    rules: Mapping[str, Rule],
    silenced: Sequence[Finding] = (),
    source: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """A SARIF log with one run.

    Args:
        findings: The results.
        rules: The rules that were run.
        silenced: Results that are marked as suppressed.
        source: The file in which the model is defined, and the line.
    """
    from keelnorm import __version__

    order = list(rules)
    results = [_result(one, order, source) for one in findings]
    results += [_result(one, order, source) | {"suppressions": [{"kind": "external"}]} for one in silenced]
    driver = {
        "name": "keelnorm doctor",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_descriptor(rule) for rule in rules.values()],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _descriptor(rule: Rule) -> dict[str, Any]:
    help_text = f"{rule.explanation}\n\nRemedy: {rule.remedy}\n\nThreshold: {rule.threshold}\n\nSource: {rule.source}"
    return {
        "id": rule.id,
        "name": "".join(part.capitalize() for part in rule.name.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.explanation},
        "help": {"text": help_text, "markdown": help_text},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"tags": ["batch-normalization"]},
    }


def _result(finding: Finding, order: list[str], source: tuple[str, int] | None) -> dict[str, Any]:
    remedy = "\n".join(finding.remedy)
    text = finding.message + (f"\n\nRemedy:\n{remedy}" if remedy else "")
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "ruleIndex": order.index(finding.rule),
        "level": _LEVELS[finding.severity],
        "message": {"text": text},
        "partialFingerprints": {_FINGERPRINT: _fingerprint(finding)},
        "properties": finding.to_dict(),
    }
    location: dict[str, Any] = {}
    if source is not None:
        file, line = source
        location["physicalLocation"] = {"artifactLocation": {"uri": file}, "region": {"startLine": line}}
    if finding.layers:
        location["logicalLocations"] = [{"fullyQualifiedName": path, "kind": "object"} for path in finding.layers]
    if location:
        result["locations"] = [location]
    return result


def _fingerprint(finding: Finding) -> str:
    rule, layers = finding.identity
    return hashlib.sha256("\n".join((rule, *layers)).encode()).hexdigest()[:32]
