"""Corruptions: more of them is farther from the original, and each does what its name says."""

import math

import pytest
import torch

from keelnorm.lab.core.seeds import generator
from keelnorm.lab.data import CORRUPTIONS, corrupted, digits
from keelnorm.lab.data.corruptions import SEVERITIES

SHAPES = [(40, 1, 8, 8), (20, 1, 28, 28), (10, 3, 32, 32), (10, 3, 20, 30)]


def draw(seed=0):
    return generator(draw="corruption", seed=seed)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_of_it_is_farther_away(name, shape):
    # Blobs: like pictures they are smooth, and dark at the edge.
    rows, columns = (torch.linspace(-1, 1, side) for side in shape[2:])
    center = torch.rand(2, *shape[:2], 1, 1, generator=draw()) - 0.5
    x = torch.exp(-8 * ((rows[:, None] - center[0]) ** 2 + (1 + center[1]) * (columns - center[1]) ** 2))
    results = [corrupted(x, name, severity, draw()) for severity in (0, *SEVERITIES)]
    assert results[0] is x
    for result in results:
        assert result.shape == shape
        assert 0 <= float(result.min()) <= float(result.max()) <= 1
    distances = [float((result - x).square().mean()) for result in results]
    assert distances == sorted(distances)
    assert distances[1] > 1e-5


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_generator_alone_decides(name):
    x = digits(0, centered=False).test_x[:30]
    assert torch.equal(corrupted(x, name, 3, draw()), corrupted(x, name, 3, draw()))
    same = torch.equal(corrupted(x, name, 3, draw()), corrupted(x, name, 3, draw(1)))
    assert same == (name in ("blur", "contrast", "brightness"))  # the others draw


def test_each_does_what_its_formula_says():
    x = 0.3 + 0.4 * torch.rand(500, 1, 8, 8, generator=draw())
    assert float((corrupted(x, "noise", 1, draw()) - x).std()) == pytest.approx(0.1, rel=0.03)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(corrupted(x, "contrast", 2, draw()), mean + 0.66 * (x - mean), atol=1e-6)
    assert torch.allclose(corrupted(x, "brightness", 2, draw()), 0.24 + 0.76 * x, atol=1e-6)
    hidden = (corrupted(x, "occlusion", 3, draw()) == 0.5).sum(dim=(1, 2, 3))
    assert hidden.tolist() == [9] * 500  # 0.4 of 8 pixels, squared
    flat = torch.full((2, 3, 9, 9), 0.4)
    assert torch.allclose(corrupted(flat, "blur", 5, draw()), flat, atol=1e-6)


def test_blur_has_the_deviation_it_says():
    point = torch.zeros(1, 1, 51, 51)
    point[0, 0, 25, 25] = 1
    spread = corrupted(point, "blur", 3, draw())[0, 0]
    assert float(spread.sum()) == pytest.approx(1, rel=1e-4)
    at = torch.arange(51) - 25.0
    # That of the filter, and that of a pixel: 1/12.
    assert float((spread.sum(dim=0) * at**2).sum()) == pytest.approx((0.09 * 51) ** 2 + 1 / 12, rel=0.03)


def bar(height=41, width=41):
    """A horizontal bar from the center to the right."""
    x = torch.zeros(1, 1, height, width)
    x[0, 0, height // 2 - 1 : height // 2 + 2, width // 2 : width // 2 + 14] = 1
    return x


def center_of(x):
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in x.shape[-2:])
    total = x.sum()
    return float((x.sum(dim=(0, 1, 3)) * rows).sum() / total), float((x.sum(dim=(0, 1, 2)) * columns).sum() / total)


@pytest.mark.parametrize("height", [41, 61])
def test_rotation_turns_by_its_angle_also_where_images_are_not_square(height):
    x = bar(height)
    down, right = center_of(corrupted(x, "rotation", 4, draw()))
    assert math.degrees(math.atan2(abs(down), right)) == pytest.approx(40, abs=1)
    assert math.hypot(down, right) == pytest.approx(center_of(x)[1], rel=0.03)


def test_shift_moves_by_its_share_of_the_side():
    x = bar()
    before, after = center_of(x), center_of(corrupted(x, "shift", 5, draw()))
    assert math.dist(before, after) == pytest.approx(0.2 * 41, rel=0.03)


def test_scale_grows_or_shrinks_by_its_factor():
    x = bar()
    changed = corrupted(x.expand(30, -1, -1, -1), "scale", 2, draw())
    factors = {round(center_of(each[None])[1] / center_of(x)[1], 2) for each in changed}
    assert sorted(factors) == pytest.approx([1 / 1.24, 1.24], abs=0.02)


def test_no_such_corruption_or_severity():
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(KeyError, match="no corruption is named 'fog'; there are noise, blur"):
        corrupted(x, "fog", 1, draw())
    with pytest.raises(ValueError, match="severities are 0 to 5; got 6"):
        corrupted(x, "noise", 6, draw())
