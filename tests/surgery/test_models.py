"""Published architectures, converted and folded: right in float64, with every possible call fused."""

from __future__ import annotations

import pytest

from benchmarks.architectures import ARCHITECTURES
from benchmarks.zoo.zoo_check import check_architecture

#: Calls of batch norms that an addition or an activation follows, counted in runs of the unconverted models.
FUSIBLE = {
    "ResNet-18": 17,
    "ResNet-50": 49,
    "PreResNet-18": 18,
    "ResNeXt-50": 49,
    "SE-ResNet-50": 37,
    "SKNet-50": 81,
    "DenseNet-121": 121,
    "DPN-68": 72,
    "VGG-16 with BN": 13,
    "MobileNet": 27,
    "MobileNetV2": 46,
    "MobileNetV3 large": 41,
    "MnasNet-B1": 45,
    "FBNet-Cb": 59,
    "GhostNet": 45,
    "EfficientNet-B0": 42,
    "ShuffleNet": 30,
    "ShuffleNetV2": 37,
    "DarkNet-53": 52,
    "DLA-34": 33,
    "HRNet-W18 small": 73,
    "VoVNet-27 slim": 27,
    "NASNet-A mobile": 132,
    "Inception-V3": 94,
    "Xception": 36,
    "RegNet-X": 31,
    "RegNet-Y": 31,
    "ResNet-50 of transformers": 37,
    "MobileNetV2 of transformers": 45,
    "LeViT": 3,
    "Wav2Vec2-Conformer (speech)": 4,
    "U-Net": 18,
    "U-Net, 3-D, residual": 9,
    "DynUNet": 10,
    "V-Net, 3-D": 24,
    "SegResNet, 3-D": 25,
    "DenseNet-121, 3-D": 121,
    "ResNet-18, 3-D": 17,
}

#: Those that make test runs too.
QUICK = ("ResNet-18", "MobileNetV2", "EfficientNet-B0", "DLA-34", "U-Net")


def test_there_are_enough():
    assert FUSIBLE.keys() == ARCHITECTURES.keys()
    assert sum(FUSIBLE.values()) == 1651


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_architecture(name):
    one = ARCHITECTURES[name]
    if not one.is_installed:
        pytest.skip(f"the package {one.package} is not installed")
    found = check_architecture(one, 2, small=True)
    assert found.is_right, found
    assert found.batch_norms > 0
    assert found.folded >= found.foldable
    assert found.fusible == FUSIBLE[name]
    assert found.fused >= FUSIBLE[name], found.left
