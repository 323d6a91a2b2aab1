"""What several rules ask about modes: which layers train, and who looks after their mode."""

from __future__ import annotations

from torch import nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.evidence.layers import LayerFacts


def looked_after(evidence: Evidence, path: str) -> bool:
    """Whether the layer, or a module around it, has a ``train`` of its own, which may keep the layer's mode.

    DistributedDataParallel and other wrappers have one that keeps nothing.
    """
    parts, inside = path.split(".") if path else [], set(evidence.core.modules())
    around = [evidence.model.get_submodule(".".join(parts[:length])) for length in range(len(parts) + 1)]
    return any(
        "train" in vars(module) or type(module).train is not nn.Module.train for module in around if module in inside
    )


def trains(evidence: Evidence, layer: LayerFacts) -> bool:
    """Whether an optimizer step changes the layer; without an optimizer, whether a parameter requires a gradient."""
    if evidence.optimizer is None:
        return bool(layer.trainable)
    trained = trained_parameters(evidence)
    return any(id(value) in trained for value in layer.module.parameters())


def trained_parameters(evidence: Evidence) -> set[int]:
    """The ids of the parameters that the optimizer changes.

    A learning rate of 0 leaves a group out, but not where all have it, as at the start of a warm-up.
    """
    groups = [] if evidence.optimizer is None else evidence.optimizer.param_groups
    moving = [group for group in groups if group.get("lr", 1.0) != 0] or groups
    return {id(value) for group in moving for value in group["params"] if value.requires_grad}


def others_train(evidence: Evidence, layer: LayerFacts) -> bool:
    """Whether a parameter outside of the layer trains."""
    own = {id(value) for value in layer.module.parameters()}
    trained = trained_parameters(evidence) if evidence.optimizer is not None else None
    return any(
        value.requires_grad and id(value) not in own and (trained is None or id(value) in trained)
        for value in evidence.model.parameters()
    )
