"""torch.jit is refused, with an error that names the way out."""

import pytest
import torch
from interop.interop_models import SHAPE, Block
from torch import nn

import keelnorm as kn

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of the comparisons on the way to the refusal
]

MODELS = {
    "layer": lambda: kn.BatchNorm2d(3),
    "evaluated layer": lambda: kn.BatchNorm2d(3).eval(),
    "layer without state": lambda: kn.BatchNorm(3, affine=False, track_running_stats=False),
    "in torch's Sequential": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), kn.BatchNorm2d(3)),
    "in kn.Sequential": lambda: kn.Sequential(kn.BatchNorm2d(3), nn.ReLU()),
    "in a module": Block,
}
WORDS = ("torch.jit", "torch.export", "torch.compile", "torch.nn.BatchNorm")


def assert_refused(call, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError) as caught:
        call(model)
    missing = [word for word in WORDS if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_script(make):
    assert_refused(torch.jit.script, make())


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_trace(make):
    assert_refused(lambda model: torch.jit.trace(model, torch.randn(SHAPE)), make())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trace_of_other_dtypes(dtype):
    """Dtypes other than float32 are refused too."""
    assert_refused(lambda model: torch.jit.trace(model, torch.randn(SHAPE, dtype=dtype)), kn.BatchNorm2d(3).to(dtype))


def test_trace_of_the_function():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: kn.functional.batch_norm(x, None, None, training=True), torch.randn(SHAPE))


def test_layers_run_again_after_a_refusal():
    layer = kn.BatchNorm2d(3)
    with pytest.raises(RuntimeError):
        torch.jit.trace(layer, torch.randn(SHAPE))
    layer(torch.randn(SHAPE))
    assert layer.num_batches_tracked.item() == 1


def test_the_way_out():
    """torch.nn's layer takes the state, and goes through torch.jit."""
    layer, theirs = kn.BatchNorm2d(3), nn.BatchNorm2d(3)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPE)
    torch.testing.assert_close(torch.jit.script(theirs.eval())(x), layer.eval()(x))


def test_script_of_a_sequential_without_a_layer():
    """kn.Sequential is not scriptable itself; torch.nn.Sequential is."""
    with pytest.raises(RuntimeError, match=r"keelnorm\.Sequential"):
        torch.jit.script(kn.Sequential(nn.Linear(3, 3), nn.ReLU()))
