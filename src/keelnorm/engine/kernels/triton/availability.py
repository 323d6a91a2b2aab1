"""The rule that chooses kernels and cuts for a tensor, and its explanation in words."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from keelnorm.engine.kernels.triton import tiling
from keelnorm.engine.kernels.triton.tiling import Tiling, View


@dataclass(frozen=True)
class Choice:
    """The cuts for one shape, layout and size of a value.

    Args:
        forward, backward: For the kernels that keep a block of channels on chip; None if its values do not fit.
        reduction, elementwise: For the kernels that walk over the tensor.
    """

    forward: Tiling | None
    backward: Tiling | None
    reduction: Tiling
    elementwise: Tiling


@lru_cache(maxsize=4096)
def by_rule(view: View, itemsize: int, processors: int) -> Choice:
    """Choose by rule, without timing."""
    reduction, elementwise = tiling.candidates(view, itemsize, processors)[0]
    forward = tiling.on_chip(view, itemsize, tiling.FORWARD_ON_CHIP)
    backward = tiling.on_chip(view, itemsize, tiling.BACKWARD_ON_CHIP)
    return Choice(forward, backward, reduction, elementwise)


def in_words(view: View, choice: Choice) -> list[str]:
    """Say what runs, and why, in a line each for forward and backward."""
    order = "channels-last" if view.last else "contiguous"
    lines = []
    for what, cut, limit in (
        ("forward", choice.forward, tiling.FORWARD_ON_CHIP),
        ("backward", choice.backward, tiling.BACKWARD_ON_CHIP),
    ):
        if cut is not None:
            lines.append(
                f"{what}: on chip, {cut.blocks} programs of {cut.a} × {cut.b} values ({order}, {cut.warps} warps): all "
                f"{view.values} values of a channel fit into one program ({limit} at most), so each tensor is read once"
            )
            continue
        r, e = choice.reduction, choice.elementwise
        lines.append(
            f"{what}: two passes, since the {view.values} values of a channel do not fit into one program ({limit} at "
            f"most, with as many channels beside as a fetch brings): {r.blocks} × {r.splits} programs sum over "
            f"{r.per_program} tiles of {r.a} × {r.b} values each ({order}, {r.warps} warps), their parts are merged in "
            f"a fixed order, and {e.blocks} × {e.splits} programs write {e.a} × {e.b} values each"
        )
    if view.wide:
        lines.append("offsets are 64 bits wide")
    return lines
