"""What blocks ask of a layer is no part of it: of its copies, its flag, its first forward, or the order of the ends."""

import copy
import io
import pickle
import threading

import pytest
import torch
from control.models import FLAT, Block, Foreign, data
from support.noted import noted
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import keelnorm as kn
from keelnorm.control import accumulate_statistics, freeze, pause_statistics, unfreeze

BLOCKS = [pause_statistics, accumulate_statistics]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
every_kind = pytest.mark.parametrize("kind", list(FLAT))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "average": lambda model: AveragedModel(model).module,
}


def assert_untouched(layer):
    """Nothing of a block is left on the layer."""
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not layer._forward_pre_hooks_with_kwargs
    assert not layer._forward_hooks_always_called
    assert vars(layer).get("_control") is None
    assert layer.track_running_stats


@every_block
@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
@every_kind
def test_a_copy_is_an_ordinary_layer(block, copied, kind):
    """Inside the block and after it; and it takes nothing away from the layer."""
    layer, x = Block(1, kind).norm, torch.randn(8, 4)
    with block(layer):
        other = copied(layer)
        other(x + 50)
        assert (layer.num_batches_tracked.item(), other.num_batches_tracked.item()) == (0, 1)
    other(x + 50)
    assert_untouched(other)
    assert_untouched(layer)
    assert (layer.num_batches_tracked.item(), other.num_batches_tracked.item()) == (0, 2)
    assert layer.running_mean.abs().max() == 0
    assert (other.running_mean > 5).all()


@every_block
@every_kind
def test_a_block_around_a_copy_from_a_block(block, kind):
    """Whether it runs there or not."""
    layer = Block(1, kind).norm
    with block(layer):
        other = copy.deepcopy(layer)
        with block(other):
            pass
        with block(other):
            other(torch.randn(8, 4))
        assert layer.num_batches_tracked.item() == 0
    assert other.num_batches_tracked.item() == (block is accumulate_statistics)
    assert_untouched(other)


@every_block
def test_a_layer_that_is_converted_inside(block):
    model, x = nn.Sequential(nn.BatchNorm1d(4)), torch.randn(8, 4)
    with block(model):
        kn.convert(model)
        assert isinstance(model[0], kn.BatchNorm1d)
        model(x)
        assert model[0].num_batches_tracked.item() == 0
    pooled = int(block is accumulate_statistics)
    assert model[0].num_batches_tracked.item() == pooled
    assert_untouched(model[0])
    with block(model):
        model(x)
    assert model[0].num_batches_tracked.item() == 2 * pooled


def test_a_copy_of_a_ghost_feeds_itself():
    layer = kn.GhostBatchNorm(1, 4, momentum=1.0)
    with accumulate_statistics(layer):
        other = copy.deepcopy(layer)
        other(torch.full((8, 1), 50.0))
    assert (layer.running_mean.item(), other.running_mean.item()) == (0, 50)


@every_block
@every_kind
def test_a_shallow_copy_shares_the_statistics_and_the_block(block, kind):
    layer = Block(1, kind).norm
    with block(layer):
        other = copy.copy(layer)
        other(torch.randn(8, 4))
        assert layer.num_batches_tracked.item() == 0
    before = layer.num_batches_tracked.item()
    other(torch.randn(8, 4))
    assert layer.num_batches_tracked.item() == before + 1


def test_a_replica_of_data_parallel_is_in_the_block():
    for layer in (nn.BatchNorm1d(4), kn.BatchNorm1d(4)):
        with accumulate_statistics(layer) as accumulated:
            replica = layer._replicate_for_data_parallel()
            vars(replica).update(weight=layer.weight.detach(), bias=layer.bias.detach())
            replica(torch.randn(8, 4))
            assert accumulated.moments[""].count.item() == 8
            assert layer.num_batches_tracked.item() == 0


@every_block
@pytest.mark.parametrize("kind", [nn.LazyBatchNorm1d, kn.LazyBatchNorm1d])
def test_the_first_forward_of_a_lazy_layer(block, kind):
    """It makes what there is to track, and is paused or pooled as any other."""
    layer, x = kind(), torch.randn(8, 4)
    with block(layer) as entered:
        layer(x)
        assert layer.num_batches_tracked.item() == 0
    pooled = block is accumulate_statistics
    assert (entered.paths if pooled else entered) == [""]
    assert layer.num_batches_tracked.item() == pooled
    layer(x)
    assert layer.num_batches_tracked.item() == 1 + pooled
    assert layer.running_mean.shape == (4,)
    assert_untouched(layer)


