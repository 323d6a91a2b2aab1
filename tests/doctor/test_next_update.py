"""What the next step of an optimizer does: as the optimizer itself does it, and on copies."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

import keelnorm as kn
from keelnorm.doctor import Case
from keelnorm.doctor.case_check import evidence_of, fingerprint
from keelnorm.doctor.rules.gradients_through_depth import trend_of

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 2),
    )  # fmt: skip


def batches():
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1, 0])) for _ in range(2)]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model.train()(batch[0]), batch[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_the_optimizer_does(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)  # puts a function in the place of the optimizer's step
    for _ in range(3):
        step(model, optimizer, batches()[0])
        schedule.step()
    case = Case(model, batches=batches(), optimizer=optimizer, loss=nn.CrossEntropyLoss())
    before = fingerprint(case)
    found = evidence_of(case).step.next_updates
    assert fingerprint(case) == before
    assert set(found) == {"1", "4"}
    old = {path: model[int(path) - 1].weight.detach().double().clone() for path in found}
    step(model, optimizer, batches()[0])
    for path, update in found.items():
        new = model[int(path) - 1].weight.detach().double()
        cosine = float(nn.functional.cosine_similarity(old[path].flatten(), new.flatten(), 0))
        assert math.cos(update.angle) == pytest.approx(cosine, abs=1e-9)
        assert update.angle > 0
        assert update.growth == pytest.approx(float(new.norm() / old[path].norm()) - 1, rel=1e-4, abs=1e-9)
        assert update.lost == 0
        assert update.rate == optimizer.param_groups[0]["lr"]


def test_small_angles_keep_their_digits():
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    data = [(x.double(), y) for x, y in batches()]
    case = Case(model, batches=data, optimizer=optimizer, loss=nn.CrossEntropyLoss())
    found = evidence_of(case).step.next_updates["1"]
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin.train()(data[0][0]), data[0][1]).backward()
    weight, gradient = twin[0].weight.detach().flatten(), twin[0].weight.grad.flatten()
    across = gradient - weight * weight.dot(gradient) / weight.dot(weight)
    assert found.angle == pytest.approx(1e-9 * float(across.norm() / weight.norm()), rel=1e-4)


def test_weights_of_others_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[6].parameters(), lr=0.1)
    case = Case(model, batches=batches(), optimizer=optimizer, loss=nn.CrossEntropyLoss())
    assert evidence_of(case).step.next_updates == {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert set(evidence_of(Case(model, (), batches(), optimizer, nn.CrossEntropyLoss())).step.next_updates) == {"4"}


class Demanding(torch.optim.SGD):
    """Needs a closure."""

    def step(self, closure):  # type: ignore[override]
        return closure()


def test_an_optimizer_that_can_not_be_tried_is_named():
    model = network()
    diagnosis = kn.diagnose(
        model, batches(), loss=nn.CrossEntropyLoss(), optimizer=Demanding(model.parameters(), lr=0.1), select="KN3"
    )
    [note] = [
        note
        for note in diagnosis.notes
        if note.startswith("The next update is not known: Demanding could not be tried")
    ]
    assert "TypeError" in note
    assert diagnosis.of("KN303") == []


def test_hooks_of_optimizers_do_not_run():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ran: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: ran.append(args))
    handle = register_optimizer_step_post_hook(lambda *args: ran.append(args))
    try:
        step = evidence_of(Case(model, (), batches(), optimizer, nn.CrossEntropyLoss())).step
    finally:
        handle.remove()
    assert ran == []
    assert set(step.next_updates) == {"1", "4"}


class Passing:
    """Passes everything on, as some wrappers do."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Properties(torch.optim.Optimizer):
    """As accelerate's: the state and the groups are those of another optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @state.setter
    def state(self, state):
        self.optimizer.state = state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.optimizer.param_groups = groups

    @property
    def defaults(self):  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Holding(torch.optim.SGD):
    """An optimizer of its own that steps another one, too."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups[0]["params"], lr=0.1)
        self.inner = optimizer

    def step(self, closure=None):
        self.inner.step()


