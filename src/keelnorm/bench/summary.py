"""The few numbers that are read first: geometric means over shapes, and totals of a network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import geometric_mean

from keelnorm.bench.cases import RESNET50
from keelnorm.bench.results import Mean, Row, Total


def means(rows: Iterable[Row], peers: Sequence[str]) -> list[Mean]:
    """Geometric means over each suite's shapes, for the given peers.

    A mean is left out when one of its shapes has no number: a mean over fewer shapes is not comparable.
    """
    groups: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.peer in peers:
            setting = (row.gradient, row.dtype, row.pages)
            key = (row.suite, row.layout, row.variant, row.mode, row.peer, *setting)
            groups[key].append(row)
    result = []
    for (suite, layout, variant, mode, peer, gradient, dtype, pages), group in groups.items():
        if any(row.error is not None or row.median_us is None for row in group):
            continue
        others = [name for name in group[0].ratios if all(name in row.ratios for row in group)]
        fractions = [row.copy_fraction for row in group if row.copy_fraction is not None]
        result.append(
            Mean(
                suite=suite,
                layout=layout,
                variant=variant,
                mode=mode,
                peer=peer,
                shapes=len(group),
                ratios={name: geometric_mean([row.ratios[name] for row in group]) for name in others},
                copy_fraction=(geometric_mean(fractions) if len(fractions) == len(group) else None),
                gradient=gradient,
                dtype=dtype,
                pages=pages,
            )
        )
    return result


def totals(rows: Iterable[Row], peers: Sequence[str]) -> list[Total]:
    """The time of all 53 batch norms of ResNet-50; left out unless every one was measured."""
    uses = {
        ("x".join(map(str, plane)), variant): count
        for plane, variants in RESNET50.items()
        for variant, count in variants.items()
    }
    groups: defaultdict[tuple[str, str, str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows:
        key = (row.shape.partition("x")[2], row.variant)
        if row.gradient != "matching" or row.dtype != "float32":
            continue
        if row.suite == "resnet50" and row.peer in peers and row.median_us and key in uses:
            groups[row.layout, row.mode, row.peer, row.pages][key] = row.median_us
    return [
        Total(
            network="ResNet-50",
            layout=layout,
            mode=mode,
            peer=peer,
            layers=sum(uses.values()),
            total_ms=math.fsum(uses[key] * time for key, time in times.items()) / 1000,
            pages=pages,
        )
        for (layout, mode, peer, pages), times in groups.items()
        if times.keys() == uses.keys()
    ]
