"""A model as an ONNX file, compared with itself."""

from __future__ import annotations

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evenkeel.commands.errors import CommandError, need
from evenkeel.surgery.folding_check import difference
from evenkeel.surgery.nested import call_of, tensors_in

#: The largest difference between torch and onnxruntime, relative to the output's largest value.
_LARGEST = 1e-3


def check_packages() -> None:
    """Raise, saying what to install, when a package is missing that writing ONNX needs."""
    need("export", "onnx", "onnxscript", "onnxruntime")


def write_onnx(model: nn.Module, example: Any, path: Path) -> float:
    """Write a model in evaluation mode as ONNX, for inputs of the example's shapes.

    Returns:
        The largest difference that onnxruntime makes to its outputs on the example, relative to their largest value.

    Raises:
        CommandError: It is too large, or the file takes other inputs than the model.
        Whatever the exporter raises for models that it can't write.
    """
    args, kwargs = call_of("fold", example)
    _export(model, args, kwargs, path)
    with torch.no_grad():
        expected = [tensor.cpu() for tensor in tensors_in(model(*args, **kwargs))]
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    off = difference(expected, _run(path, given, tensors_in((args, kwargs))))
    if not off <= _LARGEST:
        raise CommandError(
            f"onnxruntime's output differs by {off:.2g} of its largest value; at most {_LARGEST} is legal"
        )
    return off


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as is what the logger says, these are about the exporter's own parts
            torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False)
    finally:
        logger.setLevel(level)


def _run(path: Path, given: dict[str, Any], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the file gives; its inputs have the names of forward's arguments, or else are in their order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    if len(names) != len(inputs):
        raise CommandError(f"the ONNX file takes {', '.join(names)}; the example has {len(inputs)} tensors")
    if all(isinstance(given.get(name), torch.Tensor) for name in names):
        inputs = [given[name] for name in names]
    feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]
