"""Published architectures with random weights: the models of all benchmarks and of some tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from keelnorm.engine.optional_imports import missing_modules

#: Small inputs, for checks that need only the result: by the usual size of an image or a volume.
_SMALLER: dict[tuple[int, ...], tuple[int, ...]] = {
    (224, 224): (64, 64), (299, 299): (139, 139), (32,) * 3: (16,) * 3, (48,) * 3: (24,) * 3, (64,) * 3: (32,) * 3,
}  # fmt: skip
#: Windows of the average pooling over the whole image that pytorchcv's networks end with.
_WHOLE_IMAGE = (7, 8, 10)


@dataclass(frozen=True)
class Architecture:
    """A published architecture.

    Args:
        name: Its name here.
        package: The package that has it.
        make: Makes it, with random weights.
        shape: The shape of one sample.
        is_fixed: Whether it takes images of this size only.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    is_fixed: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether its package is installed."""
        return not missing_modules(self.package)

    def build(self, *, any_size: bool = False) -> nn.Module:
        """Build the network, equal at every call: dropout off, batch norms as after some training.

        Args:
            any_size: Make it take images of other sizes: the pooling at the end covers what is left of the image.
        """
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            for module in model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
                if isinstance(module, _BatchNorm):
                    _train_a_little(module)
            if any_size and self.name.startswith("VGG"):  # its linear layers take one size only
                model.output = nn.Sequential(
                    nn.Unflatten(1, (512, -1)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(512, 1000)
                )
        if any_size and not self.is_fixed:
            for path, module in list(model.named_modules()):
                if isinstance(module, nn.AvgPool2d) and module.kernel_size in _WHOLE_IMAGE:
                    model.set_submodule(path, nn.AdaptiveAvgPool2d(1))
        return model

    def batch(self, samples: int, dtype: torch.dtype = torch.float32, *, size: Sequence[int] | None = None) -> Tensor:
        """Draw inputs, equal at every call.

        Args:
            samples: How many.
            dtype: Their dtype.
            size: Of an image or a volume; None takes the usual one.
        """
        shape = (self.shape[0], *(self.shape[1:] if size is None else size))
        return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    @property
    def small_size(self) -> Sequence[int]:
        """A smaller size of an image or a volume that the network takes, if there is one."""
        size = self.shape[1:]
        return size if self.is_fixed else _SMALLER.get(size, size)


def _train_a_little(layer: _BatchNorm) -> None:
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.normal_(0, 0.1)
    layer.running_var.uniform_(0.7, 1.3)
    if layer.affine:
        with torch.no_grad():
            layer.weight.uniform_(0.7, 1.3)
            layer.bias.normal_(0, 0.1)


def _cv(name: str) -> Callable[[], nn.Module]:
    return lambda: import_module("pytorchcv.model_provider").get_model(name)


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = import_module("transformers")
        return getattr(package, model)(getattr(package, config)(**options))  # type: ignore[no-any-return]

    return make


def _monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module("monai.networks.nets"), name)(**options)


_IMAGE, _LARGE, _SMALL, _VOLUME = (3, 224, 224), (3, 299, 299), (1, 96, 96), (1, 32, 32, 32)
_FROM_PYTORCHCV = {
    "ResNet-18": "resnet18", "ResNet-50": "resnet50", "PreResNet-18": "preresnet18", "ResNeXt-50": "resnext50_32x4d",
    "SE-ResNet-50": "seresnet50", "SKNet-50": "sknet50", "DenseNet-121": "densenet121", "DPN-68": "dpn68",
    "VGG-16 with BN": "bn_vgg16", "MobileNet": "mobilenet_w1", "MobileNetV2": "mobilenetv2_w1",
    "MobileNetV3 large": "mobilenetv3_large_w1", "MnasNet-B1": "mnasnet_b1", "FBNet-Cb": "fbnet_cb",
    "GhostNet": "ghostnet", "EfficientNet-B0": "efficientnet_b0", "ShuffleNet": "shufflenet_g1_w1",
    "ShuffleNetV2": "shufflenetv2_w1", "DarkNet-53": "darknet53", "DLA-34": "dla34",
    "HRNet-W18 small": "hrnet_w18_small_v1", "VoVNet-27 slim": "vovnet27s", "NASNet-A mobile": "nasnet_4a1056",
}  # fmt: skip
_FIXED = ("dpn68",)
_FROM_PYTORCHCV_LARGE = {"Inception-V3": "inceptionv3", "Xception": "xception"}

ARCHITECTURES: dict[str, Architecture] = {
    one.name: one
    for one in (
        *(Architecture(name, "pytorchcv", _cv(theirs), _IMAGE, theirs in _FIXED)
          for name, theirs in _FROM_PYTORCHCV.items()),
        *(Architecture(name, "pytorchcv", _cv(theirs), _LARGE) for name, theirs in _FROM_PYTORCHCV_LARGE.items()),
        Architecture("RegNet-X", "transformers", _hf("RegNetModel", "RegNetConfig", layer_type="x", depths=[1, 1, 4, 7],
                     hidden_sizes=[24, 56, 152, 368], groups_width=8), _IMAGE),
        Architecture("RegNet-Y", "transformers", _hf("RegNetModel", "RegNetConfig", layer_type="y", depths=[1, 1, 4, 7],
                     hidden_sizes=[24, 56, 152, 368], groups_width=8), _IMAGE),
        Architecture("ResNet-50 of transformers", "transformers", _hf("ResNetModel", "ResNetConfig"), _IMAGE),
        Architecture("MobileNetV2 of transformers", "transformers", _hf("MobileNetV2Model", "MobileNetV2Config"),
                     _IMAGE),
        Architecture("LeViT", "transformers", _hf("LevitModel", "LevitConfig"), _IMAGE, is_fixed=True),
        Architecture("Wav2Vec2-Conformer (speech)", "transformers", _hf("Wav2Vec2ConformerModel",
                     "Wav2Vec2ConformerConfig", hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                     intermediate_size=128, apply_spec_augment=False, layerdrop=0.0), (8000,)),
        Architecture("U-Net", "monai", _monai("BasicUNet", spatial_dims=2, norm="batch"), _SMALL),
        Architecture("U-Net, 3-D, residual", "monai", _monai("UNet", spatial_dims=3, in_channels=1, out_channels=2,
                     channels=(8, 16, 32), strides=(2, 2), num_res_units=2, norm="batch", act="relu"), _VOLUME),
        Architecture("DynUNet", "monai", _monai("DynUNet", spatial_dims=2, in_channels=1, out_channels=2,
                     kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], norm_name="batch"), _SMALL),
        Architecture("V-Net, 3-D", "monai", _monai("VNet"), _VOLUME),
        Architecture("SegResNet, 3-D", "monai", _monai("SegResNet", norm="batch"), _VOLUME),
        Architecture("DenseNet-121, 3-D", "monai", _monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=2),
                     (1, 64, 64, 64)),
        Architecture("ResNet-18, 3-D", "monai", _monai("resnet18", spatial_dims=3, n_input_channels=1, num_classes=2),
                     (1, 48, 48, 48)),
    )
}  # fmt: skip


def require_packages(names: Iterable[str]) -> None:
    """End the program, with what to install, if a package of these architectures is missing."""
    packages = dict.fromkeys(ARCHITECTURES[name].package for name in names)
    if missing := missing_modules(*packages):
        raise SystemExit(f"the architectures need {', '.join(missing)}: pip install -r requirements/dev.txt")
