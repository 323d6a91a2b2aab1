"""Hooks run once per call, see what torch's would see, and may change it."""

import pytest
import torch
from nn.layer_pairs import CHANNELS, assert_near, randomize, step, twin
from torch import nn
from torch.nn.modules import module as torch_module

import keelnorm as kn

SHAPE = (4, CHANNELS, 3, 3)
#: How each kind of hook is registered on a layer, and for all modules.
ON_LAYER = {
    "forward": "register_forward_hook",
    "forward_pre": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "backward_pre": "register_full_backward_pre_hook",
}
GLOBAL = {
    "forward": torch_module.register_module_forward_hook,
    "forward_pre": torch_module.register_module_forward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
    "backward_pre": torch_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", ON_LAYER)
@pytest.mark.parametrize("everywhere", [False, True], ids=["layer", "global"])
def test_hooks_run_once_and_see_what_torchs_see(kind, everywhere, backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [], oracle: []}

    def hook(module, *values):
        seen[module].append([t for value in values for t in (value if isinstance(value, tuple) else (value,))])

    handles = [GLOBAL[kind](hook)] if everywhere else [getattr(norm, ON_LAYER[kind])(hook) for norm in (layer, oracle)]
    try:
        found, expected = step(layer, x, dy), step(oracle, x.double(), dy.double())
    finally:
        for handle in handles:
            handle.remove()
    for name in expected:
        assert_near(found[name], expected[name], units=32)
    assert len(seen[layer]) == len(seen[oracle]) == 1
    assert len(seen[layer][0]) == len(seen[oracle][0]) > 0
    for value, value64 in zip(seen[layer][0], seen[oracle][0], strict=True):
        assert_near(value, value64, units=32)
    step(layer, x, dy)
    assert len(seen[layer]) == 1


def test_hooks_see_the_activation_and_the_residual(backend):
    layer = kn.BatchNorm2d(CHANNELS)
    x, residual = torch.randn(SHAPE), torch.randn(SHAPE)
    seen = []
    layer.register_forward_hook(lambda module, args, kwargs, y: seen.append((args, kwargs, y)), with_kwargs=True)
    y = layer(x, residual, activation="relu")
    [(args, kwargs, output)] = seen
    assert args == (x, residual)
    assert kwargs == {"activation": "relu"}
    assert output is y


def test_hooks_change_input_and_output(backend):
    layer = randomize(kn.BatchNorm2d(CHANNELS))
    oracle = twin(layer, nn.BatchNorm2d, CHANNELS)
    for norm in (layer, oracle):
        norm.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,))
        norm.register_forward_hook(lambda module, args, y: y.tanh())
        norm.register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],))
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)
    found, expected = step(layer, x, dy), step(oracle, x.double(), dy.double())
    for name in expected:
        assert_near(found[name], expected[name], units=64)


def test_hooks_on_tensors(backend):
    """The gradient of the output arrives once; that of the input goes out once."""
    layer = kn.BatchNorm2d(CHANNELS)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    seen = []
    x.register_hook(lambda grad: seen.append(("x", grad)))
    y = layer(x, activation="relu")
    y.register_hook(lambda grad: seen.append(("y", grad)))
    y.backward(dy)
    assert [name for name, _ in seen] == ["y", "x"]
    assert torch.equal(seen[0][1], dy)
    assert torch.equal(seen[1][1], x.grad)
