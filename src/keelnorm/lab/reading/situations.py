"""What readers have, and what they may do: the lines of the guide, each with the findings that decide on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What stands in for data that were not given, and decides nothing.
_STAND_IN = "stand-in"


@dataclass(frozen=True)
class Option:
    """What one may do, and the findings that say whether it helps.

    Args:
        what: In some words, so that a finding which supports its claim speaks for it.
        claim: The claim's name.
        quantity: What the quantity of its findings begins with.
        where: What their condition contains.
    """

    what: str
    claim: str
    quantity: str
    where: str = ""

    def findings(self, sections: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Its findings in a run; those on a stand-in for data are left out."""
        found = sections.get(self.claim, {}).get("findings", ())
        return [
            one
            for one in found
            if one["quantity"].startswith(self.quantity)
            and self.where in one["where"]
            and _STAND_IN not in one["where"]
        ]


@dataclass(frozen=True)
class Situation:
    """What a reader has.

    Args:
        title: In some words.
        options: What one may do.
        how: Pages that say how, as Markdown.
        note: What has to be known of the measurement.
    """

    title: str
    options: tuple[Option, ...]
    how: str = ""
    note: str = ""


def _small_batch(size: int) -> Situation:
    where, remedy = f"batch {size}", "test accuracy, {} − batch norm"
    options = [
        Option(name, "small_batches", remedy.format(arm), where)
        for name, arm in (
            ("Batch renormalization", "batch renormalization"),
            ("Statistics over the last batches (cross-iteration)", "cross-iteration"),
            ("A moving average of the statistics", "moving average"),
            ("Synchronized statistics over 8 processes", "synchronized over 8"),
            ("Group norm", "group norm"),
        )
    ]
    if size == 2:
        options.append(Option("No normalization at all", "batch_size", "what batch 2 costs: batch norm − none"))
    return Situation(
        f"Batches of {size}, in the place of batch norm as it is",
        tuple(options),
        "[small batches](../small_batches.md), [batches before](../batches_before.md), "
        "[distributed](../distributed.md)",
        f"Measured on fully connected layers, which normalize {size} values a channel; in a convolution positions add "
        "to them.",
    )


