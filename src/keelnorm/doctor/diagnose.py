"""``kn.diagnose``: what is wrong with the batch norms of a model, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from keelnorm.control.layer_selection import Where
from keelnorm.doctor.correction import corrected
from keelnorm.doctor.diagnosis import Diagnosis
from keelnorm.doctor.evidence.batches import Batches
from keelnorm.doctor.evidence.evidence import Evidence, check_not_lazy, collect
from keelnorm.doctor.evidence.layers import plain_facts
from keelnorm.doctor.evidence.untouched import untouched
from keelnorm.doctor.finding import Finding, rank
from keelnorm.doctor.fixes import apply_fixes
from keelnorm.doctor.known_rules import all_rules, chosen
from keelnorm.doctor.layer_numbers import numbers_of
from keelnorm.doctor.rule import Rule
from keelnorm.doctor.silencing import Silence, Silenced, read_baseline, read_silence
from keelnorm.engine.error_messages import RefusedTypeError, RefusedValueError, describe
from keelnorm.surgery.statistics.model_inputs import Forward
from keelnorm.surgery.target_layers import batch_norms_in, notes_on, refuse_sharded

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from keelnorm.doctor.evidence.training_step import Loss

WHAT = "diagnose"


def diagnose(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    example: Any = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    select: str | Iterable[str] | None = None,
    ignore: str | Iterable[str] | None = None,
    where: Where = None,
    silence: Silence = None,
    baseline: str | PathLike[str] | None = None,
    fix: bool = False,
    forward: Forward | None = None,
    max_batches: int | None = None,
    progress: bool | None = None,
) -> Diagnosis:
    """Say what is wrong with the batch norms of a model: which layer, why, how sure, and the code that repairs it.

    Each rule looks at what it needs of the model, the optimizer and the batches, and reports findings with a severity:
    "error" where results are wrong or will be, "warning" where something probably hurts, "info" where it is by design
    or costs a little. A rule that lacks something is listed as skipped, with the reason. P-values are corrected over
    all tests of a call, so that a healthy model gets a false finding with a probability of at most 5 %.

    Args:
        model: Any module with batch norms: torch.nn's, keelnorm's, and those of registered classes.
        batches: Batches of data: tensors; tuples or lists that begin with the model's argument; mappings of its
            keywords. They show what stands beside each layer too.
        example: What the model is called with, as in ``kn.fold``: for a model without data, to see what stands beside
            each layer. The numbers in it do not matter.
        loss: For rules about a training step, of which forward and backward run on the first batch: a module such as
            ``nn.CrossEntropyLoss()``, called with the output and the batch's second element; or ``loss(model, batch)``.
        optimizer: The optimizer, for rules about its options.
        select: Only these rules: identifiers ("KN101"), names ("momentum"), beginnings ("KN1"), one or several.
        ignore: Not these rules.
        where: A pattern for the layers' paths, a module's path, or several; None for all.
        silence: Rules that are silent for some layers: {"KN101": "layer1.*"}, or "KN101:layer1.*".
        baseline: A file of :meth:`Diagnosis.write_baseline`; findings in it are not reported again.
        fix: Whether to apply the remedies that are safe. The model and the optimizer are then changed.
        forward: ``forward(model, batch)``, for batches of another kind.
        max_batches: The largest number of batches to take.
        progress: Whether to show a progress bar; None shows it in a terminal if rich is installed.

    Cost:
        The model is run three times on each batch, without gradients, if a rule about data is among those asked for.

    Returns:
        The findings, worst first, and what was not looked at.

    State:
        Without ``fix`` nothing changes, also after an exception: modes, parameters, buffers, gradients, hooks and the
        random generators of torch, NumPy and Python are as before. With it, all fixes are applied or none.

    Raises:
        TypeError: ``model`` is no module, or an argument is of another type.
        ValueError: The model has no batch norm, ``batches`` is empty, or an argument names no rule or layer.
        RuntimeError: The model raised on the example, on a batch or in the training step, and no rule has found why.
        FileNotFoundError: There is no such baseline.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.99), nn.ReLU())
        >>> diagnosis = diagnose(model)
        >>> [(one.rule, one.severity, one.layers) for one in diagnosis.findings]
        [('KN103', 'warning', ('1',))]
        >>> print(*diagnosis.findings[0].remedy)
        model.get_submodule('1').momentum = 0.01
    """
    layers = batch_norms_in(WHAT, model, where)
    _check(model, layers, batches=batches, loss=loss, optimizer=optimizer)
    registry = all_rules()
    rules = {rule.id: rule for rule in chosen(WHAT, select, ignore, registry)}
    silences = read_silence(WHAT, silence, registry.rules)
    known = None if baseline is None else read_baseline(WHAT, baseline)
    with untouched(model):
        given = None if batches is None else Batches(batches, forward, max_batches)
        evidence = collect(
            model, layers, optimizer=optimizer, batches=given, example=example,
            loss=loss if any("step" in rule.needs for rule in rules.values()) else None,
            data=any("data" in rule.needs for rule in rules.values()), progress=progress,
        )  # fmt: skip
        found, skipped = run_rules(list(rules.values()), evidence)
    if evidence.failure is not None and not any(_explains(one, evidence) for one in found):
        raise evidence.failure
    left: list[Finding] = []
    silenced: list[Finding] = []
    old: list[Finding] = []
    for one in _sorted(found, evidence):
        is_silent = any(entry.covers(one) for entry in silences)
        (silenced if is_silent else old if known is not None and known.covers(one) else left).append(one)
    fixed = apply_fixes(left, rules, evidence) if fix else []
    gone = {id(one.finding) for one in fixed}
    return Diagnosis(
        findings=tuple(one for one in left if id(one) not in gone),
        rules={name: rule for name, rule in rules.items() if name not in skipped},
        layers=tuple(layer.path for layer in evidence.layers),
        skipped=skipped,
        silenced=tuple(silenced),
        known=tuple(old),
        fixed=tuple(fixed),
        notes=[*registry.problems, *_notes(evidence, silences, found)],
        facts=[plain_facts(layer) | numbers_of(evidence, layer).known() for layer in evidence.layers],
    )


def run_rules(rules: Sequence[Rule], evidence: Evidence) -> tuple[list[Finding], dict[str, str]]:
    """The findings of rules, with corrected p-values, and why rules were skipped.

    A rule that raises is skipped, and the reason says so: the other rules still report.
    """
    found: list[Finding] = []
    skipped: dict[str, str] = {}
    tests = 0
    for rule in rules:
        reason = evidence.lacks(rule)
        if reason is None:
            try:
                found += _checked(rule, evidence)
                tests += 0 if rule.tests is None else rule.tests(evidence)
            except Exception as error:  # a rule may be another package's
                reason = f"it raised {type(error).__name__}: {error}"
        if reason is not None:
            skipped[rule.id] = reason
    return corrected(found, tests), skipped


def _checked(rule: Rule, evidence: Evidence) -> list[Finding]:
    """The findings of one rule.

    Raises:
        ValueError: A finding is of another rule, or names a layer that is not there.
    """
    paths = {layer.path for layer in evidence.layers}
    found = list(rule.check(evidence))
    for one in found:
        if one.rule != rule.id or not paths.issuperset(one.layers):
            raise ValueError(f"it gave a finding of the rule {one.rule} for the layers {one.layers}")
    return found


def check_model(what: str, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise if there is nothing to judge, or the model can't be run.

    Raises:
        ValueError: There is no batch norm, or a parameter has no shape yet.
        TypeError: The model is sharded.
    """
    if not layers:
        seen = " ".join(notes_on(model))
        raise RefusedValueError(
            f"{what}: there is no batch norm in {type(model).__name__}"
            + (f". {seen}" if seen else "; torch.nn's, keelnorm's and those of kn.surgery.register are known")
        )
    check_not_lazy(what, model)
    refuse_sharded(what, model)


