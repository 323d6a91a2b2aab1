"""Checks of an input in a forward, ``if x.shape[1] != self.channels: raise ...``, as calls in its graph."""

from __future__ import annotations

import dis
from types import FrameType


class NotAsTracedError(Exception):
    """A check that the graph was made without has found something; the class's own forward says what."""


def refuse(condition: object, found: bool) -> None:
    """Leave the fused forward where a check has found what it raises for."""
    if bool(condition) is found:
        raise NotAsTracedError


def raises_for(frame: FrameType) -> bool | None:
    """What value of the condition that a frame is evaluating leads to nothing but ``raise``: True in an ``if``, False
    in an ``assert``; None where the condition decides on something else.
    """
    code = list(dis.get_instructions(frame.f_code))
    here = next(i for i, instruction in enumerate(code) if instruction.offset >= frame.f_lasti)
    jump = next((i for i in range(here, min(here + 3, len(code))) if "JUMP" in code[i].opname), None)
    if jump is None or "_IF_" not in code[jump].opname:
        return None
    body = [one for one in code[jump + 1 :] if one.offset < code[jump].argval]
    if not body or body[-1].opname != "RAISE_VARARGS" or any("JUMP" in one.opname for one in body):
        return None
    return code[jump].opname.endswith("FALSE")
