"""Check a rule on its own examples; tests of keelnorm and of packages with rules of their own call it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from keelnorm.doctor.diagnose import run_rules
from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.evidence import Evidence, collect
from keelnorm.doctor.evidence.untouched import untouched
from keelnorm.doctor.finding import Finding, rank
from keelnorm.doctor.fixes import apply_fixes
from keelnorm.doctor.rule import Case, Rule
from keelnorm.engine.error_messages import RefusedTypeError, describe
from keelnorm.surgery.target_layers import batch_norms_in


def check_rule(rule: Rule) -> None:
    """Check a rule on all of its examples.

    Raises:
        AssertionError: On a sick one it finds nothing, or at other layers, or still speaks after its remedy; on a
            healthy one it speaks; or it changes the model.
        TypeError: It is not a rule.
    """
    if not isinstance(rule, Rule):
        raise RefusedTypeError(f"check_rule: rule must be a keelnorm.doctor.Rule; got {describe(rule)}")
    for make in rule.sick:
        check_sick(rule, make)
    for make in rule.healthy:
        check_healthy(rule, make)


def check_sick(rule: Rule, make: Callable[[], Case]) -> list[Finding]:
    """Check that a rule finds an example's layers, and is silent after its remedy and after its fix.

    Raises:
        AssertionError: As :func:`check_rule`.
    """
    name = f"{rule.id} on {make.__name__}"
    case = make()
    findings = _unchanging(rule, case, name)
    if not findings:
        raise AssertionError(f"{name}: nothing was found")
    layers = {path for finding in findings for path in finding.layers}
    if layers != set(case.layers):
        raise AssertionError(f"{name}: found at {sorted(layers)}, and is at {sorted(case.layers)}")
    for finding in findings:
        if finding.rule != rule.id or rank(finding.severity) > rank(rule.severity) or not finding.remedy:
            raise AssertionError(f"{name}: {finding} is of another rule, too severe, or has no remedy")
    cured = _remedied(case, findings)
    if left := _findings(rule, cured):
        raise AssertionError(f"{name}: after the remedy it still says {left[0].message}")
    if rule.fix is not None:
        _check_fix(rule, make(), name)
    return findings


def check_healthy(rule: Rule, make: Callable[[], Case]) -> None:
    """Check that a rule is silent on an example.

    Raises:
        AssertionError: It is not, or it changes the model.
    """
    name = f"{rule.id} on {make.__name__}"
    if findings := _unchanging(rule, make(), name):
        raise AssertionError(f"{name}: {findings[0].message}")


def evidence_of(case: Case) -> Evidence:
    """The evidence for an example; the model is as before."""
    with untouched(case.model):
        return _evidence_of(case, data=True)


def _evidence_of(case: Case, *, data: bool) -> Evidence:
    given = None if case.batches is None else Batches(case.batches)
    layers = batch_norms_in("diagnose", case.model, None)
    return collect(
        case.model, layers, optimizer=case.optimizer, batches=given, example=case.example, ranks=case.ranks,
        loss=case.loss, data=data,
    )  # fmt: skip


def _findings(rule: Rule, case: Case) -> list[Finding]:
    with untouched(case.model):
        found, skipped = run_rules([rule], _evidence_of(case, data="data" in rule.needs))
    if skipped:
        raise AssertionError(f"{rule.id} was skipped: it {skipped[rule.id]}")
    return found


def _unchanging(rule: Rule, case: Case, name: str) -> list[Finding]:
    """The findings, with a check that nothing else has changed."""
    before = fingerprint(case)
    findings = _findings(rule, case)
    after = fingerprint(case)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if changed:
        raise AssertionError(f"{name}: it changed {', '.join(sorted(changed))}")
    return findings


def fingerprint(case: Case) -> dict[str, Any]:
    """All that a diagnosis must not change, by name."""
    facts: dict[str, Any] = {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's generator": repr(np.random.get_state()),
        "python's generator": random.getstate(),
    }
    for path, module in case.model.named_modules():
        hooks = [value for key, value in vars(module).items() if key.endswith("hooks")]
        facts[f"{path}: mode, hooks and attributes"] = (module.training, repr(hooks), sorted(vars(module)))
    for name, value in (*case.model.named_parameters(), *case.model.named_buffers()):
        grad = None if value.grad is None else (id(value.grad), value.grad._version)
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        facts[name] = (id(value), value.requires_grad, grad, value.dtype, raw)
    if case.optimizer is not None:
        facts["optimizer"] = repr(case.optimizer.state_dict())
    return facts


def _remedied(case: Case, findings: list[Finding]) -> Case:
    """The example after the remedies were run as code."""
    import keelnorm

    batches = [case.example] if case.batches is None and case.example is not None else case.batches
    names: dict[str, Any] = {
        "model": case.model, "optimizer": case.optimizer, "batches": batches, "loss": case.loss,
        "torch": torch, "nn": nn, "kn": keelnorm,
    }  # fmt: skip
    for remedy in dict.fromkeys(finding.remedy for finding in findings):
        exec("\n".join(remedy), names)
    return Case(names["model"], (), names["batches"], names["optimizer"], names["loss"], case.example, case.ranks)


def _check_fix(rule: Rule, case: Case, name: str) -> None:
    """Check that what was fixed is no longer found."""
    evidence = evidence_of(case)
    found, _ = run_rules([rule], evidence)
    fixed = [one.finding.identity for one in apply_fixes(found, {rule.id: rule}, evidence)]
    left = [one.identity for one in _findings(rule, case) if one.identity in fixed]
    if left:
        raise AssertionError(f"{name}: its fix said that it was done, and it still finds {left[0]}")
