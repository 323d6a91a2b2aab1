"""Findings that are not to be reported: silenced for a layer, or known from a baseline file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from keelnorm.doctor.finding import SEVERITIES, Finding, Severity, rank
from keelnorm.doctor.known_rules import rules_named, words_of
from keelnorm.doctor.rule import Rule
from keelnorm.engine.atomic_write import write_text
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe

#: {"KN101": "layer1.*"}, {"KN101": ["layer1.*", "head"]}, "KN101:layer1.*", "KN101", or a list of such strings.
Silence: TypeAlias = str | Iterable[str] | Mapping[str, str | Iterable[str]] | None
_VERSION = 1


class Silenced(NamedTuple):
    """One entry of ``silence``.

    Args:
        written: The entry in words.
        rules: The identifiers of the rules that it names.
        pattern: A pattern for paths, as ``where=`` takes it.
    """

    written: str
    rules: frozenset[str]
    pattern: str

    def covers(self, finding: Finding) -> bool:
        """Whether the entry silences a finding: its rule, and all of its layers."""
        return finding.rule in self.rules and all(_matches(path, self.pattern) for path in finding.layers or ("",))


def read_silence(what: str, silence: Silence, rules: Mapping[str, Rule]) -> list[Silenced]:
    """The entries of ``silence``.

    Raises:
        TypeError: It is of another type.
        ValueError: An entry names no rule.
    """
    if silence is None:
        return []
    if isinstance(silence, Mapping):
        pairs = [
            (rule, pattern)
            for rule, patterns in silence.items()
            for pattern in (
                patterns if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
            )
        ]
    else:
        pairs = [
            (rule, pattern or "*")
            for word in words_of(what, "silence", silence)
            for rule, _, pattern in (word.partition(":"),)
        ]
    for rule, pattern in pairs:
        if not isinstance(rule, str) or not isinstance(pattern, str):
            raise RefusedTypeError(
                f"{what}: silence takes rules and patterns for paths, such as {{'KN101': 'layer1.*'}}; got "
                f"{describe(silence)}"
            )
    return [
        Silenced(f"{rule}:{pattern}", frozenset(rules_named(what, "silence", rule, dict(rules))), pattern)
        for rule, pattern in pairs
    ]


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")


class Baseline:
    """The findings of an earlier run.

    A finding is known if its rule spoke of all its layers then, in one finding or in several, and as severely.

    Args:
        findings: Rule, layers and severity of each.
    """

    def __init__(self, findings: Iterable[tuple[str, Sequence[str], Severity]]) -> None:
        self._worst: dict[tuple[str, str | None], int] = {}
        for rule, layers, severity in findings:
            for layer in layers or (None,):
                self._worst[rule, layer] = max(rank(severity), self._worst.get((rule, layer), 0))

    def covers(self, finding: Finding) -> bool:
        """Whether a finding is known."""
        return all(
            rank(finding.severity) <= self._worst.get((finding.rule, layer), -1) for layer in finding.layers or (None,)
        )


def read_baseline(what: str, path: str | PathLike[str]) -> Baseline:
    """Read a file that :func:`write_baseline` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no baseline.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {content['version']!r}, and {_VERSION} is known")
        known: list[tuple[str, Sequence[str], Severity]] = []
        for entry in content["findings"]:
            if entry["severity"] not in SEVERITIES:
                raise ValueError(f"there is no severity {entry['severity']!r}")
            known.append((str(entry["rule"]), list(map(str, entry["layers"])), entry["severity"]))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{what}: there is no baseline {file}; diagnosis.write_baseline(...) or --write-baseline makes one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedValueError(f"{what}: {file} is no baseline: {type(error).__name__}: {error}") from None
    return Baseline(known)


def write_baseline(path: str | PathLike[str], findings: Sequence[Finding]) -> None:
    """Write findings as JSON, for :func:`read_baseline`; the file is complete or not there."""
    worst: dict[tuple[str, tuple[str, ...]], Finding] = {}
    for finding in findings:
        before = worst.get(finding.identity)
        if before is None or rank(finding.severity) > rank(before.severity):
            worst[finding.identity] = finding
    entries: list[dict[str, Any]] = [
        {"rule": one.rule, "layers": list(one.layers), "severity": one.severity}
        for one in sorted(worst.values(), key=lambda one: one.identity)
    ]
    write_text(Path(path), json.dumps({"version": _VERSION, "findings": entries}, indent=1) + "\n")
