"""Models in wrappers: compiled in all ways, DDP, averaged, sharded, scripted."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import keelnorm as kn

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def with_a_compiled_part(model):
    model[1] = torch.compile(model[1], backend="eager")
    return model


class Inside(nn.Module):
    """Calls a compiled function in its forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.compile(self.model.forward, backend="eager")(x)


COMPILED = [compiled, compiled_in_place, with_a_compiled_part, Inside]
ways = pytest.mark.parametrize("way", COMPILED, ids=lambda way: way.__name__)


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


def run(way):
    """A compiled model that has run in both modes, with the layer's state unchanged."""
    model = way(net())
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.eval()(X), model.train()(X)
    model.load_state_dict(state)
    return model.eval()


def assert_same_moments(model, expected):
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer_of(model), name), getattr(layer_of(expected), name))


@ways
@pytest.mark.parametrize("sequential", [False, True])
def test_recalibrate_and_adapt_see_what_a_compiled_layer_is_given(way, sequential):
    model = run(way)
    assert kn.recalibrate(model, [X], sequential=sequential)[1].summary["layers"] == 1
    assert_same_moments(model, kn.recalibrate(net(), [X])[0])
    model = run(way)
    kn.adapt(model, [X], prior=4, sequential=sequential)
    assert_same_moments(model, kn.adapt(net(), [X], prior=4)[0])
    with torch.no_grad():  # and it is compiled again afterwards
        torch.testing.assert_close(model(X), kn.adapt(net().eval(), [X], prior=4)[0](X))


@ways
def test_adapt_by_the_batch(way):
    model, expected = run(way), net().eval()
    kn.adapt(model, mode="batch")
    kn.adapt(expected, mode="batch")
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected(X))
        kn.reset_adaptation(model)
        torch.testing.assert_close(model(X), net().eval()(X))


@ways
def test_a_compiled_model_runs_what_its_layers_have_become(way):
    model = run(way)
    for change in (kn.convert, kn.revert, kn.convert, kn.to_torch):
        change(model)
        expected = net()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(X), expected.eval()(X))
            torch.testing.assert_close(model.train()(X), expected.train()(X))
        assert_same_moments(model, expected)
        layer_of(model).reset_running_stats()
    assert type(layer_of(model)) is nn.BatchNorm2d
    kn.freeze(model)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(X), net().eval()(X))


@ways
def test_exports(way):
    model = run(way)
    prepared, report = kn.prepare_export(kn.convert(model)[0].eval())
    assert report.rows[0]["is"] == "BatchNorm2d"
    torch.testing.assert_close(prepared(X), net().eval()(X))


@pytest.mark.parametrize("way", COMPILED[:3], ids=lambda way: way.__name__)
def test_fold_wants_the_model_that_was_compiled(way):
    with pytest.raises(
        TypeError, match="is compiled, so what it runs can't be changed; fold the model that it was made"
    ):
        kn.fold(run(way), X)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def sharded_in_place(model):
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    return model


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel, "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": nn.DataParallel, "FSDP": sharded, "FSDP2": sharded_in_place,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped(group, name):
    wrap = WRAPPERS[name]
    for sequential in (False, True):
        model, _ = kn.recalibrate(wrap(net()), [X], sequential=sequential)
        assert_same_moments(model, kn.recalibrate(net(), [X])[0])
    model = kn.convert(wrap(net()))[0].eval()
    torch.testing.assert_close(model(X), net().eval()(X))
    model, report = kn.to_torch(model)
    assert [row["is"] for row in report.rows] == ["BatchNorm2d"]
    torch.testing.assert_close(model(X), net().eval()(X))
    if not name.startswith("FSDP"):
        folded, report = kn.fold(model, X)
        assert report.summary["folded"] == 1
        torch.testing.assert_close(folded(X), net().eval()(X), rtol=1e-4, atol=1e-5)
        return
    for inplace in (False, True):
        with pytest.raises(TypeError, match=r"fold: the model is sharded \(FSDP\)"):
            kn.fold(model, X, inplace=inplace)
    with pytest.raises(TypeError, match=r"prepare_export: the model is sharded \(FSDP\)"):
        kn.prepare_export(model)


OPERATIONS = {
    "convert": kn.convert, "revert": kn.revert, "to_torch": kn.to_torch, "prepare_export": kn.prepare_export,
    "fold": lambda model: kn.fold(model, X), "recalibrate": lambda model: kn.recalibrate(model, [X]),
    "adapt": lambda model: kn.adapt(model, [X]), "reset_adaptation": kn.reset_adaptation,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_scripted_models_are_refused(name):
    """The batch norms of a ScriptModule are not torch.nn's, so none would be found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = torch.jit.script(net().eval()), torch.jit.trace(net().eval(), X)
    for model in models:
        with pytest.raises(TypeError, match=f"{name}: the model is a ScriptModule"):
            OPERATIONS[name](model)


@pytest.mark.parametrize("name", ["convert", "to_torch", "prepare_export", "recalibrate", "adapt"])
def test_scripted_parts_are_noted(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(torch.jit.script(net().eval()), nn.BatchNorm2d(4)).eval()
        _, report = OPERATIONS[name](model)
    assert report.notes == ["0 is a ScriptModule: batch norms inside are not seen."]
