"""KN212: the last batch has one sample, or very few."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.utils.data import DataLoader

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._drift import REFERENCE, REFERENCE_SOURCE
from keelnorm.doctor.rules._examples import data_of, network


def check(evidence: Evidence) -> Iterator[Finding]:
    """One finding, at the layers that normalize with the batch, if the last one is shorter than 16 samples."""
    data = evidence.data
    if data is None or not data.complete or len(data.sizes) < 2 or data.samples is None:
        return
    last = data.sizes[-1]
    trained = [layer for layer in evidence.layers if layer.training and not layer.held and not layer.fixed]
    trained = [layer for layer in trained if getattr(layer.module, "too_few", "error") == "error"]
    if last is None or last >= min(REFERENCE, data.samples) or not trained:
        return
    alone = [layer for layer in trained if last == 1 and _has_one_value(evidence, layer.path)]
    what = f"{last} sample{'s' * (last != 1)}"
    why = "torch.nn's layers raise on one value per channel" if alone else "it counts as much as a full one"
    yield RULE.found(
        (layer.path for layer in alone or trained),
        f"The last batch has {what}, and the others up to {data.samples}: {why}.",
        [
            "batches = torch.utils.data.DataLoader(batches.dataset, batches.batch_size, shuffle=True, drop_last=True)"
            if isinstance(evidence.batches and evidence.batches.all, DataLoader)
            else "batches = batches[:-1]  # in a DataLoader: drop_last=True"
        ],
        severity="error" if alone else "warning" if last == 1 else "info",
        evidence={"last": last, "samples": data.samples, "threshold": min(REFERENCE, data.samples)},
    )


def _has_one_value(evidence: Evidence, path: str) -> bool:
    """Whether the layer's input has no positions, so that one sample is one value per channel."""
    seen = None if evidence.data is None else evidence.data.as_is.get(path)
    return seen is not None and seen.moments.values == seen.moments.samples


def _of_one() -> Case:
    x = [batch.flatten(1)[:, :3] for batch in data_of(batches=2)]
    return Case(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), ("1",), [*x, x[0][:1]])


def _one_image() -> Case:
    batches = data_of(batches=2)
    return Case(network(), ("1", "4"), [*batches, batches[0][:1]])


def _few() -> Case:
    batches = data_of(batches=2)
    return Case(network(), ("1", "4"), [*batches, batches[0][:5]])


def _full() -> Case:
    return Case(network(), batches=data_of(batches=3))


def _a_bit_shorter() -> Case:
    batches = data_of(batches=2)
    return Case(network(), batches=[*batches, batches[0][:20]])


def _in_evaluation() -> Case:
    case = _of_one()
    return Case(case.model.eval(), batches=case.batches)


RULE = Rule(
    id="KN212",
    name="short-last-batch",
    severity="error",
    summary="The last batch has one sample, or very few.",
    statistic="The number of samples of the last batch, in training, where all batches were seen.",
    threshold=f"Below {REFERENCE} and below that of the others. An error where it is one sample without positions, "
    "which has no variance; a warning for one sample with positions; else info.",
    source=f'torch.nn.BatchNorm1d raises "Expected more than 1 value per channel". {REFERENCE_SOURCE}.',
    explanation="The last batch is normalized by its own noise, and its statistics enter those of the layer with the "
    "same weight as those of a full batch.",
    remedy="Drop it: drop_last=True. keelnorm's layers have too_few='running' and 'skip' for one value.",
    check=check,
    sick=(_of_one, _one_image, _few),
    healthy=(_full, _a_bit_shorter, _in_evaluation),
    needs=("data",),
    in_training=False,
)
