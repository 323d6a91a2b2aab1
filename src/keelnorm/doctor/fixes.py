"""Apply the safe remedies of findings: all of them, or none if one raises."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Rule, by_recalibrating
from keelnorm.surgery.snapshot import all_or_nothing
from keelnorm.surgery.statistics.collect import reason_to_leave
from keelnorm.surgery.statistics.recalibrate import recalibrate

if TYPE_CHECKING:
    from keelnorm.doctor.evidence.evidence import Evidence
    from keelnorm.doctor.evidence.layers import LayerFacts


class Fixed(NamedTuple):
    """A finding whose remedy was applied, and what was done."""

    finding: Finding
    done: str


def apply_fixes(findings: Sequence[Finding], rules: Mapping[str, Rule], evidence: Evidence) -> list[Fixed]:
    """Apply the fixes of the findings' rules; new running statistics come last, for all layers together.

    Raises:
        Whatever a fix raises. The model and the optimizer are then as before.
    """
    with _all_or_nothing(evidence):
        done, waiting = [], []
        for finding in findings:
            fix = rules[finding.rule].fix
            if fix is by_recalibrating:
                waiting.append(finding)
            elif fix is not None:
                said = fix(evidence.model, finding, evidence)
                if said is not None:
                    done.append(Fixed(finding, said))
        return done + _recalibrated(waiting, evidence)


def _recalibrated(findings: list[Finding], evidence: Evidence) -> list[Fixed]:
    """Set the running statistics of all layers of the findings from the batches."""
    if evidence.batches is None:
        return []
    possible = [
        one for one in findings if one.layers and all(_can_be_recalibrated(evidence[path]) for path in one.layers)
    ]
    layers = {path for finding in possible for path in finding.layers}
    if not layers:
        return []
    modules = {evidence[path].module for path in layers}
    batches = evidence.batches
    _, report = recalibrate(
        evidence.model,
        batches.all,
        where=lambda _, layer: layer in modules,
        forward=batches.forward,
        max_batches=batches.most,
        progress=False,
    )
    done = f"its running statistics were set to those of {report.summary['batches']} batches"
    return [Fixed(finding, done) for finding in possible]


def _can_be_recalibrated(layer: LayerFacts) -> bool:
    """Whether the batches reach the layer, and its statistics are those of its input."""
    reached = layer.beside is not None and layer.beside.observed
    return reached and reason_to_leave(layer.module) is None  # type: ignore[arg-type]


@contextmanager
def _all_or_nothing(evidence: Evidence) -> Iterator[None]:
    """If the block raises, put back the model's structure, its batch norms and the optimizer's groups."""
    model, optimizer = evidence.model, evidence.optimizer
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    own = [parameter for layer in evidence.layers for parameter in layer.module.parameters()]
    memory = [(parameter, parameter.data) for parameter in own]  # its dtype may change
    groups = [] if optimizer is None else [(group, dict(group)) for group in optimizer.param_groups]
    lists = [(group["params"], list(group["params"])) for group, _ in groups]
    try:
        with all_or_nothing(model.modules(), (*own, *model.buffers())):
            yield
    except BaseException:
        for parameter, data in memory:
            parameter.data = data
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        if optimizer is not None:
            optimizer.param_groups[:] = [group for group, _ in groups]
        for group, content in groups:
            group.clear()
            group.update(content)
        for parameters, members in lists:
            parameters[:] = members
        raise
