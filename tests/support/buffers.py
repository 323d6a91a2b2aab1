"""The buffers that a module shares with torch.nn's: those of its state_dict."""

from __future__ import annotations

from torch import Tensor, nn


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Named buffers without those that are not persistent, such as ``skipped_updates``."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}
