"""pytorchcv's networks with keelnorm's layers: the same parameters and buffers, fewer passes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import keelnorm as kn
from keelnorm.engine.activations import ActivationName


def use_keelnorm(net: nn.Module) -> nn.Module:
    """Put keelnorm's layers in the place of torch.nn's, in place, and fuse them with what follows.

    Parameters and buffers are the same tensors as before. Batch norm takes the activation behind it,
    if the layer knows it, and the addition that closes a residual block with the activation after it.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _layer(child))
    for module in net.modules():
        fused = _fused_classes().get(type(module))
        if fused is not None:
            module.__class__ = fused
    return net


def _layer(norm: nn.BatchNorm2d) -> kn.BatchNorm2d:
    layer = kn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    layer._parameters.update(norm._parameters)
    layer._buffers.update(norm._buffers)
    return layer.train(norm.training)


@cache
def _names() -> dict[type[nn.Module], ActivationName]:
    from pytorchcv.models import common

    return {
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.SiLU: "silu",
        common.Swish: "silu",
        nn.Hardswish: "hardswish",
        common.HSwish: "hardswish",
        nn.Sigmoid: "sigmoid",
    }


@cache
def layer_knows(name: ActivationName) -> bool:
    """Whether keelnorm's layers fuse the activation of this name."""
    try:
        kn.functional.batch_norm(torch.zeros(2, 1), torch.zeros(1), torch.ones(1), activation=name)
    except (TypeError, ValueError):
        return False
    return True


def fused_name(activation: nn.Module) -> str | None:
    """The name under which a layer takes this activation, or None if it has to run by itself."""
    name = _names().get(type(activation))
    return name if name is not None and layer_knows(name) else None


def _norm_and_activation(owner: Any, x: Tensor, residual: Tensor | None = None, activation: Any = None) -> Tensor:
    """`activation(bn(x) + residual)`, with one call where the layer can."""
    name = None if activation is None else fused_name(activation)
    x = owner.bn(x, residual, activation=name)
    return x if activation is None or name is not None else activation(x)  # type: ignore[no-any-return]


@cache
def _fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """pytorchcv's blocks, and what to run in their place; made late, since the package may be missing."""
    from pytorchcv.models import common, efficientnet, mobilenetv2, preresnet, resnet

    class ConvBlock(common.ConvBlock):  # type: ignore[misc]
        def forward(self, x: Tensor, residual: Tensor | None = None, after: nn.Module | None = None) -> Tensor:
            if self.use_pad:
                x = self.pad(x)
            x = self.conv(x)
            activation = self.activ if self.activate else after
            if not self.use_bn:
                x = x if residual is None else x + residual
                return x if activation is None else activation(x)  # type: ignore[no-any-return]
            return _norm_and_activation(self, x, residual, activation)

    class PreConvBlock(common.PreConvBlock):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Any:
            if self.use_bn:
                x = _norm_and_activation(self, x, None, self.activ if self.activate else None)
            elif self.activate:
                x = self.activ(x)
            return (self.conv(x), x) if self.return_preact else self.conv(x)

    class PreResInitBlock(preresnet.PreResInitBlock):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.pool(_norm_and_activation(self, self.conv(x), None, self.activ))  # type: ignore[no-any-return]

    class PreResActivation(preresnet.PreResActivation):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return _norm_and_activation(self, x, None, self.activ)

    class ResUnit(resnet.ResUnit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            identity = self.identity_conv(x) if self.resize_identity else x
            *first, last = self.body.children()
            for block in first:
                x = block(x)
            return last(x, identity, self.activ)  # type: ignore[no-any-return]

    class LinearBottleneck(mobilenetv2.LinearBottleneck):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            identity = x if self.residual else None
            if self.use_exp_conv:
                x = self.conv1(x)
            return self.conv3(self.conv2(x), identity)  # type: ignore[no-any-return]

    def padded(x: Tensor, unit: Any, kernel_size: int, stride: int) -> Tensor:
        if not unit.tf_mode:
            return x
        padding = efficientnet.calc_tf_padding(x, kernel_size=kernel_size, stride=stride)
        return nn.functional.pad(x, pad=padding)

    class EffiDwsConvUnit(efficientnet.EffiDwsConvUnit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            identity = x if self.residual else None
            return self.pw_conv(self.se(self.dw_conv(padded(x, self, 3, 1))), identity)  # type: ignore[no-any-return]

    class EffiInvResUnit(efficientnet.EffiInvResUnit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            identity = x if self.residual else None
            x = self.conv2(padded(self.conv1(x), self, self.kernel_size, self.stride))
            return self.conv3(self.se(x) if self.use_se else x, identity)  # type: ignore[no-any-return]

    made = (
        ConvBlock, PreConvBlock, PreResInitBlock, PreResActivation, ResUnit, LinearBottleneck, EffiDwsConvUnit,
        EffiInvResUnit,
    )  # fmt: skip
    return {fused.__base__: fused for fused in made}  # type: ignore[misc]
