"""torch.export: a plain ATen graph without keelnorm, with a dynamic batch size and running statistics as buffers."""

import copy

import pytest
import torch
from interop.interop_models import SHAPE, twins

import keelnorm as kn

trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def export(model, *, strict=False):
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (torch.randn(SHAPE),), dynamic_shapes=({0: batch},), strict=strict)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@trainings
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_block(momentum, strict, training):
    block, twin = (block.train(training) for block in twins(momentum=momentum))
    before = copy.deepcopy(block.state_dict())
    program = export(block, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert operators(program)
    assert all(name.startswith("aten.") for name in operators(program))
    module = program.module()
    for samples in (4, 9):
        x = torch.randn(samples, *SHAPE[1:])
        torch.testing.assert_close(module(x), twin(x), rtol=1e-5, atol=1e-5)
    for name, value in module.named_buffers():
        torch.testing.assert_close(value, twin.get_buffer(name), rtol=1e-6, atol=1e-6)
    if training:
        assert dict(module.named_buffers())["norm.num_batches_tracked"].item() == 2


def test_gradients_of_an_exported_graph():
    block, twin = twins()
    module = export(block).module()
    x = torch.randn(SHAPE)
    module(x).square().sum().backward(), twin(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        expected = twin.get_parameter(name).grad
        bound = 256 * torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
        assert (parameter.grad - expected).abs().max().item() <= bound, name


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own use
@trainings
def test_decompositions_and_files(training, tmp_path):
    block, twin = (block.train(training) for block in twins())
    program = export(block).run_decompositions()
    assert all(name.startswith("aten.") or "getitem" in name for name in operators(program))
    torch.export.save(program, tmp_path / "block.pt2")
    module = torch.export.load(tmp_path / "block.pt2").module()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(module(x), twin(x), rtol=1e-5, atol=1e-5)


class Activated(torch.nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.norm, self.activation = kn.BatchNorm2d(3), activation

    def forward(self, x):
        return self.norm(x, x.sin(), activation=self.activation)


@pytest.mark.parametrize("activation", ["silu", "hardsigmoid", torch.nn.Softplus(2.0, 5.0)], ids=str)
def test_activations(activation):
    """Activations become torch's own functions, given by name or as a module."""
    model = Activated(activation)
    twin = copy.deepcopy(model)
    program = export(model)
    assert all(name.startswith("aten.") for name in operators(program))
    x = torch.randn(5, *SHAPE[1:])
    torch.testing.assert_close(program.module()(x), twin(x), rtol=1e-5, atol=1e-5)


@trainings
def test_layer_without_moments_or_parameters(training):
    layer = kn.BatchNorm2d(3, affine=False, track_running_stats=False).train(training)
    program = export(layer)
    assert operators(program) == {"aten.batch_norm.default"}
    x = torch.randn(5, *SHAPE[1:])
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-6, atol=1e-6)


def test_same_operators_as_torchs_layer():
    ours, theirs = (export(block.eval()) for block in twins(ours=False))
    assert operators(ours) == operators(theirs)


def test_bad_input_is_refused_while_exporting():
    with pytest.raises(ValueError, match="x has 3 channels"):
        torch.export.export(kn.BatchNorm2d(4), (torch.randn(SHAPE),))
