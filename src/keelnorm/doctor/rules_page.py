"""Make docs/rules.md from the rules: python -m keelnorm.doctor.rules_page docs/rules.md."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from keelnorm.doctor.case_check import evidence_of
from keelnorm.doctor.known_rules import own_rules
from keelnorm.doctor.rule import Rule

WIDTH = 132
_HEAD = """# Rules of the doctor

What [`kn.diagnose` and `keelnorm doctor`](doctor.md) look for: KN1 in the model and its optimizer, KN2 in what
batches of data show, KN3 in a training step. **error**: results are wrong, or will be. **warning**: it probably
hurts. **info**: it is by design, or costs a little. The severity is that of a rule's worst finding; "when it speaks"
says which finding has which. The code is the remedy of the first example with which the rule is tested. `make rules`
writes this page.
"""


def page(rules: Iterable[Rule]) -> str:
    """The page as Markdown."""
    rules = list(rules)
    table = ["| rule | severity | |", "|---|---|---|", *(_row(rule) for rule in rules)]
    return "\n".join([_HEAD, *table, "", *(line for rule in rules for line in _section(rule))]).rstrip("\n") + "\n"


def _row(rule: Rule) -> str:
    link = f"#{rule.id.lower()}-{rule.name}"
    return f"| [{rule.id} {rule.name}]({link}) | {rule.severity} | {rule.summary} |"


def _section(rule: Rule) -> list[str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the finding on the page is the same at each call
        [first, *_] = rule.check(evidence_of(rule.sick[0]()))
    facts = {
        "Statistic": rule.statistic,
        "When it speaks": rule.threshold,
        "Why": rule.explanation,
        "Source": rule.source,
        "Remedy": rule.remedy,
    }
    fixed = [] if rule.fix is None else ["`fix=True` applies it."]
    return [
        f"## {rule.id} {rule.name}",
        "",
        f"{rule.summary} ({rule.severity})",
        "",
        *(line for name, text in facts.items() for line in _wrapped(f"- **{name}**: {text}")),
        "",
        *_wrapped(" ".join([f"> {first.message}", *fixed])),
        "",
        "<!-- not run: the model is an example of the tests, which run it -->",
        "```python",
        *"\n".join(first.remedy).split("\n"),
        "```",
        "",
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 1:
        raise SystemExit(__doc__)
    Path(given[0]).write_text(page(own_rules().values()), encoding="utf-8")
    print(given[0])


if __name__ == "__main__":
    main()
