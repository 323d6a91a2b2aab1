"""torch.fx.symbolic_trace through a layer: one node, which finds the layer's parameters and buffers."""

import copy

import pytest
import torch
from interop.interop_models import SHAPE, assert_same, step, twins
from torch import fx, nn

import keelnorm as kn

trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def same_layer():
    layer = kn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2), layer.bias.normal_(), layer.running_var.uniform_(0.5, 2)
    return layer, copy.deepcopy(layer)


@trainings
def test_traced_block_runs_and_trains_as_before(training):
    block, twin = (block.train(training) for block in twins())
    before = copy.deepcopy(block.state_dict())
    traced = fx.symbolic_trace(block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    traced.recompile()
    assert traced.state_dict().keys() == before.keys()
    for _ in range(2):
        x = torch.randn(SHAPE)
        assert_same(step(traced, x), step(twin, x))
    assert twin.norm.num_batches_tracked.item() == (2 if training else 0)


def test_tracing_a_layer_alone():
    layer, twin = same_layer()
    traced = fx.symbolic_trace(layer)
    x = torch.randn(SHAPE)
    assert torch.equal(traced(x), twin(x))
    assert torch.equal(traced.running_mean, twin.running_mean)


def test_activation_and_residual_are_part_of_the_node():
    class Net(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, residual):
            return self.layer(x, residual, activation="relu")

    layer, twin = same_layer()
    traced = fx.symbolic_trace(Net(layer))
    x, residual = torch.randn(SHAPE), torch.randn(SHAPE)
    assert torch.equal(traced(x, residual), twin(x, residual, activation="relu"))
    assert len([node for node in traced.graph.nodes if node.op.startswith("call")]) == 1


@pytest.mark.parametrize("activation", ["silu", nn.LeakyReLU(0.3), nn.Hardsigmoid(), nn.Identity()], ids=str)
def test_every_activation(activation):
    """A module becomes torch's function for it, with its parameters."""

    class Net(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, activation=activation)

    layer, twin = same_layer()
    traced = fx.symbolic_trace(Net(layer))
    x = torch.randn(SHAPE)
    torch.testing.assert_close(traced(x), twin(x, activation=activation))


def test_sequential_is_traced_fused():
    layer, twin = same_layer()
    traced = fx.symbolic_trace(kn.Sequential(layer, nn.ReLU()))
    x = torch.randn(SHAPE)
    assert torch.equal(traced(x), twin(x, activation="relu"))


def test_functional():
    traced = fx.symbolic_trace(lambda x: kn.functional.batch_norm(x, None, None, training=True, activation="relu"))
    x = torch.randn(SHAPE)
    assert torch.equal(traced(x), kn.functional.batch_norm(x, None, None, training=True, activation="relu"))


def test_traced_module_can_be_copied_and_reports_bad_input():
    layer, _ = same_layer()
    traced = copy.deepcopy(fx.symbolic_trace(nn.Sequential(layer)))
    with pytest.raises(ValueError, match="x has 4 channels"):
        traced(torch.randn(2, 4, 3, 3))


def test_shape_propagation():
    layer, _ = same_layer()
    traced = fx.symbolic_trace(kn.Sequential(layer, nn.ReLU(), nn.Conv2d(3, 2, 1)).eval())
    fx.passes.shape_prop.ShapeProp(traced).propagate(torch.randn(SHAPE))
    shapes = [node.meta["tensor_meta"].shape for node in traced.graph.nodes if node.op != "get_attr"]
    assert shapes[-1] == (SHAPE[0], 2, *SHAPE[2:])


def test_a_parametrized_weight_is_computed_at_every_run():
    """And not recorded as the constant that it was."""

    class Squared(nn.Module):
        def forward(self, raw):
            return raw.square()

    layer, _ = same_layer()
    nn.utils.parametrize.register_parametrization(layer, "weight", Squared())
    traced = fx.symbolic_trace(nn.Sequential(layer))
    x = torch.randn(SHAPE)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(2)
    layer.eval(), traced.eval()
    assert torch.equal(traced(x), layer(x))


def test_modes_of_the_traced_module():
    """As with torch.nn's layers, which remain modules of the traced one."""
    layer, twin = same_layer()
    traced = fx.symbolic_trace(nn.Sequential(layer)).eval()
    x = torch.randn(SHAPE)
    torch.testing.assert_close(traced(x), twin.eval()(x))
    assert layer.num_batches_tracked.item() == 0


def test_tools_find_the_layer_in_the_traced_module():
    """torch.nn's layers are found by conversion, freezing and update_bn."""
    layer, _ = same_layer()
    traced = fx.symbolic_trace(nn.Sequential(layer))
    assert any(isinstance(module, nn.BatchNorm2d) for module in traced.modules())


class Calls(nn.Module):
    """A layer's call as a lambda has it."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


VARIANTS = {
    "drop-in": kn.BatchNorm2d,
    "any rank": kn.BatchNorm,
    "sync": kn.SyncBatchNorm,
    "ghost": lambda size: kn.GhostBatchNorm(size, 2),
    "renorm": kn.BatchRenorm,
    "cross-iteration": lambda size: kn.CrossIterationBatchNorm(size, compensate=False),
    "moving average": kn.MovingAverageBatchNorm,
    "split": kn.SplitBatchNorm,
    "L1": kn.L1BatchNorm,
    "range": kn.RangeBatchNorm,
    "whitening": kn.WhiteningBatchNorm,
}


@pytest.mark.parametrize("kind", VARIANTS)
@trainings
def test_a_plain_call_is_traced_as_torch_nns(kind, training):
    layer = VARIANTS[kind](3).train(training)
    twin = copy.deepcopy(layer)
    traced = fx.symbolic_trace(nn.Sequential(layer))
    _, node, _ = traced.graph.nodes
    assert (node.op, node.target, len(node.args), node.kwargs) == ("call_module", "0", 1, {})
    x = torch.randn(SHAPE)
    assert torch.equal(traced(x), twin(x))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda layer, x: layer(x, activation="relu"), {"activation"}),
        (lambda layer, x: layer(x, mask=x[:, 0] > 0), {"mask"}),
        (lambda layer, x: layer(x, mask=x[:, 0] > 0, padding="keep"), {"mask", "padding"}),
        (lambda layer, x: layer(x, activation="elu", inplace=True), {"activation", "inplace"}),
    ],
)
def test_a_node_has_what_the_call_was_given(call, given):
    layer, twin = same_layer()
    traced = fx.symbolic_trace(Calls(layer, call))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert set(node.kwargs) == given
    assert len(node.args) == 1
    x = torch.randn(SHAPE)
    assert torch.equal(traced(x.clone()), call(twin, x.clone()))


def test_the_layer_in_a_graph_can_be_swapped():
    layer, twin = same_layer()
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 1), layer.eval())).eval()
    x = torch.randn(SHAPE)
    expected = traced(x)
    plain = nn.BatchNorm2d(3).eval()
    plain.load_state_dict(twin.state_dict())
    setattr(traced, "1", plain)
    torch.testing.assert_close(traced(x), expected)
