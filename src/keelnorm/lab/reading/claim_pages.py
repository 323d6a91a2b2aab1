"""The documentation's pages of claims, made from a stored run so that they can't differ from what was measured.

    python -m keelnorm.lab.reading.claim_pages RUN.json FOLDER

`RUN.json` is what `keelnorm lab run --full --json` printed. The part that pages are made of is kept in FOLDER/run.json.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keelnorm.lab.reading.guide import guide

Plain = Mapping[str, Any]

STORED = "run.json"
INDEX = "README.md"
GUIDE = "which_normalization.md"
_KEPT = (
    "name", "number", "title", "statement", "question", "literature", "sources", "criterion", "earlier", "data",
    "verdict", "answer", "findings", "tables", "setup", "notes", "command",
)  # fmt: skip


def kept(document: Plain) -> dict[str, Any]:
    """The part of a document that pages are made of."""
    sections = []
    for section in document["sections"]:
        part = {key: section[key] for key in _KEPT}
        part["command"] = _without_folder(part["command"])
        part["pictures"] = [
            {"title": figure["title"], "description": figure["description"]} for figure in section["figures"]
        ]
        sections.append(part)
    facts = {key: document[key] for key in ("format", "plan", "environment", "run", "verdicts")}
    return {**facts, "command": _without_folder(document["command"]), "sections": sections}


def _without_folder(command: str) -> str:
    """The command without the place where the data lay on the machine that measured."""
    return re.sub(r"--data-dir ('[^']*'|\S+)", "--data-dir FOLDER", command)


def pages(run: Plain) -> dict[str, str]:
    """The text of every page of a stored run, by file name."""
    sections = run["sections"]
    made = {f"{section['name']}.md": page(section, run) for section in sections}
    return made | {INDEX: index(run), GUIDE: guide(run)}


def criterion_text(section: Plain) -> str:
    """The criterion of a claim, and those before it."""
    if not section["earlier"]:
        return f"**Fixed beforehand.** {section['criterion']}"
    changes = [
        f"**Criterion changed on {one['changed']}, after results had been seen.** {one['why']} It was: {one['text']}"
        for one in section["earlier"]
    ]
    return "\n\n".join([f"**Criterion.** {section['criterion']}", *changes])


def index(run: Plain) -> str:
    """The table of all claims."""
    rows = [
        [
            str(section["number"]),
            f"[{_cell(section['statement'])}]({section['name']}.md)",
            section["verdict"],
            "<br>".join(_finding(each) for each in section["findings"] if each["decisive"]),
        ]
        for section in run["sections"]
    ]
    meanings = "\n".join(f"- **{verdict}**: {meaning}." for verdict, meaning in run["verdicts"].items())
    return f"""# What is said about batch normalization, and what was measured

Each claim was measured by `{run["command"]}`; this page and those it leads to are made from what that run stored
([{STORED}]({STORED})). The same command measures on your machine, and [draws all of it](../lab.md). Brackets are 95 %
intervals over seeds. [Which normalization when](which_normalization.md) follows from it.

{table(["", "claim", "verdict", "effects that decide"], rows)}

{meanings}

{_machine(run)}
"""


def page(section: Plain, run: Plain) -> str:
    """One claim."""
    findings = [
        [each["where"], each["quantity"], each["text"], _threshold(each), each["outcome"] + _aside(each)]
        for each in section["findings"]
    ]
    parts = [
        f"# {section['title']}",
        f"> {section['statement']}",
        f"**{section['verdict'].capitalize()}.** {section['answer']}",
        table(["condition", "what was compared", "effect", "the claim says", "outcome"], findings),
    ]
    if section["pictures"]:
        parts.append("In the page that the command below draws:")
        parts.append("\n".join(f"- **{each['title']}.** {each['description']}" for each in section["pictures"]))
    parts += [f"## {each['caption']}\n\n{table(each['columns'], each['rows'])}" for each in section["tables"]]
    if section["notes"]:
        parts.append("## To read it right\n\n" + "\n".join(f"- {note}" for note in section["notes"]))
    setup = "\n".join(f"- **{term}**: {text}" for term, text in section["setup"])
    sources = "\n".join(f"- [{source['text']}]({source['url']})" for source in section["sources"])
    parts += [
        f"## How it was measured\n\n{setup}\n- **Data it can use**: {', '.join(section['data'])}",
        criterion_text(section),
        f"```sh\n{section['command']}\n```",
        f"## Literature\n\n{section['literature']}\n\n{sources}",
        _machine(run),
        f"[All claims]({INDEX})",
    ]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _finding(finding: Plain) -> str:
    return f"{finding['text']} ({finding['quantity']}; {finding['where']}): {finding['outcome']}"


def _threshold(finding: Plain) -> str:
    unit = "×" if finding["unit"] == "×" else ""
    return f"{'>' if finding['larger'] else '<'} {unit}{finding['threshold']:g}"


def _aside(finding: Plain) -> str:
    return "" if finding["decisive"] else " (aside)"


def _machine(run: Plain) -> str:
    facts = run["environment"]
    return (
        f"Measured on {facts['processor']}, {facts['cores']} cores, with torch {facts['torch']} and keelnorm "
        f"{facts['keelnorm']}."
    )


def write_pages(run: Plain, folder: Path) -> list[Path]:
    """Write run.json and every page into a folder, and remove pages of claims that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pages(run) | {STORED: json.dumps(run, ensure_ascii=False, indent=1) + "\n"}
    for old in {path.name for path in folder.glob("*.md")} - made.keys():
        (folder / old).unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(folder / name for name in made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pages of a run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) != 2:
        raise SystemExit(__doc__)
    document = json.loads(Path(given[0]).read_text(encoding="utf-8"))
    for path in write_pages(kept(document), Path(given[1])):
        print(path)


if __name__ == "__main__":
    main()
