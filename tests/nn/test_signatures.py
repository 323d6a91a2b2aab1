"""Every public layer and function that torch has too takes what torch's takes, by the same names, in the same order."""

from __future__ import annotations

import inspect
from inspect import Parameter

import pytest
import torch
from nn.layer_pairs import PAIR_IDS, PAIRS
from torch import nn

import keelnorm as kn

#: keelnorm's classes by the name of torch's; the two that take any rank have torch's base class.
TWINS = {name: getattr(nn, name) for name in kn.nn.__all__ if hasattr(nn, name) and name != "Sequential"}
TWINS |= {"BatchNorm": nn.modules.batchnorm._BatchNorm, "LazyBatchNorm": nn.LazyBatchNorm1d}
TWINS |= {f"BatchNorm{kind}": getattr(nn, kind) for kind in ("LSTM", "GRU", "LSTMCell", "GRUCell")}
LAYERS = {name: kind for name in kn.nn.__all__ if isinstance(kind := getattr(kn, name), type)}
CALLED_ALIKE = [name for name, kind in LAYERS.items() if issubclass(kind, nn.modules.batchnorm._BatchNorm)]


def parameters(function: object, *, of_method: bool = True) -> list[Parameter]:
    return list(inspect.signature(function).parameters.values())[of_method:]


def constructor(kind: type[nn.Module]) -> list[Parameter]:
    if issubclass(kind, nn.RNNBase):  # LSTM's own is (*args, **kwargs)
        return [each for each in parameters(nn.RNNBase.__init__) if each.name != "mode"]
    return parameters(kind.__init__)


def assert_takes_all_of(ours: list[Parameter], theirs: list[Parameter]) -> None:
    """Positional ones at the same place, all by the same name, with the same default; what ours adds has a default."""
    positional = [each for each in theirs if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    assert [each.name for each in ours[: len(positional)]] == [each.name for each in positional]
    assert all(each.kind is Parameter.POSITIONAL_OR_KEYWORD for each in ours[: len(positional)])
    found = {each.name: each for each in ours}
    for each in theirs:
        assert each.name in found, f"no {each}"
        assert found[each.name].default == each.default, each
    names = {each.name for each in theirs}
    required = {each.name for each in ours if each.default is Parameter.empty} - names
    assert required <= {"step"}, required  # of the cells, whose moments are a step's


@pytest.mark.parametrize("name", TWINS)
def test_constructor(name: str) -> None:
    assert_takes_all_of(constructor(getattr(kn, name)), constructor(TWINS[name]))


@pytest.mark.parametrize("name", TWINS)
def test_call(name: str) -> None:
    assert_takes_all_of(parameters(getattr(kn, name).forward), parameters(TWINS[name].forward))


@pytest.mark.parametrize("name", CALLED_ALIKE)
def test_variants_are_called_as_batch_norms(name: str) -> None:
    ours = parameters(getattr(kn, name).forward)
    assert [each.name for each in ours[:2]] == ["input", "residual"]
    assert ours[1].default is None


def test_functions() -> None:
    ours = parameters(kn.functional.batch_norm, of_method=False)
    assert_takes_all_of(ours, parameters(nn.functional.batch_norm, of_method=False))
    converting = kn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm
    assert_takes_all_of(*(parameters(each, of_method=False) for each in converting))


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS, ids=PAIR_IDS)
def test_input_by_name(ours: type, theirs: type, shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(ours(5)(input=x), theirs(5)(input=x), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(5)(input=x), ours(5)(x))


def test_the_function_by_names(backend: str) -> None:
    channels = torch.rand(5, 5)
    state = dict(zip(("running_mean", "running_var", "weight", "bias"), channels, strict=False))
    for training in (True, False):
        keywords = {"input": torch.randn(4, 5, 3), "training": training, "momentum": 0.2, "eps": 1e-3}
        found = kn.functional.batch_norm(**keywords, **{name: value.clone() for name, value in state.items()})
        expected = nn.functional.batch_norm(**keywords, **{name: value.clone() for name, value in state.items()})
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Named(nn.Module):
    """A network that says ``input=``, as code written for torch.nn may."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(input=self.conv(x)).relu()


def test_a_converted_model_fuses() -> None:
    torch.manual_seed(0)
    plain, model = Named(), Named()
    model.load_state_dict(plain.state_dict())
    model, report = kn.convert(model)
    for training in (True, True, False, False):
        x = torch.randn(4, 3, 8, 8)
        y, expected = model.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert report.rows[0]["runs with"] == "relu"


def test_tools_see_it() -> None:
    """What looks at the calls of layers finds the input by its name."""
    model, batches = Named().eval(), [torch.randn(8, 3, 8, 8) for _ in range(3)]
    expected = model(batches[0])
    folded, report = kn.fold(model, batches[0])
    torch.testing.assert_close(folded(batches[0]), expected, rtol=1e-4, atol=1e-4)
    assert report.summary["folded"] == 1
    for sequential in (False, True):
        model.bn.reset_running_stats()
        kn.recalibrate(model, batches, sequential=sequential)
        assert model.bn.running_mean.abs().max() > 0


def test_recurrent_layers_have_no_projections() -> None:
    with pytest.raises(ValueError, match="proj_size must be 0; got 2"):
        kn.BatchNormLSTM(3, 4, proj_size=2)
