"""The contract: a tensor whose memory is gone is refused by name; any byte but 0 of a mask is True."""

import copy

import pytest
import torch
from variants.collected import for_each, small
from variants.contract import assert_same, layer_of, run

training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.mark.parametrize(
    ("name", "training"),
    [("x", True), ("weight", True), ("weight", False), ("bias", True), ("running_mean", True), ("running_var", False)],
)
@for_each()
def test_freed_memory_is_refused(variant, name, training):
    """As sharded training frees it; most of torch's own operators would end the process, a few raise."""
    layer = layer_of(variant, small(variant)).train(training)
    x = torch.randn(small(variant), dtype=torch.float64)
    chosen = x if name == "x" else getattr(layer, name, None)
    if chosen is None:
        chosen, name = x, "x"
    keywords = variant.keywords(x)
    before = {key: value.clone() for key, value in layer.state_dict().items() if value is not chosen}
    chosen.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"the memory of {name} is gone|out of bounds for storage of size 0"):
        layer(x, **keywords)
    for key, value in layer.state_dict().items():
        if key in before and key != name:
            assert torch.equal(value, before[key]), key


@training
@for_each(where=lambda variant: variant.masks)
def test_masks_of_any_byte(variant, training):
    layer = layer_of(variant, small(variant)).train(training)
    x = torch.randn(small(variant), dtype=torch.float64)
    keywords = variant.keywords(x)
    mask = torch.arange(len(x)) % 2 == 0
    outcomes = []
    for bytes_ in (mask, torch.where(mask, 255, 0).to(torch.uint8).view(torch.bool)):
        outcomes.append(run(copy.deepcopy(layer), x, activation="sigmoid", mask=bytes_, **keywords))
    assert_same(*outcomes)
