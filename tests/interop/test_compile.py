"""torch.compile(fullgraph=True): the same results, gradients and running statistics as without it."""

import copy
import shutil

import pytest
import torch
from interop.interop_models import SHAPE, assert_same, step, twins
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import keelnorm as kn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

#: Sums of up to 120 values through three convolutions; inductor and eager round in different orders.
UNITS = 512
#: Traced through Dynamo and AOTAutograd and run as it is, a layer runs the very kernels of eager, with the very same
#: bits. Where there are none, it runs torch's operators, and not those of the reference back end.
TRACED_UNITS = UNITS if kn.kernels.active() == "reference" else 0


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_inductor():
    """With the default back end: training, evaluation, training."""
    eager, other = twins()
    compiled = torch.compile(other, fullgraph=True)
    for training in (True, False, True):
        eager.train(training), other.train(training)
        x = torch.randn(SHAPE)
        assert_same(step(compiled, x, other), step(eager, x), UNITS)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_same_bits_as_eager(momentum, memory_format):
    """Training, evaluation, training: nothing falls back, and the layout of the output is eager's."""
    eager, other = twins(momentum=momentum)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    before = kn.kernels.calls()
    for training in (True, False, True):
        eager.train(training), other.train(training)
        x = torch.randn(SHAPE).to(memory_format=memory_format)
        found, expected = step(compiled, x, other), step(eager, x)
        assert_same(found, expected, TRACED_UNITS)
        assert found["y"].stride() == expected["y"].stride()
    if kn.kernels.active() != "reference":
        # three steps of two layers, forward and backward, compiled and eager: nothing fell back
        ran = {name: calls - before[name] for name, calls in kn.kernels.calls().items()}
        assert sum(ran.values()) == 3 * 2 * 2 * 2
        assert ran["reference"] == 0


def test_dynamic_batch_size_compiles_as_often_as_torchs():
    """One graph for all batch sizes from two on; a batch of one is always a graph of its own in torch."""

    def graphs(eager, other):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=counter)
        counts = []
        for samples in (4, 7, 2, 3, 1, 5):
            x = torch.randn(samples, *SHAPE[1:])
            assert_same(step(compiled, x, other), step(eager, x), TRACED_UNITS)
            counts.append(sum(len(graph.graph.nodes) > 1 for graph in counter.graphs))
        return counts

    assert graphs(*twins()) == [1, 1, 1, 1, 2, 2]
    [_, theirs], [_, same] = twins(ours=False), twins(ours=False)
    same.load_state_dict(theirs.state_dict())
    assert graphs(same, theirs) == [1, 1, 1, 1, 2, 2]


def test_automatic_dynamic_batch_size():
    """Without dynamic=True the second size makes the graph dynamic, as for any module."""
    layer = kn.BatchNorm2d(3)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for samples in (4, 7, 2, 5):
        compiled(torch.randn(samples, *SHAPE[1:]))
    assert counter.frame_count == 2
    assert layer.num_batches_tracked.item() == 4


