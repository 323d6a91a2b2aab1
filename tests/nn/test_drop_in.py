"""Whatever takes a layer for torch.nn's finds what it would find there: buffers, parameters, names, versions.

And what keelnorm's layers count besides is where the layer is, whatever a tool does to it.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

import keelnorm as kn
from keelnorm.surgery.conversion.counterparts import TWINS

C = 3
#: What the others are built with besides the number of channels.
ARGUMENTS = {
    "ConditionalBatchNorm": {"num_classes": 2},
    "DomainBatchNorm": {"domains": 2},
    "GhostBatchNorm": {"ghost_size": 2},
}
#: Buffers besides torch.nn's, which a variant's evaluation needs: they are in its state_dict.
BUFFERS = {"WhiteningBatchNorm": ["running_cov"]}
LAYERS = sorted(
    (found for found in vars(kn.nn).values() if inspect.isclass(found) and issubclass(found, _BatchNorm)),
    key=lambda found: found.__name__,
)
every_layer = pytest.mark.parametrize("layer_type", LAYERS, ids=lambda found: found.__name__)
twins = pytest.mark.parametrize(
    ("theirs", "ours"), TWINS.items(), ids=lambda found: f"{found.__module__.split('.')[0]}.{found.__name__}"
)


def build(layer_type, **keywords):
    channels = () if issubclass(layer_type, nn.modules.lazy.LazyModuleMixin) else (C,)
    return layer_type(*channels, **ARGUMENTS.get(layer_type.__name__, {}), **keywords)


def poisoned(channels=C):
    x = torch.randn(6, channels)
    x[2, channels - 1] = torch.nan
    return x


@every_layer
def test_every_buffer_is_torchs_or_in_the_state_dict(layer_type):
    layer = build(layer_type)
    own = [name for name, _ in layer.named_buffers(recurse=False)]
    assert own == ["running_mean", "running_var", "num_batches_tracked", *BUFFERS.get(layer_type.__name__, [])]
    assert not any(module._non_persistent_buffers_set for module in layer.modules())
    assert {name for name, _ in layer.named_buffers()} <= layer.state_dict().keys()


@every_layer
def test_every_layer_is_copied_and_pickled_with_its_counts(layer_type):
    layer = build(layer_type)
    if layer.skipped_updates is None:  # its channels are not known yet
        assert issubclass(layer_type, nn.modules.lazy.LazyModuleMixin)
        layer(poisoned().view(6, C, *[1] * (max(layer._ranks or (2,)) - 2)))
        expected = [0] * (C - 1) + [1]
        assert torch.equal(layer.skipped_updates, torch.tensor(expected))
    layer.skipped_updates += 2
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.skipped_updates, layer.skipped_updates)
        again.skipped_updates += 1
        assert not torch.equal(again.skipped_updates, layer.skipped_updates)


@pytest.mark.parametrize("keywords", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@twins
def test_drop_ins_have_what_torchs_have(theirs, ours, keywords):
    layer, oracle = build(ours, **keywords), build(theirs, **keywords)
    assert [name for name, _ in layer.named_buffers()] == [name for name, _ in oracle.named_buffers()]
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in oracle.named_parameters()]
    assert [name for name, _ in layer.named_modules()] == [name for name, _ in oracle.named_modules()]
    assert layer.state_dict()._metadata == oracle.state_dict()._metadata
    assert layer._version == oracle._version
    assert layer.__constants__ == oracle.__constants__
    assert layer.extra_repr() == oracle.extra_repr()
    assert vars(layer).keys() - vars(oracle).keys() == {"_updates"}
    assert vars(oracle).keys() <= vars(layer).keys()
    for name in vars(oracle).keys() - {"_parameters", "_buffers"}:
        assert type(vars(layer)[name]) is type(vars(oracle)[name]), name
    assert {name for name in dir(oracle) if not name.startswith("_")} <= set(dir(layer))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("how", ["tensors", "data"])
def test_channels_are_pruned_in_place(how, way, kernels):
    """As pruning libraries do: fewer channels are put into weight, bias and the running statistics."""
    layer, kept = kn.BatchNorm1d(4), torch.tensor([0, 2])
    layer(poisoned(4))
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(layer, name)
        if how == "data":
            value.data = value.data[kept].clone()
        elif isinstance(value, nn.Parameter):
            setattr(layer, name, nn.Parameter(value.detach()[kept].clone()))
        else:
            setattr(layer, name, value[kept].clone())
    layer.num_features = 2
    oracle = nn.BatchNorm1d(2)
    oracle.load_state_dict(layer.state_dict())
    torch._dynamo.reset()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if way == "compiled" else layer
    with kn.kernels.use(kernels):
        for _ in range(2):
            x = torch.randn(6, 2)
            torch.testing.assert_close(call(x), oracle(x))
        before, x = layer.running_mean.clone(), poisoned(2)
        call(x), oracle(x)
    torch.testing.assert_close(layer.running_mean[0], oracle.running_mean[0])
    torch.testing.assert_close(layer.running_var[0], oracle.running_var[0])
    assert layer.running_mean[1] == before[1]
    assert layer.num_batches_tracked == oracle.num_batches_tracked
    assert layer.skipped_updates.tolist() == [0, 1]


@pytest.mark.parametrize("layer_type", [kn.BatchNorm1d, kn.SyncBatchNorm, kn.WhiteningBatchNorm])
@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_layers_that_began_on_the_meta_device(how, layer_type):
    with torch.device("meta"):
        layer = layer_type(C)
    state = layer_type(C).state_dict()
    if how == "assign":
        layer.load_state_dict(state, assign=True)
        layer.to("cpu")
    else:
        layer.to_empty(device="cpu")
        layer.load_state_dict(state)
    assert layer.skipped_updates.tolist() == [0] * C
    layer(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]
    layer.to(torch.float64)
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]
    layer.to("meta")
    assert layer.skipped_updates.is_meta


def test_a_meta_layers_first_call_counts():
    """Nobody but the call itself sees that there is memory now."""
    with torch.device("meta"):
        layer = kn.BatchNorm1d(C)
    for name in ("weight", "bias"):
        setattr(layer, name, nn.Parameter(torch.ones(C)))
    layer.running_mean, layer.running_var = torch.zeros(C), torch.ones(C)
    layer.num_batches_tracked = torch.tensor(0)
    layer(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]


def test_averages_that_were_made_before_the_conversion():
    model = nn.Sequential(nn.Linear(4, C), nn.BatchNorm1d(C), nn.Linear(C, C), nn.BatchNorm1d(C))
    average = AveragedModel(model, use_buffers=True)
    kn.convert(model)
    for _ in range(3):
        model(torch.randn(5, 4))
        average.update_parameters(model)
    assert len(list(average.module.buffers())) == len(list(model.buffers()))
    for found, own in zip(average.module.buffers(), model.buffers(), strict=True):
        assert found.shape == own.shape
    ours = AveragedModel(model, use_buffers=True)
    ours.update_parameters(model)
    torch.testing.assert_close(ours.module(torch.ones(5, 4)), model(torch.ones(5, 4)))


def test_files_from_when_the_counter_was_a_buffer():
    layer = kn.BatchNorm1d(C)
    layer(poisoned())
    state = {name: copy.copy(value) for name, value in layer.__getstate__().items() if name != "_updates"}
    state["_buffers"]["skipped_updates"] = torch.tensor([4, 5, 6])
    state["_non_persistent_buffers_set"].add("skipped_updates")
    old = kn.BatchNorm1d.__new__(kn.BatchNorm1d)
    old.__setstate__(state)
    assert [name for name, _ in old.named_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]
    assert not old._non_persistent_buffers_set
    assert old.skipped_updates.tolist() == [4, 5, 6]
    old(poisoned())
    assert old.skipped_updates.tolist() == [4, 5, 7]


def test_files_name_no_class_that_torchs_do_not():
    file = io.BytesIO()
    torch.save(kn.BatchNorm1d(C), file)
    file.seek(0)
    with torch.serialization.safe_globals([kn.BatchNorm1d]):
        assert torch.load(file).skipped_updates.tolist() == [0] * C


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_counts_that_began_in_inference_mode(kernels):
    layer = kn.BatchNorm1d(C)
    layer._updates.tensor = None
    with kn.kernels.use(kernels):
        with torch.inference_mode():
            layer(poisoned())
        layer(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [2]


def test_replicas_count_for_their_layer():
    """Those of torch.nn.DataParallel, which are told to share its buffers on its own device."""
    layer = kn.BatchNorm1d(C)
    replica = layer._replicate_for_data_parallel()
    replica._buffers = dict(layer._buffers)
    replica._parameters = dict(layer._parameters)
    replica(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]
    replica._updates.tensor = None  # as where it is moved
    replica(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]


def test_a_reset_leaves_the_counts_where_they_are():
    """A CUDA graph goes on to write there."""
    layer = kn.BatchNorm1d(C)
    layer(poisoned())
    place = layer.skipped_updates.data_ptr()
    layer.reset_running_stats()
    assert layer.skipped_updates.tolist() == [0] * C
    assert layer.skipped_updates.data_ptr() == place


def test_a_layer_that_someone_made_one_of_ours():
    layer = nn.BatchNorm1d(C)
    layer.__class__ = kn.BatchNorm1d
    layer(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]


def test_a_layer_that_is_traced_by_itself_counts():
    layer = kn.BatchNorm1d(C)
    graph = torch.fx.symbolic_trace(layer)
    graph(poisoned())
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]


def test_fake_tensors_leave_the_counts_alone():
    layer = kn.BatchNorm1d(C)
    layer(poisoned())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(value) for name, value in layer.state_dict().items()}
        torch.func.functional_call(layer, fakes, mode.from_tensor(torch.randn(6, C)))
    assert type(layer.skipped_updates) is torch.Tensor
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the counts move to a GPU, and there is none")
def test_counts_follow_to_a_gpu_and_into_its_graphs():
    layer = kn.BatchNorm1d(C)
    layer(poisoned())
    layer.to("cuda")
    x = poisoned().cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    for _ in range(3):
        graph.replay()
    assert layer.skipped_updates.tolist() == [0] * (C - 1) + [5]
    assert layer.cpu().skipped_updates.tolist() == [0] * (C - 1) + [5]
