"""KN307: the optimizer has the parameters of a layer, and a training step gives them no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from keelnorm.doctor.evidence.evidence import Evidence
from keelnorm.doctor.finding import Finding
from keelnorm.doctor.rule import Case, Rule
from keelnorm.doctor.rules._examples import batches_of


def check(evidence: Evidence) -> Iterator[Finding]:
    """Each layer that a step calls, whose parameters are the optimizer's and get no gradient."""
    step, optimizer = evidence.step, evidence.optimizer
    assert step is not None and optimizer is not None
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    for layer in evidence.layers:
        if layer.path not in step.without_gradient or not any(id(one) in held for one in layer.module.parameters()):
            continue
        yield RULE.found(
            (layer.path,),
            f"A training step calls {layer.named}, whose parameters are the optimizer's, and gives them no gradient: "
            "it runs under no_grad(), or what comes out is detached.",
            [f"{layer.code}.requires_grad_(False)  # if it is meant; else take no_grad() or detach() away"],
            evidence={"calls": step.calls[layer.path]},
        )


class _Block(nn.Module):
    """Runs its batch norm without gradients where ``cut`` says so."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.cut = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), cut

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):
            y = self.norm(self.first(x))
        made: Tensor = self.last(y.relu())
        return made


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _case(*, cut: bool, sick: bool = False) -> Case:
    model = _Block(cut=cut)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Case(model, ("norm",) if sick else (), batches_of(16, 3), optimizer, _loss)


def _under_no_grad() -> Case:
    return _case(cut=True, sick=True)


def _usual() -> Case:
    return _case(cut=False)


def _of_another_optimizer() -> Case:
    """As the generator in a step of the discriminator."""
    case = _case(cut=True)
    optimizer = torch.optim.SGD(case.model.get_submodule("last").parameters(), lr=0.1)
    return Case(case.model, (), case.batches, optimizer, _loss)


RULE = Rule(
    id="KN307",
    name="without-gradient",
    severity="warning",
    summary="The optimizer has the parameters of a layer, and a training step gives them no gradient.",
    statistic="The gradients of γ and β after the backward, of layers that the step has called.",
    threshold="None, though they require one and the optimizer has them. Layers of another optimizer are left out, as "
    "the generator's in a step of the discriminator.",
    source="torch.no_grad and torch.Tensor.detach: nothing in front of them gets a gradient.",
    explanation="The layer, and all in front of it that is reached in no other way, does not learn; its running "
    "statistics go on changing.",
    remedy="Take no_grad() or detach() away, or freeze the layer.",
    check=check,
    sick=(_under_no_grad,),
    healthy=(_usual, _of_another_optimizer),
    needs=("optimizer", "step"),
    in_training=False,
)
