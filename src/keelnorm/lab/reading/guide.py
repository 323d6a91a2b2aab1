"""The guide "which normalization when": advice, each with the claims it rests on and what these measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Advice:
    """What to do in a situation.

    Args:
        situation: what the reader has.
        take: what to take, with links from `docs/claims/`.
        claims: the claims that say why; their measured answers stand beside.
    """

    situation: str
    take: str
    claims: tuple[str, ...]


ADVICE = (
    Advice(
        "A convolutional or fully connected network, batches of 16 and more",
        "Batch norm ahead of the activation, and a learning rate that is tuned again: it is higher than without. "
        "`kn.Sequential` or `kn.convert` make it cheap ([layers](../layers.md), [convert](../convert.md)).",
        ("convergence", "learning_rate", "placement", "cost_removed"),
    ),
    Advice(
        "Inputs whose features differ in scale",
        "Batch norm on the input itself; in hidden layers alone it comes too late.",
        ("scales",),
    ),
    Advice(
        "Initialization or hyperparameters that nobody tuned",
        "Batch norm: it makes far more settings work.",
        ("initialization", "hyperparameters"),
    ),
    Advice(
        "Batches of 2 to 8 samples",
        "One of the remedies that the measurement shows to repair it, or group norm "
        "([which one do I need?](../variants.md)).",
        ("batch_size", "small_batches"),
    ),
    Advice(
        "Large batches that generalize worse, or few data",
        "Ghost batch norm or dropout beside batch norm; do not expect much of batch norm's own noise "
        "([small batches](../small_batches.md)).",
        ("regularization", "generalization"),
    ),
    Advice(
        "Data in use that differ from those in training",
        "Group norm, or batch norm with `kn.adapt` on unlabelled data of the new kind, in batches that mix its classes "
        "([adapt](../adapt.md)).",
        ("robustness", "speech"),
    ),
    Advice(
        "A recurrent network",
        "Batch norm with moments of each step's own. Where inputs hardly vary at some steps, look at accuracy with "
        "the batch's own moments beside that with running statistics, and compare with none "
        "([recurrent](../recurrent.md)).",
        ("recurrent",),
    ),
    Advice(
        "A GAN",
        "Batch norm in the generator; in the discriminator mind what shares a batch "
        "([batches before](../batches_before.md)).",
        ("generative",),
    ),
    Advice(
        "A very deep plain network",
        "With ReLU batch norm alone makes gradients grow from layer to layer: use skip connections too.",
        ("gradients",),
    ),
    Advice(
        "A model that is about to be deployed",
        "Evaluation mode with good running statistics (`kn.recalibrate` where in doubt), folded into its neighbours "
        "([recalibrate](../recalibrate.md), [fold](../fold.md)).",
        ("inference", "cost_removed"),
    ),
    Advice(
        "Weight decay on a network with batch norm",
        "Tune it together with the learning rate: ahead of a batch norm it acts through the effective rate. "
        "`kn.param_groups` keeps it off γ and β ([parameters](../elsewhere.md)).",
        ("weight_decay",),
    ),
)


def guide(run: Mapping[str, Any]) -> str:
    """The guide's page, with the answers of a stored run."""
    sections = {section["name"]: section for section in run["sections"]}
    parts = [
        "# Which normalization when",
        "What to take, and the measurements it rests on. Every answer below is copied from a stored run of [the "
        "laboratory](../lab.md); the networks and data are small, so take directions from them and sizes from your own "
        "measurement: `keelnorm lab run --data-dir FOLDER` repeats them on your data.",
    ]
    for advice in ADVICE:
        parts.append(f"## {advice.situation}\n\n{advice.take}")
        parts.append(
            "\n".join(
                f"- [{section['statement']}]({name}.md) **{section['verdict'].capitalize()}.** {section['answer']}"
                for name, section in ((name, sections[name]) for name in advice.claims if name in sections)
            )
        )
    parts.append("[All claims](README.md)")
    return "\n\n".join(parts) + "\n"
