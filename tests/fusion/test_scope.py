"""Results wait within a call of a converted model, and nowhere else; whatever ends the call ends that."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusion.twins import LEARNED, Block, Net, ResNet, after, alike, batch, outcome, same, small_tensors_wait, twins  # noqa: F401
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.fusion import pending
from keelnorm.engine.fusion.scope import current


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Any:
    yield
    scope = current()  # what hooks do not see leaves one behind, whose call has ended
    assert scope is None or not scope.is_open()


CALLS: dict[str, Any] = {
    "the model": lambda m, x: m(x),
    "forward": lambda m, x: m.forward(x),
    "__call__": lambda m, x: m.__call__(x),
    "a child": lambda m, x: m.features(x),
    "a grandchild": lambda m, x: m.layer1[0](x),
    "a layer": lambda m, x: m.layer1[0].bn1(x),
    "a layer of the model": lambda m, x: m.bn(x),
    "a layer's forward": lambda m, x: m.bn.forward(x),
    "a part of a Sequential": lambda m, x: m.features[:2](x),
    "a child's forward": lambda m, x: m.features.forward(x),
    "a new Sequential": lambda m, x: nn.Sequential(m.features[1], nn.ReLU())(x),
    "Class.forward": lambda m, x: Block.forward(m.layer1[0], x),
}


@pytest.mark.parametrize("way", CALLS)
def test_parts_called_alone(way: str) -> None:
    """Whatever is called, a plain tensor comes, with the right values; before and after the model has learned."""

    def run(m: Any, x: Tensor) -> Any:
        if not getattr(m, "alone", False):
            y = CALLS[way](m, x)
            assert type(y) is Tensor
            z = torch.relu(y)
            return y, z, m(x), CALLS[way](m, x)
        return m(x)

    alike(ResNet(), run)


@pytest.mark.parametrize("way", ["the model", "a child"])
def test_these_fuse(way: str) -> None:
    converted, _ = twins(ResNet())
    for _ in range(3):
        CALLS[way](converted, batch())
    before = pending.completed
    CALLS[way](converted, batch())
    assert pending.completed - before == (4 if way == "the model" else 1)


@pytest.mark.parametrize("way", ["a layer", "a layer of the model", "a layer's forward", "a new Sequential"])
def test_these_do_not_wait(way: str) -> None:
    converted, _ = twins(ResNet())
    for _ in range(3):
        converted(batch())
    before = pending.completed
    for _ in range(3):
        assert type(CALLS[way](converted, batch())) is Tensor
    assert pending.completed == before


def test_bare_layer() -> None:
    """A batch norm that is converted by itself never waits."""
    converted, twin = twins(nn.BatchNorm2d(3).double())
    for _ in range(4):
        x = batch()
        y = converted(x)
        assert type(y) is Tensor
        same(torch.relu(y), torch.relu(twin(x)))


def test_model_inside_another() -> None:
    """Converted inside, outside and both, and put into a model that is not converted."""
    for inner, outer in ((True, False), (False, True), (True, True)):
        model, twin = ResNet(), ResNet()
        twin.load_state_dict(model.state_dict())
        wholes = [nn.Sequential(m, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()).double() for m in (model, twin)]
        wholes[1].load_state_dict(wholes[0].state_dict())
        if inner:
            kn.convert(model)
        if outer:
            kn.convert(wholes[0])
        before = pending.completed
        for i in range(8):
            x = batch()
            same(*(outcome(m.train(i < 4), x, lambda m, x: (m(x), m[0](x))) for m in wholes))
        assert pending.completed > before


class _Stop(BaseException):
    pass


ERRORS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, _Stop, StopIteration, RecursionError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["before", "waiting", "after"])
@pytest.mark.parametrize("learned", LEARNED)
def test_exceptions_in_the_forward(error: type[BaseException], where: str, learned: str) -> None:
    """The statistics of what ran have counted; layers give plain tensors afterwards, and the next call is right."""

    def body(m: Any, x: Tensor) -> Any:
        h = m.conv(x)
        if where == "before":
            raise error()
        y = m.bn(h)
        m.held.append(y)
        if where == "waiting":
            raise error()
        z = torch.relu(y)
        m.held.append(z)
        raise error()

    def run(m: Any, x: Tensor) -> Any:
        m.held.clear()
        raises = m.calls[m.training] >= 2
        with pytest.raises(error) if raises or learned == "nothing" else contextlib.nullcontext():
            m(x)
        alone = m.bn2(x)
        assert type(alone) is Tensor
        held = [t * 1 for t in m.held]
        assert [type(t) for t in m.held] == [Tensor] * len(m.held)
        return alone, torch.relu(alone), m.bn(x), held

    alike(Net(after(learned, body), held=[]), run, fuses=None)


def test_types_of_held_values_after_an_interrupt() -> None:
    """A waiting value that an interrupt leaves behind settles at the next operation or call, with the right values."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        if m.stop:
            m.held = y
            raise KeyboardInterrupt
        return torch.relu(y)

    def run(m: Any, x: Tensor) -> Any:
        m.stop = False
        first = [m(x), m(x), m(x)]
        m.stop = True
        with pytest.raises(KeyboardInterrupt):
            m(x)
        m.stop = False
        held = m.held
        again = m(2 * x)
        return first, again, held * 1, m.bn(x)

    alike(Net(body, held=None), run)