@every_block
@every_kind
def test_the_flag_is_the_users(block, kind):
    """What reads it finds what was set, and what is set inside stays."""
    layer = Block(1, kind).norm
    layer(torch.randn(8, 4) + 5)
    with block(layer):
        assert layer.track_running_stats
        layer.reset_running_stats()
        assert (layer.running_mean.abs().max().item(), layer.num_batches_tracked.item()) == (0, 0)
        layer(torch.randn(8, 4))
        layer.track_running_stats = False
    assert not layer.track_running_stats
    assert layer.num_batches_tracked.item() == 0
    assert layer.running_mean.abs().max() == 0


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_conversion_and_old_checkpoints_inside_pause(library):
    """Both read the flag."""
    layer = library.BatchNorm1d(4)
    old = {name: value for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
    with pause_statistics(layer):
        if library is kn:  # torch.nn's layers have hooks there, which are refused by name
            assert kn.SyncBatchNorm.convert_sync_batchnorm(layer).track_running_stats
        else:
            assert nn.SyncBatchNorm.convert_sync_batchnorm(layer).track_running_stats
        layer.load_state_dict(old)


@pytest.mark.parametrize("library", [nn, kn], ids=["torch", "keelnorm"])
def test_update_bn_inside(library):
    """It resets, and averages over what it runs: inside accumulate over all of it as one batch, with its momentum."""
    model, batches = nn.Sequential(library.BatchNorm1d(4)), [torch.randn(6, 4) * 3 + 1 for _ in range(3)]
    model(torch.randn(8, 4) * 100)
    with accumulate_statistics(model):
        update_bn(batches, model)
    whole = torch.cat(batches)
    torch.testing.assert_close(model[0].running_mean, whole.mean(0))
    torch.testing.assert_close(model[0].running_var, whole.var(0))
    assert model[0].num_batches_tracked.item() == 1
    assert model[0].momentum == 0.1
    with pause_statistics(model):
        update_bn(batches, model)
    assert model[0].running_mean.abs().max() == model[0].num_batches_tracked.item() == 0


def test_a_reset_forgets_what_was_pooled():
    layer, x = kn.BatchNorm1d(4, momentum=1.0), torch.randn(8, 4)
    with accumulate_statistics(layer):
        layer(x + 50)
        layer.reset_running_stats()
        layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@every_kind
def test_blocks_that_end_in_another_order(kind):
    layer = Block(1, kind).norm
    first, second, third = pause_statistics(layer), accumulate_statistics(layer), pause_statistics(layer)
    for block in (first, second, third):
        block.__enter__()
    for block in (first, third):
        layer(torch.randn(8, 4))
        block.__exit__(None, None, None)
    layer(torch.randn(8, 4))
    assert layer.num_batches_tracked.item() == 0
    second.__exit__(None, None, None)
    assert layer.num_batches_tracked.item() == 1
    assert_untouched(layer)


@every_kind
def test_a_freeze_inside_accumulate_is_kept(kind):
    """What was seen before it does not enter, at the end or after unfreezing."""
    layer = Block(1, kind).norm
    for melted in (False, True):
        with accumulate_statistics(layer) as accumulated:
            layer(torch.randn(8, 4) + 5)
            freeze(layer)
            if melted:
                assert accumulated.update() == []
                unfreeze(layer)
        assert layer.running_mean.abs().max() == layer.num_batches_tracked.item() == 0
        unfreeze(layer)


@every_block
@pytest.mark.parametrize("kind", [*FLAT, "foreign"])
def test_threads(block, kind):
    """Forwards of one layer in several threads: all are counted, or none, and the flag comes back."""
    layer = Foreign(4) if kind == "foreign" else Block(1, kind).norm
    x = torch.randn(8, 4, 2, 2) if kind == "foreign" else torch.randn(8, 4)
    failed = []

    def run():
        try:
            for _ in range(20):
                layer(x)
        except Exception as error:  # it would only be printed
            failed.append(error)

    with block(layer) as entered:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if block is accumulate_statistics:
            assert entered.moments[""].count.max().item() == 80 * x.numel() / 4
        assert layer.num_batches_tracked.item() == 0
    assert not failed
    assert_untouched(layer)


@every_block
def test_an_interrupted_forward_leaves_nothing(block):
    """torch's hooks do not run after what is no Exception."""
    layer = Foreign(4)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = layer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), block(layer):
        layer(torch.randn(3, 4, 2, 2))
    handle.remove()
    assert_untouched(layer)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()

    def stance(self):
        return torch._dynamo.eval_frame._stance.stance

    @pytest.mark.parametrize("block", [accumulate_statistics, lambda layer: pause_statistics(layer)])
    def test_the_stance_is_put_back(self, block):
        """Blocks end in another order, or in other threads."""
        first, second = block(nn.BatchNorm1d(3)), block(nn.BatchNorm1d(3))
        first.__enter__(), second.__enter__()
        first.__exit__(None, None, None)
        assert self.stance() == "force_eager"
        thread = threading.Thread(target=second.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        assert self.stance() == "default"

    def test_the_stance_of_before(self):
        with torch.compiler.set_stance("eager_on_recompile"):
            with accumulate_statistics(nn.BatchNorm1d(3)):
                assert self.stance() == "force_eager"
            assert self.stance() == "eager_on_recompile"

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("kind", ["keelnorm", "variant"])
    def test_keelnorms_layers_stay_compiled_in_pause(self, kind):
        """A graph for each, whatever the number of blocks."""
        graphs: list[torch.fx.GraphModule] = []
        model, x = nn.Sequential(nn.Linear(3, 4), FLAT[kind](4)), data(1)
        compiled = torch.compile(model, backend=lambda graph, _: noted(graphs, graph).forward)
        compiled(x)
        alone = len(graphs)
        for count in range(2, 6):
            with pause_statistics(model), pause_statistics(model):
                compiled(x)
            compiled(x)
            assert model[1].num_batches_tracked.item() == count
        assert len(graphs) == 2 * alone

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
    @every_block
    @pytest.mark.parametrize("kind", ["torch", "keelnorm"])
    def test_compiled_inside(self, block, kind, monkeypatch):
        """Where nothing was compiled before, the compiler is not even loaded; as here, with its stance left alone."""
        monkeypatch.setattr("keelnorm.control.run_uncompiled.compiler", lambda: None)
        model, x = nn.Sequential(FLAT[kind](3)), data(1)
        compiled = torch.compile(model, backend="eager")
        with block(model):
            assert self.stance() == "default"
            compiled(x), compiled(x)
            twin = copy.deepcopy(model)
        other = torch.compile(twin, backend="eager")
        pooled = int(block is accumulate_statistics)
        assert model[0].num_batches_tracked.item() == pooled
        compiled(x), other(x), other(x)
        assert model[0].num_batches_tracked.item() == pooled + 1
        assert twin[0].num_batches_tracked.item() == 2
