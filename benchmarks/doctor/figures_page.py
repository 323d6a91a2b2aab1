"""The page of the doctor's figures: docs/doctor_figures.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HEAD = """# How well the doctor finds faults

Made by `python -m benchmarks.doctor --data FOLDER --page docs/doctor_figures.md` with the pictures of CIFAR-10.
{number} published networks were trained for {steps} steps, which is a little; each fault was put into a copy of one or
more of them, and the [doctor](doctor.md) got the model, six batches, the loss and the optimizer. A fault is found if a
finding that the healthy network does not have names the layer with the fault; where a fault is the model's, the
data's or the optimizer's as a whole, any such finding counts. "Cured" counts where the finding's remedy ran and the
rule was silent afterwards.
"""


_PUBLISHED = """Every architecture of the [models' table](models.md), on real data in the shape that it takes (pictures
of CIFAR-10, gray ones, volumes of slices that grow brighter, spoken digits), with a head of ten classes: new, and after
{steps} steps of training, in training and in evaluation. {said}
"""


def page(document: Mapping[str, Any], published: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The page as Markdown.

    Args:
        document: The scores of the faults.
        published: What the doctor says of healthy published architectures.
    """
    healthy = document["healthy"]
    lines = [_HEAD.format(number=len(healthy), steps=document["steps"]), *_summary(document), ""]
    for note in document.get("notes", ()):
        lines += [note, ""]
    lines += ["## Healthy networks", "", *_healthy(healthy), ""]
    if published:
        lines += ["## Published architectures, healthy", "", *_published(published), ""]
    titles = {"seen": "Faults that the rules were written for", "unseen": "Faults that were written without the rules"}
    for name, title in titles.items():
        if name in document:
            lines += [f"## {title}", "", *_faults(document[name]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _summary(document: Mapping[str, Any]) -> Iterator[str]:
    yield "| faults | cases | found | remedies that ran | cured |"
    yield "|---|---|---|---|---|"
    for name in ("seen", "unseen"):
        cases: Sequence[Mapping[str, Any]] = document.get(name, ())
        if cases:
            found = [one for one in cases if one["rule"]]
            ran = [one for one in found if one["cured"] is not None]
            cured = sum(one["cured"] for one in ran)
            share = f"{len(found)} ({100 * len(found) / len(cases):.0f} %)"
            yield f"| {name} | {len(cases)} | {share} | {len(ran)} | {cured} |"


def _healthy(healthy: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| network | batch norms | right of 640 | errors | warnings | infos |"
    yield "|---|---|---|---|---|---|"
    for one in healthy:
        severities = [finding["severity"] for finding in one["findings"]]
        counts = " | ".join(str(severities.count(level)) for level in ("error", "warning", "info"))
        yield f"| {one['network']} | {one['layers']} | {100 * one['accuracy']:.0f} % | {counts} |"


def _published(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    levels = [{one["severity"] for one in row["findings"]} for row in rows]
    errors, warned = (sum(level in found for found in levels) for level in ("error", "warning"))
    networks = len({row["network"] for row in rows})
    said = f"Of {len(rows)} diagnoses of {networks} architectures, {errors} have an error and {warned} a warning."
    yield _PUBLISHED.format(steps=max(row["steps"] for row in rows), said=said)
    yield "| architecture | batch norms | new | trained | evaluating |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys(row["network"] for row in rows):
        mine = {row["state"]: row for row in rows if row["network"] == name}
        cells = " | ".join(_rules_of(mine[state]) for state in ("new", "trained", "evaluating"))
        yield f"| {name} | {next(iter(mine.values()))['layers']} | {cells} |"


def _rules_of(row: Mapping[str, Any]) -> str:
    """The rules that spoke, worst first: in bold an error or a warning."""
    found = dict.fromkeys((one["rule"], one["severity"]) for one in row["findings"])
    words = [rule if severity == "info" else f"**{rule} {severity}**" for rule, severity in found]
    return ", ".join(words) or "–"


def _faults(cases: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| fault | cases | found by | missed in | cured | right: healthy, with the fault, after the remedy |"
    yield "|---|---|---|---|---|---|"
    for name in dict.fromkeys(one["fault"] for one in cases):
        mine = [one for one in cases if one["fault"] == name]
        rules = ", ".join(dict.fromkeys(one["rule"] for one in mine if one["rule"]))
        missed = ", ".join(one["network"] for one in mine if not one["rule"])
        cured = sum(bool(one["cured"]) for one in mine)
        yield f"| {name} | {len(mine)} | {rules} | {missed} | {cured} | {_accuracies(mine)} |"


def _accuracies(cases: Sequence[Mapping[str, Any]]) -> str:
    def mean(key: str) -> str:
        values = [one[key] for one in cases if one[key] is not None]
        return f"{100 * sum(values) / len(values):.0f} %" if values else "–"

    return ", ".join(mean(key) for key in ("accuracy", "accuracy_with", "accuracy_cured"))
