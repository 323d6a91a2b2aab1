"""The inputs a model is run on: random numbers of a shape, or arrays in a file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keelnorm.cli._shared.failures import CommandError
from keelnorm.cli._shared.model_source import call, described, find
from keelnorm.cli._shared.weights_file import read_tensors

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


def example_of(model: nn.Module, inputs: list[str] | None, file: Path | None) -> Any:
    """Make the example that --input or --example describes, on the model's device; None for neither.

    Floating-point numbers have the model's dtype, unless --input names another.

    Raises:
        CommandError: Both are given, or one is not valid.
    """
    if inputs and file:
        raise CommandError("--input and --example exclude each other")
    if file is not None:
        if file.suffix == ".safetensors":
            return {name: _beside(model, _in_dtype(model, tensor)) for name, tensor in read_tensors(file).items()}
        if file.suffix == ".npy":
            return _beside(model, _in_dtype(model, _read_arrays(file)[file.stem]))
        raise CommandError(f"--example must be a .safetensors or .npy file; got {file}")
    generator = torch.Generator().manual_seed(0)
    return tuple(_beside(model, _random(model, text, generator)) for text in inputs) if inputs else None


def loss_of(name: str) -> Any:
    """The loss that --loss names: a function, a module, or a module's class, which is called without arguments.

    Raises:
        CommandError: It does not exist, or can't be called.
    """
    found = find(name)
    if isinstance(found, type):
        return call(name, found, {})
    if not callable(found):
        raise CommandError(
            f"--loss: {name} must be a module, or a function of model and batch; it is {described(found)}"
        )
    return found


def batches_of(model: nn.Module, data: str, batch_size: int) -> Iterable[Any]:
    """Make the batches that --data names: the array of a file, split along N, or what a callable returns.

    Raises:
        CommandError: The file or callable does not exist, or gives something else.
    """
    if ":" in data and not Path(data).exists():
        found = find(data)
        batches: Any = call(data, found, {}) if callable(found) else found
        if isinstance(batches, Tensor | np.ndarray | str | bytes | dict) or not isinstance(batches, Iterable):
            raise CommandError(f"{data} must return an iterable of batches; it gave {described(batches)}")
        return batches
    path = Path(data)
    if path.suffix not in (".safetensors", ".npy", ".npz"):
        raise CommandError(f"--data must be a .safetensors, .npy or .npz file, or package.module:callable; got {data}")
    arrays = read_tensors(path) if path.suffix == ".safetensors" else _read_arrays(path)
    if len(arrays) != 1:
        raise CommandError(f"{path} must have one array, the inputs (N, ...); it has {', '.join(arrays) or 'none'}")
    [inputs] = arrays.values()
    if not (inputs.ndim and inputs.numel()):
        raise CommandError(f"{path} must have an array of inputs (N, ...); it has one of shape {tuple(inputs.shape)}")
    return list(_in_dtype(model, inputs).split(batch_size))


def _random(model: nn.Module, text: str, generator: torch.Generator) -> Tensor:
    sizes, colon, name = text.partition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1 or (colon and name not in _DTYPES):
        raise CommandError(
            f"--input must be sizes of at least 1 and a dtype where it matters, such as 1,3,224,224 or 1,128:int64; "
            f"got {text!r}; dtypes are {', '.join(_DTYPES)}"
        )
    if math.prod(shape) > 2**33:
        raise CommandError(f"--input {text}: these are {math.prod(shape):.2g} numbers, which is taken for a mistake")
    dtype = getattr(torch, name) if colon else _dtype_of(model)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a .npz file, or of a .npy file under the file's name; nothing is unpickled."""
    try:
        content = np.load(path, allow_pickle=False)
        arrays = {path.stem: content} if isinstance(content, np.ndarray) else dict(content)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except FileNotFoundError:
        raise CommandError(f"there is no file {path}") from None
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise CommandError(f"{path} is no {path.suffix} file of numbers: {error}") from None


def _dtype_of(model: nn.Module) -> torch.dtype:
    values = (value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point())
    return next((value.dtype for value in values), torch.get_default_dtype())


def _in_dtype(model: nn.Module, tensor: Tensor) -> Tensor:
    """Convert a floating-point tensor to the model's dtype, because numpy's default differs from torch's."""
    return tensor.to(_dtype_of(model)) if tensor.is_floating_point() else tensor


def _beside(model: nn.Module, tensor: Tensor) -> Tensor:
    """Move a tensor to the device of the model."""
    return next((tensor.to(value.device) for value in model.parameters()), tensor)
