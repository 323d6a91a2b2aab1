"""A rule of the doctor, and the example models that show what it finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from keelnorm.doctor.finding import SEVERITIES, Finding, Plain, Severity
from keelnorm.engine.error_messages import check_module

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from keelnorm.doctor.evidence.evidence import Evidence
    from keelnorm.doctor.evidence.training_step import Loss

#: What a rule needs that a call of ``diagnose`` may not give: "neighbors" is what stands beside the layers, "batch" the
#: number of samples in a batch, "data" what a run over the batches shows, "step" what a training step does.
Need: TypeAlias = Literal["optimizer", "neighbors", "batch", "data", "step"]
_IDENTIFIER = re.compile(r"[A-Z]+[0-9]+")


@dataclass(frozen=True)
class Case:
    """An example on which a rule is tested: it has to speak on a sick one, and to be silent on a healthy one.

    Args:
        model: The model.
        layers: The layers at which the rule has to find something; empty for the model as a whole.
        batches: Batches of data.
        optimizer: The optimizer.
        loss: Gives the loss, as ``kn.diagnose`` takes it.
        example: An input that shows what stands beside the layers, where there are no batches.
        ranks: The number of processes of torch.distributed that are taken to run.
    """

    model: nn.Module
    layers: tuple[str, ...] = ()
    batches: Sequence[Any] | None = None
    optimizer: Optimizer | None = None
    loss: Loss | None = None
    example: Any = None
    ranks: int = 1


@dataclass(frozen=True)
class Rule:
    """One rule: what it looks at, when it speaks and why, and what to do then.

    Args:
        id: Capitals and digits, such as "KN101".
        name: A short name in small letters with hyphens.
        severity: Of its most severe finding.
        summary: One sentence: what is wrong with a model on which it speaks.
        statistic: What is measured.
        threshold: When it speaks, and why there.
        source: Publications and documentation.
        explanation: Why this hurts.
        remedy: What to do, in words; each finding has it as code.
        check: Gives the findings for the evidence. It changes nothing.
        sick: Functions that make examples on which it speaks.
        healthy: Functions that make examples on which it is silent.
        needs: What it can't do without. It is listed as skipped where that is missing.
        tests: The number of statistical tests that a call of ``check`` makes, by which p-values are corrected.
        in_training: Whether ``kn.Monitor`` asks it while a model trains; not where training mends it by itself, or
            where a training batch does not show it.
        fix: Applies the remedy where that is safe, and says what it did; None if it could not. It may change the model
            and the optimizer. :func:`by_recalibrating` asks for new running statistics of the finding's layers.

    Raises:
        ValueError: The identifier, the name or a severity is not legal, or there is no example.
    """

    id: str
    name: str
    severity: Severity
    summary: str
    statistic: str
    threshold: str
    source: str
    explanation: str
    remedy: str
    check: Callable[[Evidence], Iterable[Finding]]
    sick: tuple[Callable[[], Case], ...]
    healthy: tuple[Callable[[], Case], ...]
    needs: tuple[Need, ...] = ()
    tests: Callable[[Evidence], int] | None = None
    in_training: bool = True
    fix: Callable[[nn.Module, Finding, Evidence], str | None] | None = None

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.id):
            raise ValueError(f"Rule: id must be capitals and digits, such as 'KN101'; got {self.id!r}")
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", self.name):
            raise ValueError(f"Rule {self.id}: name must be words in small letters with hyphens; got {self.name!r}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"Rule {self.id}: severity must be one of {SEVERITIES}; got {self.severity!r}")
        if not (self.sick and self.healthy):
            raise ValueError(f"Rule {self.id}: a rule has at least one sick and one healthy example")

    def found(
        self,
        layers: Iterable[str],
        message: str,
        remedy: Iterable[str],
        *,
        severity: Severity | None = None,
        evidence: Mapping[str, Plain] | None = None,
        p_value: float | None = None,
    ) -> Finding:
        """Make a finding of this rule; its severity is the rule's unless another is given."""
        return Finding(
            self.id, severity or self.severity, tuple(layers), message, dict(evidence or {}), tuple(remedy), p_value
        )


def by_recalibrating(model: nn.Module, finding: Finding, evidence: Evidence) -> str | None:
    """As ``Rule.fix``: the finding's layers get new running statistics, together with those of other rules."""
    check_module("by_recalibrating", model)
    raise NotImplementedError("layers are recalibrated together, after all other fixes")
