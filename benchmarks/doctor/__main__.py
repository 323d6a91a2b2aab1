"""Score the doctor on faults in trained networks: python -m benchmarks.doctor --data FOLDER."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import require_packages
from benchmarks.doctor.figures_page import page
from benchmarks.doctor.scoring import Scored, accuracy, diagnosed, scored
from benchmarks.doctor.seen_faults import FAULTS as SEEN
from benchmarks.doctor.trained import NETWORKS, batches_of, pictures, trained
from benchmarks.doctor.unseen_faults import FAULTS as UNSEEN
from keelnorm.engine.atomic_write import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the faults that the options ask for; 0 always: a missed fault is a figure, and no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doctor", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder with cifar10/train and cifar10/test")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="these alone")
    parser.add_argument("--steps", type=int, default=150, help="of training, for each network")
    parser.add_argument("--each", type=int, default=3, help="networks for each fault")
    parser.add_argument("--faults", choices=("seen", "unseen", "both"), default="both")
    parser.add_argument("--out", type=Path, default=Path("bench-results/doctor.json"))
    parser.add_argument(
        "--note", action="append", default=[], help="a sentence for the page, such as what was changed since"
    )
    parser.add_argument("--published", type=Path, help="the result of benchmarks.doctor.published, for the page")
    parser.add_argument("--page", type=Path, help="write the figures there too")
    options = parser.parse_args(arguments)
    require_packages(options.networks)
    groups = {"seen": SEEN, "unseen": UNSEEN}
    if options.faults != "both":
        groups = {options.faults: groups[options.faults]}
    training, held_out = pictures(options.data, "train", 4000), batches_of(pictures(options.data, "test", 640))
    document = _stored(options.out, options.steps, list(groups))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for index, network in enumerate(options.networks):
        if any(one["network"] == network for one in document["healthy"]):
            print(f"{network}: stored", file=sys.stderr)
            continue
        print(f"{network}: training", file=sys.stderr)
        patient = trained(network, training, options.steps)
        patient.batches = batches_of((training[0][-192:], training[1][-192:]))
        before = diagnosed(patient)
        found: dict[str, list[Scored]] = {name: [] for name in groups}
        for name, faults in groups.items():
            for number, fault in enumerate(faults):
                if (number * options.each - index) % len(options.networks) < options.each:
                    one = scored(fault, network, patient, before, held_out[:10], 1000 * index + number)
                    found[name].append(one)
                    print(f"  {one.rule or 'MISSED':8} {fault.name}: {one.said[:90]}", file=sys.stderr)
        document["healthy"].append({
            "network": network, "accuracy": accuracy(patient.model, held_out), "layers": len(before.layers),
            "findings": [one.to_dict() for one in before.findings],
        })  # fmt: skip
        for name, cases in found.items():
            document[name] += [one.to_dict() for one in cases]
        write_text(options.out, json.dumps(document, indent=1) + "\n")
    document["notes"] = list(dict.fromkeys([*document["notes"], *options.note]))
    write_text(options.out, json.dumps(document, indent=1) + "\n")
    if options.page is not None:
        published = None if options.published is None else json.loads(options.published.read_text(encoding="utf-8"))
        write_text(options.page, page(document, published))
    for name in groups:
        print(f"{name}: {sum(one['rule'] is not None for one in document[name])} of {len(document[name])} found")
    return 0


def _stored(file: Path, steps: int, groups: Sequence[str]) -> dict[str, Any]:
    """What an earlier run has stored: a run that was stopped goes on with the next network."""
    empty: dict[str, Any] = {"torch": torch.__version__, "steps": steps, "notes": [], "healthy": []}
    empty |= {name: [] for name in groups}
    if not file.exists():
        return empty
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if document.keys() != empty.keys() or document["steps"] != steps:
        raise SystemExit(f"{file} is of another run; remove it, or give another --out")
    return document


if __name__ == "__main__":
    sys.exit(main())