def _check(model: nn.Module, layers: Mapping[str, nn.Module], *, batches: Any, loss: Any, optimizer: Any) -> None:
    check_model(WHAT, model, layers)
    if loss is not None and not callable(loss):
        raise RefusedTypeError(f"diagnose: loss must be a module or loss(model, batch); got {describe(loss)}")
    if loss is not None and batches is None:
        raise RefusedValueError("diagnose: loss= needs batches=, of which the first is what a training step runs on")
    if optimizer is not None and not isinstance(getattr(optimizer, "param_groups", None), list):
        raise RefusedTypeError(f"diagnose: optimizer must be a torch.optim.Optimizer; got {describe(optimizer)}")


def _explains(finding: Finding, evidence: Evidence) -> bool:
    """Whether a finding may be why the model raised: an error, or a warning at a layer in which it raised."""
    if finding.severity == "error":
        return True
    return finding.severity == "warning" and any(evidence.raised_in(evidence[path].module) for path in finding.layers)


def _sorted(findings: list[Finding], evidence: Evidence) -> list[Finding]:
    """Worst first; of equal severity by rule, then in the order of the layers."""
    order = {layer.path: index for index, layer in enumerate(evidence.layers)}
    return sorted(
        findings,
        key=lambda one: (-rank(one.severity), one.rule, min((order[path] for path in one.layers), default=-1)),
    )


def _notes(evidence: Evidence, silences: list[Silenced], found: list[Finding]) -> list[str]:
    notes = notes_on(evidence.model)
    if evidence.failure is not None:
        return [*notes, f"{str(evidence.failure).removeprefix('diagnose: ').capitalize()}."]
    notes += _notes_on_data(evidence)
    unseen = [layer for layer in evidence.layers if layer.beside is None]
    ran = any(layer.beside is not None and layer.beside.observed for layer in evidence.layers)
    if unseen and not ran:
        notes.append(
            f"What stands beside {len(unseen)} of {len(evidence.layers)} batch norms is not known: batches= or "
            "example= show it."
        )
    elif unseen:
        notes.append(f"Not called in the run: {', '.join(layer.path for layer in unseen[:8])}.")
    idle = [entry.written for entry in silences if not any(entry.covers(one) for one in found)]
    return notes + [f"silence={written!r} covers no finding." for written in idle]


def _notes_on_data(evidence: Evidence) -> list[str]:
    """What the batches could not show."""
    data, step = evidence.data, evidence.step
    notes = [] if step is None or step.untried is None else [f"The next update is not known: {step.untried}."]
    if data is None:
        return notes
    if not data.is_same:
        notes.append(
            "The loader gives other batches in each pass, so outputs with other statistics were not compared (KN202)."
        )
    called = [layer.path for layer in evidence.layers if layer.beside is not None and layer.beside.observed]
    unknown = [path for path in called if path not in data.as_is]
    if unknown:
        notes.append(f"Not judged by data, since called with weights or in another shape: {', '.join(unknown[:8])}.")
    return notes
