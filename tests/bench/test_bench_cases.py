"""The table of cases is ResNet-50's, and its bytes are those of the tensors."""

from collections import Counter, defaultdict

import pytest

from keelnorm.bench.cases import LAYOUTS, RESNET50, VARIANTS, Case, Shape, cases, least_bytes, shapes


def resnet50_norms():
    """(C, H, W) and variant of every batch norm, from the architecture: stride in the 3x3."""
    size = 224 // 2
    yield (64, size, size), "bn_relu"
    size //= 2  # max pooling
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            yield (width, size, size), "bn_relu"
            if block == 0 and stage > 0:
                size //= 2
            yield (width, size, size), "bn_relu"
            yield (4 * width, size, size), "bn_add_relu"
            if block == 0:
                yield (4 * width, size, size), "bn"


def test_table_is_resnet50():
    derived: defaultdict[tuple[int, int, int], Counter[str]] = defaultdict(Counter)
    for plane, variant in resnet50_norms():
        derived[plane][variant] += 1
    assert derived == RESNET50
    assert len(RESNET50) == 12
    assert sum(sum(uses.values()) for uses in RESNET50.values()) == 53


def test_shapes_take_the_batch_and_filters():
    listed = shapes(4)
    assert [s.dims for s in listed if s.suite == "resnet50"] == [(4, *plane) for plane in RESNET50]
    assert all(s.uses == RESNET50[s.dims[1:]] for s in listed if s.suite == "resnet50")
    assert not any(s.uses for s in listed if s.suite == "small")
    assert {s.suite for s in shapes(4, contains=("small",))} == {"small"}
    assert [s.name for s in shapes(4, contains=("2048x7x7", "8x16x4x4"))] == ["4x2048x7x7", "8x16x4x4"]
    assert set(shapes(4, quick=True)) < set(listed)


def test_cases_cover_every_combination_once():
    listed = shapes(2)
    found = list(cases(listed))
    assert len(found) == len(set(found)) == sum(len(s.layouts) for s in listed) * len(VARIANTS)
    assert {c.layout for c in found if len(c.shape.dims) == 4} == set(LAYOUTS)
    assert {c.layout for c in found if len(c.shape.dims) != 4} == {"contiguous"}
    assert list(cases(listed[:1], ("channels_last",), ("bn",))) == [Case(listed[0], "channels_last", "bn")]


@pytest.mark.parametrize(
    ("variant", "forward", "backward"),
    [("bn", 2 * 400, 3 * 400), ("bn_relu", 2 * 400, 3 * 400), ("bn_add_relu", 3 * 400 + 12, 4 * 400 + 12)],
)
def test_least_bytes(variant, forward, backward):
    assert least_bytes(100, 4, variant, "forward") == forward
    assert least_bytes(100, 4, variant, "backward") == backward
    assert least_bytes(100, 4, variant, "both") == forward + backward
    assert least_bytes(100, 4, variant, "inference") == (1200 if variant == "bn_add_relu" else 800)


def test_samples_per_channel():
    assert Shape("small", (3, 5, 7, 2)).samples == 42
    assert Shape("small", (3, 5)).samples == 3
