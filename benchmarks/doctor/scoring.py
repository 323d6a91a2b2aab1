"""Put a fault into a trained network, and see whether the doctor finds it, and whether its remedy cures it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import keelnorm
from benchmarks.doctor.fault import Batch, Fault, Patient
from benchmarks.doctor.put_into import norms_of
from benchmarks.doctor.trained import copied
from keelnorm.doctor import Diagnosis, Finding


@dataclass
class Scored:
    """What became of a fault in a network.

    Args:
        fault: The fault's name.
        network: The network's name.
        rule: The rule that found it at the right layer; None if none did.
        severity: Of that finding.
        said: What it says, or what the doctor found instead.
        cured: Whether the rule is silent at these layers after the remedy; None without a remedy that could run.
        accuracy: Right predictions on held-out pictures, before the fault.
        accuracy_with: With the fault.
        accuracy_cured: After the remedy.
    """

    fault: str
    network: str
    rule: str | None
    severity: str | None
    said: str
    cured: bool | None
    accuracy: float
    accuracy_with: float
    accuracy_cured: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnosed(patient: Patient) -> Diagnosis:
    """The diagnosis of a patient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keelnorm.diagnose(
            patient.model, patient.batches, loss=patient.loss, optimizer=patient.optimizer, progress=False
        )


def accuracy(model: nn.Module, held_out: Sequence[Batch]) -> float:
    """The share of right predictions in evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).double() for x, y in held_out]
    for module, mode in modes:
        module.training = mode
    return float(torch.cat(right).mean())


def scored(
    fault: Fault, network: str, healthy: Patient, before: Diagnosis, held_out: Sequence[Batch], seed: int
) -> Scored:
    """Put a fault into a copy of a healthy patient, and score the diagnosis.

    Args:
        fault: The fault.
        network: The network's name.
        healthy: The patient.
        before: Its diagnosis: what it says already is no finding of the fault.
        held_out: Batches for the accuracy.
        seed: For the layer, and for what the fault draws.
    """
    patient = copied(healthy)
    torch.manual_seed(seed)
    layers = list(norms_of(patient.model))
    path = layers[int(torch.randint(len(layers), (1,)))]
    expected = fault.put(patient, path)
    kept = {(one.rule, one.layers, one.severity) for one in before.findings}
    try:
        found = [one for one in diagnosed(patient).findings if (one.rule, one.layers, one.severity) not in kept]
    except RuntimeError as error:
        return Scored(
            fault.name, network, None, None, f"raised {error}", None, accuracy(healthy.model, held_out), 0.0, None
        )
    right = [one for one in found if not expected or expected & set(one.layers)]
    said = right[0].message if right else "; ".join(one.message for one in found) or "nothing"
    result = Scored(
        fault.name, network, right[0].rule if right else None, right[0].severity if right else None, said, None,
        accuracy(healthy.model, held_out), _accuracy_or_none(patient, held_out) or 0.0, None,
    )  # fmt: skip
    if right:
        result.cured = _cured(patient, right)
        result.accuracy_cured = _accuracy_or_none(patient, held_out)
    return result


def _accuracy_or_none(patient: Patient, held_out: Sequence[Batch]) -> float | None:
    try:
        return accuracy(patient.model, held_out)
    except (RuntimeError, ValueError, AttributeError, TypeError):  # a fault may leave no model that runs
        return None


def _cured(patient: Patient, findings: Sequence[Finding]) -> bool | None:
    """Run the remedies of all right findings of the first one's rule; whether the rule is silent then."""
    rule = findings[0].rule
    names: dict[str, Any] = {
        "model": patient.model, "optimizer": patient.optimizer, "batches": patient.batches, "loss": patient.loss,
        "torch": torch, "nn": nn, "kn": keelnorm,
    }  # fmt: skip
    mine = [one for one in findings if one.rule == rule]
    try:
        for remedy in dict.fromkeys(one.remedy for one in mine):
            exec("\n".join(remedy), names)
        patient.model, patient.optimizer = names["model"], names["optimizer"]
        patient.batches, patient.loss = names["batches"], names["loss"]
        after = diagnosed(patient).findings
    except Exception:
        return None
    layers = {path for one in mine for path in one.layers}
    return not any(one.rule == rule and (not layers or layers & set(one.layers)) for one in after)
