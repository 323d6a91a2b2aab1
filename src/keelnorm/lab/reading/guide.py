"""The guide "which normalization when": situations, what one may do in each, and what the findings of a run say of it.

No advice is written by hand: whether an option helps follows from the intervals of its findings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from keelnorm.lab.reading.situations import SITUATIONS, Situation

Judgement = Literal["yes", "no", "it depends", "not shown"]

MEANING: dict[Judgement, str] = {
    "yes": "in all of them",
    "no": "in none, and in at least one it lies wholly on the other side",
    "it depends": "in some, and in some it lies wholly on the other side",
    "not shown": "not in all, and in none on the other side: more seeds or data might tell",
}
#: Conditions that are told in a line; all are on the claim's page.
_TOLD = 6


def judged(outcomes: Sequence[str]) -> Judgement:
    """What the outcomes of all conditions say together; `MEANING` has the rule in words."""
    supports, contradicts = outcomes.count("supports"), outcomes.count("contradicts")
    if supports and supports == len(outcomes):
        return "yes"
    if contradicts:
        return "it depends" if supports else "no"
    return "not shown"


def guide(run: Mapping[str, Any]) -> str:
    """The guide's page, from the findings of a stored run."""
    sections = {section["name"]: section for section in run["sections"]}
    parts = [
        "# Which normalization when",
        "What helps in which situation, as far as [the laboratory](../lab.md) has measured it. Each answer follows "
        "from the 95 % intervals of a stored run, and says in how many of the conditions the interval lies wholly on "
        "the side of what is said:",
        "\n".join(f"- **{word.capitalize()}**: {meaning}." for word, meaning in MEANING.items()),
        "The networks and data are small, so take directions from them and sizes from your own measurement: "
        "`keelnorm lab run --data-dir FOLDER` repeats them on your data.",
    ]
    for situation in SITUATIONS:
        rows = list(_rows(situation, sections))
        if rows:
            head = "| | helps | measured |\n|---|---|---|"
            parts += [f"## {situation.title}", "\n".join([head, *rows])]
            parts += [situation.note] if situation.note else []
            parts += [f"How: {situation.how}."] if situation.how else []
    parts.append("[All claims](README.md)")
    return "\n\n".join(parts) + "\n"


def _rows(situation: Situation, sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for option in situation.options:
        found = option.findings(sections)
        if not found:
            continue
        outcomes = [one["outcome"] for one in found]
        said = f"{judged(outcomes)}, {outcomes.count('supports')} of {len(found)}"
        measured = "; ".join(f"{one['text']} ({one['where']})" for one in found[:_TOLD])
        more = f"; {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        yield f"| [{option.what}]({option.claim}.md) | {said} | {measured}{more} |"
