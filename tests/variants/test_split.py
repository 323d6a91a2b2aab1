"""SplitBatchNorm: parts and their statistics, explicit routing, and taking a batch norm's place."""

import copy
import pickle

import pytest
import torch
from variants.cases_remedies import split

import keelnorm as kn
from keelnorm.nn.split import SplitBatchNorm, use_split


def layer_for(num_splits=2, dtype=torch.float64, **keywords):
    layer = SplitBatchNorm(3, num_splits, dtype=dtype, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_states_equal(layer, expected):
    assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("num_splits", [2, 3])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5)], ids=str)
def test_each_part_is_a_batch_norm_of_its_own(shape, num_splits):
    """To the bit for outputs and gradients; running statistics to rounding."""
    layer = layer_for(num_splits)
    plain = [kn.BatchNorm(3, dtype=torch.float64) for _ in range(num_splits)]
    for own, theirs in zip([layer, *layer.aux_bn], plain, strict=True):
        theirs.load_state_dict({name: value for name, value in own.state_dict().items() if "aux" not in name})
    x, residual, dy = torch.randn(3, *shape, dtype=torch.float64)
    outcomes = []
    for modules in ([layer], plain):
        given = x.clone().requires_grad_()
        parameters = [parameter for module in modules for parameter in module.parameters()]
        parts = zip(modules, given.chunk(len(modules)), residual.chunk(len(modules)), strict=True)
        y = torch.cat([module(part, other, activation="relu") for module, part, other in parts])
        outcomes.append([y, *torch.autograd.grad(y, [given, *parameters], dy)])
    assert len(outcomes[0]) == 2 + 2 * num_splits
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    for own, theirs in zip([layer, *layer.aux_bn], plain, strict=True):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(own.get_buffer(name), theirs.get_buffer(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share_affine", [False, True], ids=["own", "shared"])
def test_formula_and_gradcheck(share_affine):
    layer = layer_for(share_affine=share_affine)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x), split(layer, x))
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == (2 if share_affine else 4)

    def function(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(layer), given, (x,))

    assert torch.autograd.gradcheck(function, (x, *(p.detach().clone().requires_grad_() for p in layer.parameters())))


def test_evaluation_is_the_main_layers():
    layer = layer_for(3, torch.float32)
    layer(torch.randn(6, 3, 4))
    layer.eval()
    x = torch.randn(5, 3, 4)  # which does not divide, and need not
    state = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), torch.nn.functional.batch_norm(x, *state))


def test_channels_last_is_kept():
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    layer = layer_for()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, split(layer, x))


@pytest.mark.parametrize("share_affine", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_using_one_part(index, share_affine):
    """In training its moments alone take the batch in, whatever its size; in evaluation they normalize."""
    layer = layer_for(3, share_affine=share_affine)
    before = state_of(layer)
    x = torch.randn(5, 3, 4, dtype=torch.float64) + 3
    part = [layer, *layer.aux_bn][index]
    affine = layer if share_affine else part
    with layer.use_split(index):
        found = layer(x)
    expected = torch.nn.functional.batch_norm(x, None, None, affine.weight, affine.bias, training=True)
    torch.testing.assert_close(found, expected)
    prefix = f"aux_bn.{index - 1}." if index else ""
    own = {prefix + name for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])} == own
    expected = torch.nn.functional.batch_norm(x, part.running_mean, part.running_var, affine.weight, affine.bias)
    with layer.eval().use_split(index):
        torch.testing.assert_close(layer(x), expected)


