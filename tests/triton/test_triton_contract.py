"""Forward, every gradient and the running statistics against float64, over shapes, layouts, dtypes, options."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.cases import EPS, MOMENTUM, Options, laid_out, make_problem
from support.definition import UNIT, expect, spread
from support.saving import assert_same_bits, outcome

import keelnorm as kn
from keelnorm.engine.kernels import triton
from keelnorm.engine.kernels.triton import availability, tiling

pytestmark = pytest.mark.triton

SHAPES = [(2, 1), (5, 19), (3, 9, 17), (2, 35, 1), (7, 5, 1, 1), (5, 7, 3, 11), (2, 3, 3, 5, 2)]
LAYOUTS = ("contiguous", "channels_last")
CASES = [
    pytest.param(shape, layout, id=f"{'x'.join(map(str, shape))}-{layout}")
    for shape in SHAPES
    for layout in LAYOUTS[: 1 if len(shape) == 2 else 2]
]
OPTIONS = [Options(*each, 1e4) for each in itertools.product((True, False), (None, "relu"), (False, True))]
#: Roundings of a value, in units of its scale; sums err by a random walk. Triton's interpreter cuts bfloat16 off where
#: a GPU rounds, which is a whole step of 2⁻⁷.
ROUNDINGS = {torch.float32: 16 * UNIT, torch.bfloat16: 2.0**-7, torch.float16: 1.02 * 2.0**-11}


@pytest.fixture(params=["on chip", "walked"])
def path(request, monkeypatch):
    """Either kernel where a channel's values fit; "walked" cuts small tensors into many tiles, splits and programs."""
    if request.param == "walked":
        for name, value in {"FORWARD_ON_CHIP": 0, "BACKWARD_ON_CHIP": 0, "TILE": 32, "ADDED_IN_FLOAT": 2}.items():
            monkeypatch.setattr(tiling, name, value)
        monkeypatch.setattr(tiling.reduction, "__defaults__", (32, 1))
        monkeypatch.setattr(tiling.elementwise, "__defaults__", (512, 1))
        monkeypatch.setattr(
            tiling, "candidates", lambda *view: [(tiling.reduction(*view), tiling.elementwise(view[0]))]
        )
    availability.by_rule.cache_clear()
    yield request.param
    availability.by_rule.cache_clear()


def run(problem, device, dtype=torch.float32, **how):
    """y, gradients and running statistics, by name."""
    leaves = {}
    for name in ("x", "residual", "weight", "bias"):
        tensor = getattr(problem, name)
        if tensor is not None:
            kept = dtype if name in ("x", "residual") else torch.float32
            moved = tensor.to(device=device, dtype=kept)
            leaves[name] = moved.requires_grad_()
    running = problem.running_mean.to(device).clone(), problem.running_var.to(device).clone()
    y = kn.functional.batch_norm(
        leaves["x"], *running, leaves["weight"], leaves["bias"], problem.options.training, MOMENTUM, EPS,
        activation=problem.options.activation, residual=leaves.get("residual"), **how,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(device=device, dtype=dtype))
    found = {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}}
    if problem.options.training:
        found |= {"running_mean": running[0], "running_var": running[1]}
    return {name: value.cpu() for name, value in found.items()}


def assert_right(problem, found, dtype=torch.float32):
    """Every result is right to rounding of its dtype."""
    expected = expect(problem, eps=EPS, momentum=MOMENTUM)
    assert set(found) == set(expected)
    for name, quantity in expected.items():
        value, right, scale = found[name].double(), quantity.value, quantity.scale
        if right.dim() > 1:
            scale = spread(scale.clamp(min=1e-30), right.dim())
            # A value is as large as several root mean squares.
            scale = torch.maximum(scale, right.abs())
        bound = ROUNDINGS[dtype if right.dim() > 1 else torch.float32]
        error = ((value - right).abs() / scale.clamp(min=1e-30)).max().item()
        assert error <= bound, f"{name} is off by {error:.3g} of its scale, more than {bound:.3g}"
        if right.dim() > 1:
            assert found[name].dtype == dtype


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_everything_is_right(device, path, shape, layout):
    for options in OPTIONS:
        if path == "walked" and options.training == (options.activation is None):
            continue  # half of them: the interpreter takes its time
        problem = make_problem(shape, options).laid_out(layout)
        assert_right(problem, run(problem, device))