def test_exception_that_the_forward_catches() -> None:
    """Raised in a child, converted by itself or not."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            if x.sum() > 0:
                raise ValueError
            return torch.relu(y)

    def body(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        try:
            z = m.child(x)
        except ValueError:
            z = m.child.bn(x) * 2
        return torch.relu(y) + z

    alike(Net(body, child=Child()))
    model: Any = Net(body, child=Child())
    kn.convert(model.child)
    alike(model)


@pytest.mark.parametrize("learned", LEARNED)
def test_generators_yield_plain_values(learned: str) -> None:
    """A forward that is a generator runs after the call has ended."""

    def steps(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        yield y
        yield torch.relu(y)
        z = m.bn(m.conv(2 * x)) + x
        yield z
        yield torch.relu(z)

    def run(m: Any, x: Tensor) -> Any:
        values = m(x)
        if isinstance(values, tuple):
            return values
        found = []
        for value in values:
            assert type(value) is Tensor
            found.append(value * 1)
        return found

    alike(Net(after(learned, steps)), run, fuses=None if learned == "nothing" else True)


@pytest.mark.parametrize("learned", LEARNED)
def test_generators_inside_the_forward(learned: str) -> None:
    """Begun inside the call, gone on with afterwards, in pieces."""

    def steps(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        yield y
        yield torch.relu(y)
        yield F.silu(m.bn2(m.conv2(x)))

    def body(m: Any, x: Tensor) -> Any:
        rest = steps(m, x)
        return next(rest), rest

    def run(m: Any, x: Tensor) -> Any:
        found = m(x)
        if isinstance(found[1], Tensor):
            return found
        return found[0], list(found[1])

    alike(Net(after(learned, body)), run, fuses=None)


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("used", [False, True])
def test_values_kept_on_self(learned: str, used: bool) -> None:
    """Read after the call: plain, also where the forward made something else of it in place."""

    def body(m: Any, x: Tensor) -> Any:
        m.kept = m.bn(m.conv(x))
        m.others = {"list": [m.bn2(m.conv2(x)) + x]}
        return F.relu(m.kept, inplace=True) if used else x.sum()

    def run(m: Any, x: Tensor) -> Any:
        y = m(x)
        if not hasattr(m, "kept"):
            return y
        assert type(m.kept) is Tensor
        assert type(m.others["list"][0]) is Tensor
        kept, others = m.kept, m.others
        del m.kept, m.others
        return y, kept, others, kept is y

    alike(Net(after(learned, body)), run, fuses=None)


def test_previous_value_used_in_the_next_call() -> None:
    """A value of one call is an operand in the next, in the same place."""

    def body(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        z = y if m.last is None else y + m.last
        m.last = y.detach()
        return torch.relu(z)

    alike(Net(body, last=None), fuses=None)
