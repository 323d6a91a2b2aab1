"""KN206: batches are not alike, such as batches of one class or one domain each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE
from keelnorm.doctor.rules._examples import data_of, network
from keelnorm.doctor.rules._tests import f_test


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding, at all layers to which batches are not alike."""
    judged = _judged(evidence)
    unlike = {path: _unlike(evidence, path) for path in judged}
    found = {path: (f, p) for path, (f, p) in unlike.items() if p < 0.05 / len(judged)}
    if not found:
        return
    data = evidence.data
    assert data is not None
    worst = max(found, key=lambda path: found[path][0])
    f, samples = found[worst][0], data.samples or 1
    worth = samples / f
    hurts = worth < REFERENCE <= samples or (samples < REFERENCE and f >= 2)
    yield RULE.found(
        found,
        f"The batches are not alike: at {evidence[worst].named} their means vary {f:.3g} times as much as those of "
        f"batches drawn at random, so that {samples} samples are worth {worth:.3g}.",
        _remedy(evidence),
        severity="warning" if hurts else "info",
        evidence={"ratio": f, "samples": samples, "worth": worth, "threshold": REFERENCE, "layer": worst},
        p_value=min(1.0, len(judged) * min(p for _, p in found.values())),
    )


def _judged(evidence: Evidence) -> list[str]:
    """Layers that normalize with the batch, where there are several batches of several samples."""
    if evidence.data is None:
        return []
    layers = [layer for layer in evidence.layers if _trains(layer)]
    seen = evidence.data.as_is
    return [
        layer.path
        for layer in layers
        if layer.path in seen and seen[layer.path].moments.unlike is not None and seen[layer.path].moments.is_finite
    ]


def _trains(layer: LayerFacts) -> bool:
    return layer.training and not layer.held and not layer.fixed


def _unlike(evidence: Evidence, path: str) -> tuple[float, float]:
    """The mean of F over the channels, and the smallest p-value with Bonferroni's correction."""
    assert evidence.data is not None
    moments = evidence.data.as_is[path].moments
    assert moments.unlike is not None
    batches = len(moments.sizes)
    p = f_test(moments.unlike, batches - 1, moments.samples - batches)
    return float(moments.unlike.mean()), min(1.0, len(p) * float(p.min()))


def _tests(evidence: Evidence) -> int:
    return 1 if _judged(evidence) else 0


def _remedy(evidence: Evidence) -> list[str]:
    batches = None if evidence.batches is None else evidence.batches.all
    if isinstance(batches, DataLoader):
        return ["batches = torch.utils.data.DataLoader(batches.dataset, batches.batch_size, shuffle=True)"]
    first = None if evidence.batches is None else evidence.batches.first
    if not isinstance(first, Tensor | tuple | list):
        return ["# shuffle the samples before they are put into batches"]
    whole = isinstance(first, Tensor)
    return [
        f"samples = [sample for batch in batches for sample in {'batch' if whole else 'zip(*batch)'}]",
        f"size = len({'batches[0]' if whole else 'batches[0][0]'})",
        "batches = list(torch.utils.data.DataLoader(samples, size, shuffle=True))",
    ]


def _sorted() -> Case:
    """Bright images come first."""
    x = torch.cat(data_of())
    order = x.mean((1, 2, 3)).argsort()
    return Case(network(), ("1",), list(x[order].split(32)))


def _domains() -> Case:
    """Two sources in turn, with labels."""
    batches = [batch * (1 + index % 2) + 3 * (index % 2) for index, batch in enumerate(data_of())]
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    return Case(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), ("0",), labelled)


def _shuffled() -> Case:
    return Case(network(), batches=data_of())


def _one_batch() -> Case:
    return Case(network(), batches=data_of(batches=1))


def _in_evaluation() -> Case:
    case = _sorted()
    return Case(case.model.eval(), batches=case.batches)


RULE = Rule(
    id="KN206",
    name="unlike-batches",
    severity="warning",
    summary="The batches are not alike, such as batches of one class or one domain each.",
    statistic="One-way analysis of variance of each sample's mean, with batches as groups, per channel of each layer's "
    "input in evaluation: F, the variance of the batches' means over that of batches drawn at random.",
    threshold="If F-tests, corrected over channels and layers and by Holm's method, exclude chance. A warning where a "
    f"batch, n/F samples by its worth, is worth fewer than {REFERENCE}; or F is at least 2 in smaller batches. Else "
    "info. Layers in evaluation do not mind.",
    source=f"Paulson (1942) for the test. {REFERENCE_SOURCE}. Ioffe (2017), arXiv:1702.03275, section 4.3: batches of "
    "few classes.",
    explanation="Each batch is normalized by statistics of its own kind, and the running statistics are those of the "
    "last kinds: training becomes easy, as classes can be told by the batch, and evaluation wrong.",
    remedy="Shuffle the samples. Where kinds belong together, as in domains, give each statistics of its own: "
    "kn.DomainBatchNorm.",
    check=check,
    sick=(_sorted, _domains),
    healthy=(_shuffled, _one_batch, _in_evaluation),
    needs=("data",),
    tests=_tests,
)