SITUATIONS = (
    Situation(
        "A network without normalization, batches of 16 and more",
        (
            Option("Batch norm, to need fewer steps", "convergence", "speed-up: steps to 90 %"),
            Option(
                "Batch norm, for larger learning rates", "learning_rate", "largest rate that learns, batch norm over"
            ),
            Option("Batch norm, for accuracy", "generalization", "test accuracy, batch norm − none"),
            Option(
                "Batch norm in a convolutional network, for accuracy",
                "convolution",
                "test accuracy at each arm's best rate, batch norm − none",
            ),
            Option("Before the activation, not behind it", "placement", "test accuracy, before − after"),
            Option(
                "Before the activation, not at each layer's input",
                "placement",
                "test accuracy, before the activation − at",
            ),
            Option(
                "keelnorm in the place of torch.nn, for time", "cost_removed", "a training step, keelnorm over torch.nn"
            ),
        ),
        "[layers](../layers.md), [convert](../convert.md)",
    ),
    Situation(
        "Inputs whose features differ in scale",
        (
            Option("Batch norm on the input", "scales", "test accuracy, batch norm on the input − raw"),
            Option(
                "Batch norm in hidden layers only", "scales", "test accuracy, batch norm in hidden layers only − raw"
            ),
            Option(
                "On the input, not in hidden layers only",
                "scales",
                "test accuracy, batch norm on the input − in hidden layers only",
            ),
            Option(
                "On the input, not standardized beforehand",
                "scales",
                "test accuracy, batch norm on the input − standardized beforehand",
            ),
        ),
    ),
    Situation(
        "Initialization or hyperparameters that nobody tuned",
        (
            Option("Batch norm, for more initial scales and rates", "initialization", "share of scales and rates"),
            Option(
                "Batch norm, for more settings",
                "hyperparameters",
                "share of settings that reach 90 %, batch norm − none",
            ),
            Option(
                "Batch norm, not layer norm, for more settings",
                "hyperparameters",
                "share of settings that reach 90 %, batch norm − layer norm",
            ),
        ),
    ),
    _small_batch(2),
    _small_batch(4),
    _small_batch(8),
    Situation(
        "Few data",
        (
            Option("Batch norm", "regularization", "test accuracy, batch norm − none"),
            Option(
                "The noise of its statistics",
                "regularization",
                "test accuracy, batch norm − the same without its noise",
            ),
            Option("Batch norm, not dropout", "regularization", "test accuracy, batch norm − dropout"),
            Option(
                "Less dropout where there is batch norm",
                "regularization",
                "what dropout adds: without batch norm − with",
            ),
            Option(
                "Ghost groups of 10, not the whole batch", "regularization", "test accuracy, groups of 10 − batch norm"
            ),
        ),
        "[small batches](../small_batches.md)",
    ),
    Situation(
        "Data in use that differ from those in training",
        (
            Option("Batch norm, not none", "robustness", "accuracy on corrupted images, batch norm − none"),
            Option("Batch norm, not group norm", "robustness", "accuracy on corrupted images, batch norm − group norm"),
            Option("Batch norm with adapted statistics", "robustness", "the remedy: adapted − not adapted"),
            Option("The same, not none", "robustness", "the remedy: adapted − none"),
            Option(
                "Adapted on each batch, sorted by label, not on mixed ones", "robustness", "its limit: each batch by"
            ),
            Option("Adapted statistics for a new speaker", "speech", "the remedy: test accuracy, adapted − batch norm"),
        ),
        "[adapt](../adapt.md)",
    ),
    Situation(
        "A recurrent network",
        (
            Option("Batch norm, for accuracy", "recurrent", "test accuracy, batch-normalized LSTM − LSTM"),
            Option("Batch norm, for bits a character", "recurrent", "bits a character, LSTM − batch-normalized"),
            Option(
                "Initial noise, where inputs hardly vary",
                "recurrent",
                "the remedy: test accuracy, batch-normalized LSTM, initial noise",
            ),
            Option(
                "A large ε, where inputs hardly vary",
                "recurrent",
                "the remedy: test accuracy, batch-normalized LSTM, ε",
            ),
        ),
        "[recurrent](../recurrent.md)",
    ),
    Situation(
        "A generative model",
        (
            Option("Batch norm in a VAE", "generative", "negative ELBO of a VAE, none − batch norm"),
            Option(
                "Batch norm in a GAN's generator",
                "generative",
                "Fréchet distance of a GAN, without batch norm ÷ with it",
            ),
            Option(
                "In the discriminator too", "generative", "Fréchet distance of a GAN, batch norm in G over in G and D"
            ),
            Option(
                "Real and fake in batches of their own, where the discriminator has it",
                "generative",
                "the remedy: batches of their own over one mixed batch",
            ),
        ),
        "[batches before](../batches_before.md)",
    ),
    Situation(
        "A very deep plain network",
        (
            Option("Batch norm, so that gradients keep their size", "gradients", "factor a layer with batch norm"),
            Option("Batch norm, for accuracy", "gradients", "test accuracy after training, batch norm − none"),
        ),
    ),
    Situation(
        "A model that is about to be deployed",
        (
            Option(
                "Recalibrated statistics after a momentum of 0.001",
                "inference",
                "the remedy: kn.recalibrate of momentum",
            ),
            Option("Recalibrated statistics after a batch with Inf", "inference", "the remedy: kn.recalibrate on"),
            Option(
                "Folding, to be as fast as without batch norm",
                "cost_removed",
                "folded inference over the network without batch norm",
            ),
        ),
        "[recalibrate](../recalibrate.md), [fold](../fold.md)",
    ),
    Situation(
        "Weight decay on a network with batch norm",
        tuple(
            Option(
                f"Decay of {which}",
                "weight_decay",
                "test accuracy at the best settings, batch norm, decay − no decay",
                which,
            )
            for which in ("hidden weights", "all weights", "all parameters")
        ),
        "[parameters](../elsewhere.md)",
    ),
)
