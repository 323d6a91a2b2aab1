"""Options survive every conversion; what a layer does not take it refuses by name, in constructor and call."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn.layer_pairs import assert_untouched, randomize, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import keelnorm as kn
from keelnorm.nn.recurrent.recurrent_cells import BatchNormLSTMCell
from keelnorm.nn.recurrent.stepwise import StepwiseBatchNorm

C = 4
#: What each option of kn.BatchNorm may be besides its default.
OPTIONS = (
    {"eps": 0.5},
    {"momentum": 0.25},
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"dtype": torch.float64},
    {"too_few": "running"},
    {"too_few": "skip"},
)
options = pytest.mark.parametrize("option", OPTIONS, ids=str)


def test_every_option_is_there() -> None:
    """Else a new one would be lost without a test."""
    names = inspect.signature(kn.BatchNorm.__init__).parameters.keys() - {"self", "num_features", "device"}
    assert names == {name for option in OPTIONS for name in option}


def facts(layer: nn.Module) -> dict[str, Any]:
    """All that options make of a layer."""
    names = ("eps", "momentum", "affine", "track_running_stats", "too_few", "training")
    state = {name: (value.shape, value.dtype) for name, value in layer.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    return {name: getattr(layer, name) for name in names} | state | {"requires_grad": wanted}


def by_convert_sync(model: nn.Module) -> nn.Module:
    return kn.SyncBatchNorm.convert_sync_batchnorm(model)


def by_convert(model: nn.Module) -> nn.Module:
    return kn.convert(model, sync=True)[0]


def there_and_back(model: nn.Module) -> nn.Module:
    return kn.convert(by_convert(model), sync=False)[0]


def reverted(model: nn.Module) -> nn.Module:
    return kn.revert(by_convert(model))[0]


@options
@pytest.mark.parametrize("convert", [by_convert_sync, by_convert, there_and_back, reverted, copy.deepcopy])
def test_conversions_keep_options(convert: Callable[[nn.Module], nn.Module], option: dict[str, Any]) -> None:
    model = nn.Sequential(kn.BatchNorm2d(C, **option)).train()
    before = facts(model[0])
    assert facts(convert(model)[0]) == before
    frozen = nn.Sequential(kn.BatchNorm2d(C, **option)).eval().requires_grad_(False)
    before = facts(frozen[0])
    assert facts(convert(frozen)[0]) == before


@options
def test_lazy_layers_keep_options(option: dict[str, Any]) -> None:
    layer: nn.Module = kn.LazyBatchNorm2d(**option)
    layer(torch.randn(3, C, 2, 2, dtype=option.get("dtype")))
    assert type(layer) is kn.BatchNorm2d
    assert facts(layer) == facts(kn.BatchNorm2d(C, **option))


TAKE_OVER = (
    kn.SplitBatchNorm.from_batch_norm,
    lambda bn: kn.DomainBatchNorm.from_batch_norm(bn, 2),
    lambda bn: kn.DomainBatchNorm.from_batch_norm(bn, 2, share_affine=False),
    lambda bn: kn.ConditionalBatchNorm.from_batch_norm(bn, num_classes=3),
    lambda bn: kn.ConditionalBatchNorm.from_batch_norm(bn, embedding_dim=3),
)


@options
@pytest.mark.parametrize("take_over", TAKE_OVER, ids=("split", "domain", "domain's own", "classes", "embedding"))
@pytest.mark.parametrize("frozen", [False, True])
def test_variants_keep_options_or_refuse_them(take_over: Any, option: dict[str, Any], frozen: bool) -> None:
    bn = kn.BatchNorm2d(C, **option).train(not frozen).requires_grad_(not frozen)
    if "too_few" in option:
        with pytest.raises(TypeError, match=r"too_few='.*', which would be lost; .*set_too_few"):
            take_over(bn)
        return
    layer = take_over(bn)
    for name in ("eps", "momentum", "affine", "track_running_stats", "training"):
        assert getattr(layer, name) == getattr(bn, name), name
    for name in ("weight", "bias", "running_mean", "running_var"):
        own, given = getattr(layer, name), getattr(bn, name)
        assert (own is None) == (given is None), name
        if own is not None:
            assert (own.dtype, own.requires_grad) == (given.dtype, given.requires_grad)
    if bn.track_running_stats:
        layer.eval()
        x = torch.randn(2, C, 3, 3, dtype=option.get("dtype"))
        keywords: dict[str, Any] = {"domain": 1} if type(layer) is kn.DomainBatchNorm else {}
        if isinstance(layer, kn.ConditionalBatchNorm):
            classes = torch.tensor([2, 0])
            keywords = {"condition": classes if layer.num_classes else torch.randn(2, 3)}
        torch.testing.assert_close(layer(x, **keywords), bn.eval()(x))
        with pytest.raises(ValueError, match="4 dimensions"):
            layer(x[0], **keywords)


@pytest.mark.parametrize("layer", [kn.BatchRenorm(C), kn.SyncBatchNorm(C), kn.GhostBatchNorm(C, 2)])
def test_variants_take_over_no_variants(layer: nn.Module) -> None:
    for take_over in TAKE_OVER:
        with pytest.raises(TypeError, match=f"got {type(layer).__name__}, of which something would be lost"):
            take_over(layer)


@pytest.mark.parametrize("too_few", ["running", "skip"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("masked", [False, True], ids=["one value", "one that counts"])
def test_sync_takes_too_few(too_few: str, activation: str | None, masked: bool, backend: str) -> None:
    """Without other ranks it is kn.BatchNorm; with them, see tests/distributed."""
    plain = randomize(kn.BatchNorm(C, too_few=too_few).double())
    layer = kn.SyncBatchNorm(C, too_few=too_few).double()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(1, C, 1).double()
    keywords: dict[str, Any] = {"activation": activation}
    if masked:
        x = torch.randn(3, C, 1).double()
        keywords["mask"] = torch.tensor([False, True, False])
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    before, found = snapshot(layer), []
    for each, leaf in zip((layer, plain), leaves, strict=True):
        y = each(leaf, **keywords)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf)
        found.append((y, dx))
    torch.testing.assert_close(*found)
    assert_untouched(layer, before)
    assert repr(layer).endswith(f"too_few='{too_few}')")


def test_sync_without_moments_refuses_running() -> None:
    layer = kn.SyncBatchNorm(C, too_few="running", track_running_stats=False)
    with pytest.raises(ValueError, match="too_few='running' needs running statistics"):
        layer(torch.randn(1, C))
    with pytest.raises(ValueError, match="too_few must be one of"):
        kn.SyncBatchNorm(C, too_few="never")


def test_the_error_for_one_value_recommends_what_there_is() -> None:
    for layer in (kn.BatchNorm1d(C), kn.SyncBatchNorm(C)):
        with pytest.raises(ValueError, match="too_few='running' or 'skip'"):
            layer(torch.randn(1, C))
        layer.set_too_few("skip")
        assert layer(torch.randn(1, C)).shape == (1, C)


# ---- what a layer does not take

#: Every layer that is called as a batch norm, and what its constructor and its call need.
LAYERS: dict[type[Any], tuple[dict[str, Any], dict[str, Any]]] = {
    kn.BatchNorm: ({}, {}),
    kn.BatchNorm2d: ({}, {}),
    kn.SyncBatchNorm: ({}, {}),
    kn.BatchRenorm: ({}, {}),
    kn.ConditionalBatchNorm: ({"num_classes": 2}, {"condition": torch.tensor([0, 1, 1])}),
    kn.CrossIterationBatchNorm: ({"compensate": False}, {}),
    kn.DomainBatchNorm: ({"domains": 2}, {"domain": 0}),
    kn.GhostBatchNorm: ({"ghost_size": 2}, {}),
    kn.L1BatchNorm: ({}, {}),
    kn.MovingAverageBatchNorm: ({}, {}),
    kn.RangeBatchNorm: ({}, {}),
    kn.SplitBatchNorm: ({"num_splits": 3}, {}),
    kn.VirtualBatchNorm: ({}, {}),
    kn.WhiteningBatchNorm: ({}, {}),
    StepwiseBatchNorm: ({}, {"step": 0}),
}
layers = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
TAKES_ALL = (kn.BatchNorm, kn.BatchNorm2d)


def test_every_layer_is_there() -> None:
    public = {kind for name in kn.nn.__all__ if isinstance(kind := getattr(kn, name), type)}
    known = {kind for kind in public if issubclass(kind, _BatchNorm)}
    drop_ins = {kind for kind in known if kind.__name__.startswith(("BatchNorm", "LazyBatchNorm"))}
    assert known - drop_ins <= LAYERS.keys()


def made(kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    constructor, call = LAYERS[kind]
    layer = kind(C, **constructor)
    x = torch.randn(3, C) if kind is StepwiseBatchNorm else torch.randn(3, C, 2, 2)
    if kind is kn.VirtualBatchNorm:
        layer.set_reference(torch.randn(3, C, 2, 2))
    return layer, x, call


@layers
@pytest.mark.parametrize("name", ["activation", "residual", "inplace", "mask", "sample_weight", "padding"])
def test_what_belongs_to_the_call(kind: type[nn.Module], name: str) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__}: {name} belongs to the call, layer\(x, {name}=\.\.\.\)"):
        kind(C, **LAYERS[kind][0], **{name: "relu"})


@pytest.mark.parametrize("kind", [kn.LazyBatchNorm2d, kn.BatchNormLSTM, kn.BatchNormGRU, BatchNormLSTMCell])
def test_what_belongs_to_the_call_of_others(kind: type[nn.Module]) -> None:
    name = "activation" if kind is kn.LazyBatchNorm2d else "hx"
    with pytest.raises(TypeError, match=f"{kind.__name__}: {name} belongs to the call"):
        kind(**{name: None})


@layers
def test_constructors_name_what_they_do_not_take(kind: type[nn.Module]) -> None:
    if kind not in (*TAKES_ALL, kn.SyncBatchNorm):
        with pytest.raises(TypeError, match=f"{kind.__name__}: there is no too_few for this layer; it takes num_feat"):
            kind(C, **LAYERS[kind][0], too_few="running")
    with pytest.raises(TypeError, match="there is no epsilon for this layer; it takes num_features, "):
        kind(C, **LAYERS[kind][0], epsilon=1e-3)


def test_a_subclass_may_have_options_of_its_own() -> None:
    class Activated(kn.BatchNorm1d):
        def __init__(self, num_features: int, activation: str) -> None:
            super().__init__(num_features)
            self.activation = activation

    class Open(kn.BatchNorm1d):
        def __init__(self, num_features: int, **others: object) -> None:
            super().__init__(num_features)
            self.others = others

    assert Activated(C, activation="relu").activation == "relu"
    assert Open(C, activation="relu").others == {"activation": "relu"}


@layers
@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", -1.0), ("eps", 0.0), ("eps", math.nan), ("eps", "x"), ("momentum", math.nan), ("momentum", math.inf)],
)
def test_numbers_that_make_nan(kind: type[nn.Module], name: str, value: Any, backend: str) -> None:
    """Set in the constructor or later, of this layer or of one inside it."""
    layer, x, needed = made(kind)
    for each in layer.modules():
        before = getattr(each, name, None)
        if before is None:
            continue
        setattr(each, name, value)
        state = snapshot(layer)
        with pytest.raises((TypeError, ValueError), match=rf"{kind.__name__}|AuxiliaryBatchNorm.*: .*{name} "):
            layer(x, **needed)
        assert_untouched(layer, state)
        setattr(each, name, before)
    assert layer(x, **needed).isfinite().all()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@layers
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_running_statistics_have_no_gradient(kind: type[nn.Module], training: bool, name: str, backend: str) -> None:
    layer, x, needed = made(kind)
    layer.train(training)
    getattr(layer, name).requires_grad_()
    before = snapshot(layer)
    with pytest.raises(
        RuntimeError,
        match=f"{kind.__name__}.*: batch normalization is not differentiable in its running statistics, so {name}",
    ):
        layer(x, **needed)
    assert_untouched(layer, before)


@layers
def test_errors_name_the_layers_place(kind: type[nn.Module]) -> None:
    layer, x, needed = made(kind)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity(), layer])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](x, activation="rectified", **needed)

    with pytest.raises(ValueError, match=rf"^{kind.__name__} 'blocks.1': activation must be one of"):
        Model()(x)
    layer.running_mean.requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable in its running statistics, so running_mean"):
        layer(x, **needed)


@layers
def test_calls_take_an_argument_or_name_it(kind: type[nn.Module], backend: str) -> None:
    layer, x, needed = made(kind)
    mask = torch.tensor([True, True, False])
    given = {"inplace": True, "sample_weight": torch.tensor([1.0, 2.0, 3.0]), "mask": mask, "padding": "middle"}
    for name, value in given.items():
        if kind in TAKES_ALL and name != "padding":
            assert layer(x.clone(), **needed, **{name: value}).shape == x.shape
            continue
        if name == "mask" and layer.takes_mask:
            continue  # below
        before = snapshot(layer)
        words = "padding must be one of" if name == "padding" else "has no meaning for this layer"
        with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{name}.*{words}|{kind.__name__}: {words}"):
            layer(x, **needed, **{name: value})
        assert_untouched(layer, before)


MASKED = [kind for kind in LAYERS if kind in TAKES_ALL or kind.takes_mask]


@pytest.mark.parametrize("kind", MASKED, ids=lambda kind: kind.__name__)
def test_padding_is_zero_or_kept(kind: type[nn.Module], backend: str) -> None:
    layer, x, needed = made(kind)
    mask = torch.tensor([True, True, False])
    for training in (True, False):
        layer.train(training)
        twin = copy.deepcopy(layer)
        zero, keep = layer(x, mask=mask, **needed), twin(x, mask=mask, padding="keep", **needed)
        assert torch.equal(zero[:2], keep[:2])
        assert torch.equal(zero[2], torch.zeros_like(zero[2]))
        assert torch.equal(keep[2], x[2])
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(twin(leaf, mask=mask, padding="keep", **needed).sum(), leaf)
        assert torch.equal(dx[2], torch.ones_like(dx[2]))