@pytest.mark.parametrize(
    ("shape", "layout"), [((1, 2, 16411), "contiguous"), ((2, 3, 41, 61), "channels_last"), ((2100, 5), "contiguous")]
)
def test_what_no_program_holds_is_walked_over(device, shape, layout):
    view = tiling.View.of(shape, layout == "channels_last")
    chosen = availability.by_rule(view, 4, 4)
    assert chosen.forward is None
    assert chosen.reduction.splits > 1
    problem = make_problem(shape, Options(True, "relu", True, 1e4)).laid_out(layout)
    assert_right(problem, run(problem, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_rounded_once(device, path, layout, dtype):
    shape = (5, 7, 3, 11)
    for residual in (False, True):
        for training in (True, False):
            if path == "walked" and residual != training:
                continue
            problem = make_problem(shape, Options(training, None, residual)).laid_out(layout)
            rounded = {name: getattr(problem, name) for name in ("x", "residual", "dy")}
            rounded = {name: None if t is None else t.to(dtype).float() for name, t in rounded.items()}
            problem = problem.replace(**rounded)
            assert_right(problem, run(problem, device, dtype), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_lies_in_memory_as_x_does(device, layout):
    x = laid_out(torch.randn(3, 5, 4, 6), layout).to(device).requires_grad_()
    y = kn.BatchNorm2d(5).to(device)(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(3, 5, 4, 6).to(device))
    assert y.stride() == dx.stride() == x.stride()


@pytest.mark.parametrize("form", ["other", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_another_layout_is_taken(device, layout, form):
    shape = (5, 6, 3, 7)
    problem = make_problem(shape, Options()).laid_out(layout)
    if form == "expanded":
        dy = problem.dy[:, :, :1, :1].expand(shape)
    else:
        dy = laid_out(problem.dy, LAYOUTS[layout == "contiguous"])
    problem = problem.replace(dy=dy)
    assert_right(problem, run(problem, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_of_64_bits_give_the_same(device, path, monkeypatch, layout):
    shape = (5, 6, 3, 7)
    problem = make_problem(shape, Options(True, "relu", True)).laid_out(layout)
    narrow = run(problem, device)
    monkeypatch.setattr(tiling, "WIDE", 1)
    assert tiling.View.of(shape, layout == "channels_last").wide
    wide = run(problem, device)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


def test_every_run_gives_the_same_bits(device, path):
    problem = make_problem((6, 5, 4, 4), Options(True, "relu", False, 1e4))
    first, second = run(problem, device), run(problem, device)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(20, 2, 30, 31), (3000, 4), (6, 5, 4, 4)], ids=str)
def test_moments_keep_their_digits(device, shape, offset):
    x = make_problem(shape, Options(offset=offset)).x
    found = kn.functional.moments(x.to(device))
    right = kn.Moments.from_tensor(x.double())
    deviation = right.var.sqrt()
    assert ((found.mean.cpu() - right.mean).abs() <= 8 * UNIT * deviation).all()
    assert ((found.var.cpu() - right.var).abs() <= 16 * UNIT * right.var).all()
    assert found.count.item() == right.count.item()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_the_two_halves_are_the_whole(device, path, layout, training, residual):
    """measure_ and then finish: the values and running statistics of forward_."""
    operators = triton.load()
    problem = make_problem((4, 6, 3, 5), Options(training, "relu", residual)).laid_out(layout)
    x, weight, bias = (t.to(device) for t in (problem.x, problem.weight, problem.bias))
    other = problem.residual.to(device) if residual else None
    buffers = []
    for _ in range(2):
        running = [problem.running_mean.to(device).clone(), problem.running_var.to(device).clone()]
        buffers.append([*running, torch.tensor(3, device=device)])
    how = training, training, MOMENTUM, EPS
    y, saved = operators.forward_(x, other, weight, bias, *buffers[0], *how, 1, 0.0, 0.0)
    found = operators.measure_(x, *buffers[1], *how)
    torch.testing.assert_close(found, saved, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operators.finish(x, found, weight, bias, other, 1, 0.0, 0.0), y, rtol=1e-5, atol=1e-5)
    for one, two in zip(*buffers, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


RECOMPUTED = {
    "plain": (kn.BatchNorm2d, {}, "contiguous"),
    "mask": (kn.BatchNorm2d, {"padding": "zero"}, "channels_last"),
    "mask, keep": (kn.BatchNorm2d, {"padding": "keep"}, "contiguous"),
    "sync": (kn.SyncBatchNorm, {}, "channels_last"),
}


class Residual(torch.nn.Module):
    """Two batch norms, the second of which adds the first one's output, and readers that keep both outputs."""

    def __init__(self, name, channels):
        super().__init__()
        make, given, _ = RECOMPUTED[name]
        self.given = {**given}
        self.first, self.second, self.reader = make(channels), make(channels), torch.nn.PReLU()

    def forward(self, x):
        y = self.first(x * 1.0, activation="silu", **self.given)
        return self.reader(self.second(self.reader(y), y, activation="relu", **self.given))


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_outputs_have_the_same_bits(device, path, name):
    """Here an output is computed by `finish`, and in the forward by other kernels."""
    model = Residual(name, 4).to(device)
    if model.given:
        model.given.update(mask=(torch.rand(4, 3, 5) < 0.6).to(device))
    x = laid_out(torch.randn(4, 4, 3, 5), RECOMPUTED[name][2]).to(device)
    other = copy.deepcopy(model)
    calls = [kn.kernels.calls()["triton"]]
    with kn.save_memory(other):
        found = outcome(other, x)
    calls.append(kn.kernels.calls()["triton"])
    assert_same_bits(found, outcome(model, x))
    calls.append(kn.kernels.calls()["triton"])
    assert calls[1] - calls[0] >= calls[2] - calls[1] + 2  # the two outputs