@pytest.mark.parametrize("activation", ["silu", nn.LeakyReLU(0.2), nn.GELU("tanh")], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(activation, with_residual, dtype):
    """By name and as modules, whose parameters are taken over."""
    if dtype != torch.float32 and kn.kernels.active() == "reference":
        pytest.skip("torch's operators round between batch norm and activation")
    layer, twin = kn.BatchNorm2d(3), kn.BatchNorm2d(3)
    x = torch.randn(SHAPE).to(dtype)

    def run(norm, x):
        return norm(x, x.cos() if with_residual else None, activation=activation)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return run(layer, x)

    found = step(compiled, x, layer)
    assert_same(found, step(lambda x: run(twin, x), x, twin), TRACED_UNITS)


@pytest.mark.parametrize("activation", [None, "leaky_relu", "elu"])
def test_inplace_is_the_ordinary_call(activation):
    """inplace=True has no effect: the compiler manages memory, and the input stays."""
    layer, twin = kn.BatchNorm2d(3), kn.BatchNorm2d(3)
    x = torch.randn(SHAPE)
    compiled = torch.compile(
        lambda x: layer(x, activation=activation, inplace=True), fullgraph=True, backend="aot_eager"
    )
    assert_same(step(compiled, x, layer), step(lambda x: twin(x, activation=activation), x, twin), TRACED_UNITS)


def test_a_sequential_with_an_activation():
    net = kn.Sequential(kn.BatchNorm2d(3), nn.LeakyReLU(0.3))
    other = copy.deepcopy(net)
    x = torch.randn(SHAPE)
    found = step(torch.compile(net, fullgraph=True, backend="aot_eager"), x, net)
    assert_same(found, step(other, x), TRACED_UNITS)


def test_a_strided_input():
    """Traced results have the same strides as real ones."""
    layer, twin = kn.BatchNorm2d(3), kn.BatchNorm2d(3)
    wide = torch.randn(4, 6, 6, 10)
    for x in (wide[:, ::2, :, :5], wide.contiguous(memory_format=torch.channels_last)[:, :3]):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        expected = twin(x)
        assert_same({"y": y}, {"y": expected}, TRACED_UNITS)
        if kn.kernels.active() != "reference":
            assert y.stride() == expected.stride()


@pytest.mark.skipif(kn.kernels.active() != "reference", reason="the native kernels take bfloat16")
def test_bfloat16_runs_on_torchs_operators():
    """To the bit what torch's layers give when they are compiled the same way."""
    [_, ours], [_, theirs] = twins(), twins(ours=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(SHAPE).bfloat16()
    before = kn.kernels.calls()
    found, expected = (
        step(torch.compile(block.bfloat16(), fullgraph=True, backend="aot_eager"), x, block) for block in (ours, theirs)
    )
    assert kn.kernels.calls() == before
    assert_same(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_forced_reference(training):
    eager, other = (module.train(training) for module in twins())
    with kn.kernels.use("reference"):
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        before = kn.kernels.calls()
        x = torch.randn(SHAPE)
        found = step(compiled, x, other)
        after = kn.kernels.calls()
        assert {name: count for name, count in after.items() if count != before[name] and name != "reference"} == {}
        assert_same(found, step(eager, x), UNITS)


@pytest.mark.parametrize("keywords", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_layers_without_parameters_or_moments(keywords):
    layer = kn.BatchNorm1d(3, **keywords)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3)
    twin = kn.BatchNorm1d(3, **keywords)
    for training in (True, False):
        layer.train(training), twin.train(training)
        assert_same(step(compiled, x, layer), step(twin, x), TRACED_UNITS)


def test_functional():
    x, mean, var = torch.randn(8, 3), torch.zeros(3), torch.ones(3)
    compiled = torch.compile(kn.functional.batch_norm, fullgraph=True, backend="aot_eager")
    moments = (mean.clone(), var.clone())
    y = compiled(x, *moments, training=True, activation="relu", residual=x)
    expected = kn.functional.batch_norm(x, mean, var, training=True, activation="relu", residual=x)
    found = {"y": y, "mean": moments[0], "var": moments[1]}
    assert_same(found, {"y": expected, "mean": mean, "var": var}, TRACED_UNITS)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own look
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_autograd(training):
    """The backward as a graph of its own."""
    eager, other = (module.train(training) for module in twins())
    x = torch.randn(SHAPE)
    expected = step(eager, x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        found = step(other, x)
    assert_same(found, expected)


def test_double_backward_is_refused_and_not_wrong():
    """AOTAutograd differentiates once; the second derivative is an error of torch."""
    compiled = torch.compile(kn.BatchNorm1d(3), fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3, requires_grad=True)
    [dx] = torch.autograd.grad(compiled(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_checkpoint_inside_counts_once():
    layer, twin = kn.BatchNorm2d(3), kn.BatchNorm2d(3)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = torch.randn(SHAPE)
    found = step(torch.compile(checkpointed, fullgraph=True, backend="aot_eager"), x, layer)
    assert_same(found, step(twin, x), TRACED_UNITS)