class Reaching(torch.optim.SGD):
    """Steps parameters that it knows from elsewhere."""

    elsewhere: ClassVar[list[Any]] = []

    def step(self, closure=None):
        with torch.no_grad():
            for parameter in self.elsewhere:
                parameter.add_(1.0)


@pytest.mark.parametrize("wrap", [Passing, Properties, Holding, "accelerate", "reaching"])
def test_an_optimizer_that_is_another_ones_is_left_alone(wrap):
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, inner, batches()[0])
    if wrap == "accelerate":
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        optimizer: Any = accelerate.Accelerator(cpu=True).prepare(inner)
    elif wrap == "reaching":
        optimizer = Reaching(model.parameters(), lr=0.1)
        Reaching.elsewhere = [model[0].weight]
    else:
        optimizer = wrap(inner)
    groups, weights = inner.param_groups, [value.clone() for value in model.state_dict().values()]
    before = repr(inner.state_dict())
    diagnosis = kn.diagnose(model, batches(), loss=nn.CrossEntropyLoss(), optimizer=optimizer, select="KN3")
    assert any("could not be tried on copies" in note for note in diagnosis.notes)
    assert diagnosis.of("KN303") == []
    assert inner.param_groups is groups
    assert repr(inner.state_dict()) == before
    for value, wanted in zip(model.state_dict().values(), weights, strict=True):
        assert torch.equal(value, wanted)


def test_the_groups_are_as_before():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    del optimizer.param_groups[0]["foreach"]
    evidence_of(Case(model, (), batches(), optimizer, nn.CrossEntropyLoss()))
    assert "foreach" not in optimizer.param_groups[0]


def test_optimizers_that_step_in_the_backward_do_not():
    model = network()
    optimizers = {one: torch.optim.SGD([one], lr=0.1) for one in model.parameters()}
    for one in model.parameters():
        one.register_post_accumulate_grad_hook(lambda parameter: optimizers[parameter].step())
    before = [value.clone() for value in model.state_dict().values()]
    diagnosis = kn.diagnose(model, batches(), loss=nn.CrossEntropyLoss(), select="KN3")
    assert all("gradient" in one for one in diagnosis.facts)
    for value, wanted in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(value, wanted)
    assert all(one.grad is None for one in model.parameters())


def test_layers_with_fixed_statistics_are_left_out():
    """Their weights' length counts."""
    model = network()
    kn.freeze(model, where="1", affine=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert set(evidence_of(Case(model, (), batches(), optimizer, nn.CrossEntropyLoss())).step.next_updates) == {"4"}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the runs without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_within_a_checkpoint(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Conv2d(3, 3, 1), network()

        def forward(self, x):
            return checkpoint(self.rest, self.first(x), use_reentrant=reentrant)

    step = evidence_of(Case(Checkpointed(), (), batches(), loss=nn.CrossEntropyLoss())).step
    assert set(step.gradients) == {"rest.1", "rest.4"}


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2])
def test_a_trend_is_found(factor):
    found = trend_of([factor ** -(index + 0.1 * (-1) ** index) for index in range(40)])
    assert found.factor == pytest.approx(factor, rel=1e-2)
    assert found.total == pytest.approx(factor**39, rel=0.2)
    assert found.explained > 0.99 or factor == 1


def test_no_trend_where_there_is_none():
    assert trend_of([1.0, 2.0, 3.0]) is None
    assert trend_of([1.0, 2.0, 0.0, 3.0]) is None
    assert trend_of([0.0, 1.0, 2.0, 0.0, 4.0, 8.0]).explained > 0.8  # what is 0 is left out
    assert trend_of([1.0, 2.0, float("inf"), 3.0]) is None
    assert trend_of([1.0, 1e6] * 10).explained < 0.1
    assert trend_of([10.0 ** (-50 * index) for index in range(7)]).total == pytest.approx(1e300, rel=1e-6)
