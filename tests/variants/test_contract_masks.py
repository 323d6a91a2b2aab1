"""The contract: a mask leaves values out, wherever it has a meaning; elsewhere it is refused."""

import copy

import pytest
import torch
from variants.collected import for_each, for_each_shape, small
from variants.contract import assert_close, assert_same, buffers_of, layer_of, run

training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
masked = for_each_shape(where=lambda variant, shape: variant.masks)


def masks_for(x):
    """A mask by sample, and where there are positions one by sample and position; half of the values count."""
    by_sample = torch.arange(len(x)) % 2 == 0
    positions = (x.shape[0], *x.shape[2:])
    if len(positions) == 1:
        return [by_sample]
    by_position = torch.rand(positions) < 0.5
    by_position.view(len(x), -1)[:, 0], by_position.view(len(x), -1)[:, 1] = True, False
    return [by_sample, by_position]


def spread(mask, x):
    """The mask in x's shape."""
    mask = mask.view(len(x), *([1] * (x.dim() - 1))) if mask.dim() == 1 else mask.unsqueeze(1)
    return mask.expand_as(x)


@training
@masked
def test_what_is_masked_has_no_influence(variant, shape, training):
    """Whatever stands there, NaN included: in outputs, gradients and buffers not a bit changes, and 0 comes out."""
    layer = layer_of(variant, shape).train(training)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    for mask in masks_for(x):
        valid = spread(mask, x)
        outcomes = []
        for anything in (0.0, 1e6, torch.inf, torch.nan):
            given = (torch.where(valid, x, anything), torch.where(valid, residual, anything))
            outcomes.append(run(copy.deepcopy(layer), *given, activation="sigmoid", mask=mask, **keywords))
        first, *others = outcomes
        assert all(value.isfinite().all() for value in (*first.values.values(), *first.buffers.values()))
        assert first.y[valid].ne(0).all()
        for value in (first.y, first.gradients["grad x"], first.gradients["grad residual"]):
            assert value[~valid].eq(0).all()
        for other in others:
            assert_same(other, first)


@training
@masked
def test_masked_samples_are_left_out(variant, shape, training):
    """Output, gradients and buffers are those of the layer on the other samples alone."""
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64)
    mask = torch.arange(len(x)) % 2 == 0
    keywords = variant.keywords(x)
    some = {name: value[mask] if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}

    def left_out(x, **_):
        return torch.zeros_like(x).index_put((mask,), twin(x[mask], **some))

    assert_same(run(layer, x, mask=mask, **keywords), run(twin, x, call=left_out), 1e-10)


@masked
def test_forms_of_a_mask(variant, shape):
    """(N,), (N, *S) and as many dimensions as x, where they say the same, are the same."""
    layer = layer_of(variant, shape)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    mask = torch.arange(len(x)) % 2 == 0
    expected = run(copy.deepcopy(layer), x, mask=mask, **keywords)
    for form in (spread(mask, x)[:, :1], spread(mask, x)[:, 0]):
        assert_same(run(copy.deepcopy(layer), x, mask=form, **keywords), expected, 1e-12)


@training
@masked
def test_a_mask_that_keeps_all(variant, shape, training):
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    mask = torch.ones(len(x), dtype=torch.bool)
    assert_same(run(layer, x, mask=mask, **keywords), run(twin, x, **keywords), 1e-10)


@training
@masked
def test_all_masked(variant, shape, training):
    """Zeros come out, no gradient goes back, and nothing changes, now or in the steps that follow."""
    layer = layer_of(variant, shape).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(shape, dtype=torch.float64)
    keywords = variant.keywords(x)
    before = buffers_of(layer)
    mask = torch.zeros(len(x), dtype=torch.bool)
    found = run(layer, x, x.cos(), mask=mask, activation="sigmoid", **keywords)
    assert all(value.eq(0).all() for value in found.values.values())
    assert_close(found.buffers, before)
    assert_same(run(layer, x, **keywords), run(twin, x, **keywords))


@pytest.mark.parametrize(
    "wrong", [lambda n: torch.ones(n), lambda n: torch.ones(n + 1, dtype=torch.bool)], ids=["not boolean", "too long"]
)
@masked
def test_a_wrong_mask(variant, shape, wrong):
    """An error, and nothing has changed."""
    layer = layer_of(variant, shape)
    x = torch.randn(shape, dtype=torch.float64)
    before = buffers_of(layer)
    with pytest.raises((TypeError, ValueError), match="mask"):
        layer(x, mask=wrong(len(x)), **variant.keywords(x))
    assert_close(buffers_of(layer), before)


@for_each_shape(where=lambda variant, shape: variant.masks and len(shape) == 4)
def test_masked_channels_last(variant, shape):
    layer = layer_of(variant, shape)
    x = torch.randn(shape, dtype=torch.float64)
    for mask in masks_for(x):
        y = layer(x.contiguous(memory_format=torch.channels_last), mask=mask, **variant.keywords(x))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@masked
def test_masked_dtypes(variant, shape, dtype):
    layer = layer_of(variant, shape, torch.float32)
    x = torch.randn(shape).to(dtype)
    assert layer(x, mask=masks_for(x)[-1], **variant.keywords(x)).dtype == dtype


@training
@for_each(where=lambda variant: not variant.masks)
def test_a_mask_is_refused(variant, training):
    """Where it has no meaning, by name, and before anything changes."""
    layer = layer_of(variant, small(variant)).train(training)
    x = torch.randn(small(variant), dtype=torch.float64)
    before = buffers_of(layer)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}.*mask"):
        layer(x, mask=torch.ones(len(x), dtype=torch.bool), **variant.keywords(x))
    assert_close(buffers_of(layer), before)