def test_using_ends():
    """With its block, by an exception too, and an inner one before the outer."""
    layer = SplitBatchNorm(3, 3)
    x = torch.randn(6, 3)

    def counts():
        return [int(part.num_batches_tracked) for part in (layer, *layer.aux_bn)]

    with layer.use_split(2):
        with layer.use_split(1):
            layer(x)
        with pytest.raises(ValueError, match="dimensions"), layer.use_split(0):
            layer(x[0])
        layer(x)
    assert counts() == [0, 1, 1]
    layer(x)
    assert counts() == [1, 2, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_using_is_no_part_of_the_layer(copied):
    """A copy made inside splits its batch; blocks may end in another order."""
    layer = SplitBatchNorm(3)
    first, second = layer.use_split(1), layer.use_split(0)
    first.__enter__(), second.__enter__()
    other = copied(layer)
    first.__exit__(None, None, None)
    layer(torch.randn(4, 3))
    second.__exit__(None, None, None)
    assert [bn.num_batches_tracked.item() for bn in (layer, layer.aux_bn[0])] == [1, 0]
    for bn in (other, layer):
        bn(torch.randn(4, 3))
    assert [bn.num_batches_tracked.item() for bn in (layer, layer.aux_bn[0])] == [2, 1]
    assert [bn.num_batches_tracked.item() for bn in (other, other.aux_bn[0])] == [1, 1]


def test_using_split_in_a_model():
    model = torch.nn.Sequential(SplitBatchNorm(3), torch.nn.Sequential(torch.nn.ReLU(), SplitBatchNorm(3, 3)))
    with use_split(model, 1) as same:
        assert same is model
        model(torch.randn(5, 3))
    assert [int(model[0].aux_bn[0].num_batches_tracked), int(model[1][1].aux_bn[0].num_batches_tracked)] == [1, 1]
    with pytest.raises(ValueError, match=r"0 .* to 1; got 2"), use_split(model, 2):
        pass
    model(torch.randn(6, 3))
    assert int(model[1][1].num_batches_tracked) == 1
    with pytest.raises(ValueError, match="no SplitBatchNorm in Linear"), use_split(torch.nn.Linear(1, 1), 1):
        pass


def test_a_part_that_is_paused_or_evaluating():
    x = torch.randn(4, 3, 5, dtype=torch.float64) + 2
    layer = layer_for(affine=False)
    layer.aux_bn.eval()
    before = state_of(layer.aux_bn)
    y = layer(x)
    torch.testing.assert_close(y[2:], x[2:] / (1 + 1e-5) ** 0.5)  # by the running statistics, 0 and 1
    assert_states_equal(layer.aux_bn, before)
    layer.train().track_running_stats = False
    before = state_of(layer)
    layer(x)
    assert_states_equal(layer, before)


@pytest.mark.parametrize(("shape", "message"), [((5, 3, 4), r"divide into 2.*\(5, 3, 4\)"), ((2, 3), "no variance")])
def test_batches_that_do_not_divide(shape, message):
    layer = SplitBatchNorm(3)
    before = state_of(layer)
    with pytest.raises(ValueError, match=rf"SplitBatchNorm.*{message}"):
        layer(torch.randn(shape))
    assert_states_equal(layer, before)


def test_an_empty_batch_changes_nothing():
    layer = SplitBatchNorm(3)
    before = state_of(layer)
    assert layer(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert_states_equal(layer, before)


def test_state_dict_has_timms_names():
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [*names, *(f"aux_bn.{k}.{name}" for k in (0, 1) for name in names)]
    assert list(SplitBatchNorm(3, 3).state_dict()) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("share_affine", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("keywords", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": torch.float64},
                                      {"eps": 0.1, "momentum": None}], ids=str)  # fmt: skip
def test_from_batch_norm(keywords, share_affine, training):
    bn = torch.nn.BatchNorm1d(3, **keywords).train(training)
    with torch.no_grad():
        for value in bn.state_dict().values():
            value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(7))
    if bn.bias is not None:
        bn.bias.requires_grad_(False)
    layer = SplitBatchNorm.from_batch_norm(bn, 3, share_affine=share_affine)
    assert layer.training == layer.aux_bn[1].training == training
    assert (layer.eps, layer.momentum, layer.num_splits) == (bn.eps, bn.momentum, 3)
    for name, value in bn.named_parameters():
        assert layer.get_parameter(name) is value
        if not share_affine:
            other = layer.aux_bn[1].get_parameter(name)
            assert torch.equal(other, value)
            assert other.requires_grad == value.requires_grad
            assert other.data_ptr() != value.data_ptr()
    assert layer.aux_bn[0].affine == (bn.affine and not share_affine)
    for name, value in bn.named_buffers():
        assert torch.equal(layer.get_buffer(name), value)
        assert torch.equal(layer.aux_bn[1].get_buffer(name), value)
        assert layer.aux_bn[1].get_buffer(name).data_ptr() != value.data_ptr()
    x = torch.randn(4, 3, dtype=keywords.get("dtype"))
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x))


def test_wrong_arguments():
    for wrong in (1, 0, 2.0, "2"):
        with pytest.raises(ValueError, match="num_splits must be an integer of at least 2"):
            SplitBatchNorm(3, wrong)
    with pytest.raises(TypeError, match=r"from_batch_norm: takes over torch.nn.BatchNorm1d/2d/3d"):
        SplitBatchNorm.from_batch_norm(torch.nn.Linear(2, 2))
    for wrong in (-1, 2, None, 1.0):
        with pytest.raises(ValueError, match="the parts are 0"), SplitBatchNorm(3).use_split(wrong):
            pass
