"""Tensors whose storage was freed or cut short: an error that names them, by every operator, and nothing changed."""

from __future__ import annotations

import pytest
import torch

from keelnorm.engine.kernels import cpu

CHANNELS = 5
#: A value for every argument of a schema by its name; all tensors that there may be.
OTHERS = {
    "training": True, "update": True, "momentum": 0.1, "eps": 1e-5, "activation": 0, "a": 0.0, "b": 0.0,
    "keep": False, "groups": 2, "size": 2, "pooled": False, "need_input": True, "need_residual": False,
    "need_weight": True, "need_bias": True,
}  # fmt: skip
NAMES = {"counts": "update counts"}
SCHEMAS = {
    name: getattr(torch.ops.keelnorm, name).default._schema
    for name in (
        "stats", "measure_", "apply", "finish", "grad_stats", "grad_input", "forward", "forward_", "inplace_", "invert",
        "backward", "backward_", "forward_groups_", "backward_groups",
    )
}  # fmt: skip
TENSORS = [
    pytest.param(name, argument.name, id=f"{name}-{argument.name}")
    for name, schema in SCHEMAS.items()
    for argument in schema.arguments
    if "Tensor" in str(argument.type)
]


def tensors(operator, layout):
    """A tensor for each name, in a storage with more before and after it."""
    large = (4, CHANNELS, 3, 2)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "dy", "y", "residual"), large)
    vectors = ("weight", "bias", "running_mean", "running_var", "mean", "rstd")
    sizes |= dict.fromkeys(vectors, (CHANNELS,)) | {"num_batches_tracked": (), "mask": (4, 3, 2)}
    rows = 6 if operator == "backward_groups" else 3
    sizes |= {"counts": (3, CHANNELS), "saved": (rows, CHANNELS), "grad_means": (2, CHANNELS)}
    dtypes = dict.fromkeys(("saved", "grad_means", "mean", "rstd"), torch.float64) | {"mask": torch.bool}
    dtypes |= dict.fromkeys(("num_batches_tracked", "counts"), torch.int64)
    found = {}
    for name, size in sizes.items():
        count = torch.Size(size).numel()
        within = torch.ones(count + 6, dtype=dtypes.get(name, torch.float32))[3 : count + 3]
        if size == large and layout == "channels_last":
            found[name] = within.view(4, 3, 2, CHANNELS).movedim(-1, 1)
        elif size == large and layout == "strided":
            found[name] = torch.ones(4, CHANNELS, 3, 4)[..., ::2]
        elif size == large and layout == "expanded":
            found[name] = torch.ones(1, CHANNELS, 1, 2).expand(large)
        else:
            found[name] = within.view(size)
    return found


def span(t):
    """Bytes from the start of the storage to the end of the last value."""
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("cut", ["freed", "a byte short"])
@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_every_tensor_of_every_operator(operator, name, cut, layout):
    arguments = [argument.name for argument in SCHEMAS[operator].arguments]
    given = tensors(operator, layout)
    if operator in ("inplace_", "backward_") and layout in ("strided", "expanded"):
        given["x"] = tensors(operator, "contiguous")["x"]
    chosen = {argument: {**OTHERS, **given}[argument] for argument in arguments}
    others = {key: t for key, t in chosen.items() if isinstance(t, torch.Tensor) and key != name}
    before = {key: t.clone() for key, t in others.items()}
    call = getattr(torch.ops.keelnorm, operator)
    call(**{key: t.clone() if isinstance(t, torch.Tensor) else t for key, t in chosen.items()})  # is legal
    chosen[name].untyped_storage().resize_(0 if cut == "freed" else span(chosen[name]) - 1)
    with pytest.raises(RuntimeError, match=rf"^keelnorm: the memory of {NAMES.get(name, name)} is gone: its values "):
        call(**chosen)
    for key, t in others.items():
        assert torch.equal(t, before[key]), key


def test_all_operators_of_the_library_are_tried():
    """A new operator belongs into SCHEMAS."""
    assert cpu.load() is None
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("keelnorm::")]
    native = [name for name in registered if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    assert sorted(native) == sorted(f"keelnorm::{name}" for name in SCHEMAS)
