"""Export a model to ONNX, and compare the file's outputs with the model's before it is kept."""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keelnorm.control.layer_selection import named
from keelnorm.engine.error_messages import check_module
from keelnorm.engine.optional_imports import lacking
from keelnorm.nn._shared.variant import Variant
from keelnorm.surgery.folding.fold_check import difference
from keelnorm.surgery.interchange.prepare_export import prepare_export
from keelnorm.surgery.known_layers import is_frozen
from keelnorm.surgery.observation.nested_tensors import call_of, map_tensors, tensors_in
from keelnorm.surgery.report import Report
from keelnorm.surgery.target_layers import batch_norms_in

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    training: bool = False,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
) -> Report:
    """Write a model as ONNX, and compare the file's outputs in onnxruntime with the model's.

    A copy of the model goes through :func:`prepare_export` and ``torch.onnx.export``. The file is checked by
    ``onnx.checker`` and run by onnxruntime on the example and on other values of its shapes. It is written to a
    temporary folder next to ``path``, and moved there if all outputs agree.

    Args:
        model: The model, in evaluation mode unless ``training``.
        example: A tensor, the model's only argument; a tuple of its arguments; or a mapping of its keywords.
        path: The path of the file; an existing file is replaced.
        tolerance: The largest difference of an output, relative to its largest value.
        training: Whether batch norms in training mode normalize with the batch in the file too (ONNX's
            ``training_mode``). All else is written as in evaluation, dropout included.
        dynamic_shapes: As for ``torch.onnx.export``; by default the shapes are the example's. The file must have them.
        opset_version: As for ``torch.onnx.export``. The file must have it.

    Returns:
        The report of :func:`prepare_export`, with the two differences in its summary.

    Differs:
        ``torch.onnx.export`` writes a model in training mode as if it were in evaluation, without a warning; here that
        is an error, unless ``training``. onnxruntime fuses a convolution and a batch norm as if it were in evaluation,
        whatever the file says: run such a file with optimizations disabled
        (``GraphOptimizationLevel.ORT_DISABLE_ALL``), as the comparison does.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing; the message says how to install it.
        ValueError: Layers normalize with the batch, see :func:`prepare_export`.
        RuntimeError: The outputs differ by more than the tolerance, a batch norm in training mode has no counterpart in
            ONNX, or the file has another opset or other dynamic axes than asked for. No file is written then.
        Exception: Any error of the exporter, for a model that it can't write.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> report = export_onnx(model, torch.randn(1, 3, 8, 8), "model.onnx")  # doctest: +SKIP
        >>> report.summary["difference"] < 1e-5  # doctest: +SKIP
        True
    """
    if words := lacking("export", *_PACKAGES):
        raise ModuleNotFoundError(f"export_onnx needs {words}")
    check_module("export_onnx", model)
    args, kwargs = call_of("export_onnx", example)
    prepared, report = prepare_export(model, training="allow" if training else "refuse")
    if model.training and not training:
        raise ValueError(
            "export_onnx: the model is in training mode, and the file would be as in evaluation; call model.eval() "
            "first, or pass training=True to keep batch norms in training mode"
        )
    layers = batch_norms_in("export_onnx", prepared)
    in_training = [path for path, layer in layers.items() if training and layer.training and not is_frozen(layer)]
    _refuse_training(path for path in in_training if isinstance(layers[path], Variant))
    prepared.eval()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        file = Path(folder) / target.name
        with torch.no_grad():
            _write(prepared, args, kwargs, file, dynamic_shapes, opset_version, in_training)
        for layer in in_training:
            prepared.get_submodule(layer).train()
        given = inspect.signature(prepared.forward).bind(*args, **kwargs).arguments
        if dynamic_shapes:
            _check_dynamic(dynamic_shapes, args, kwargs, given, file)
        others = map_tensors(_other_values, args), map_tensors(_other_values, kwargs)
        found = [_difference(prepared, a, k, file, as_written=bool(in_training)) for a, k in ((args, kwargs), others)]
        if not max(found) <= tolerance:
            raise RuntimeError(
                f"export_onnx: onnxruntime's output differs by {max(found):.2g} of its largest value, more than the "
                f"tolerance of {tolerance:.2g}; no file was written. Pass a larger tolerance to accept it"
            )
        os.replace(file, target)
    names = ("difference", "on other values")
    return Report("export_onnx", {**report.summary, **dict(zip(names, found, strict=True))}, report.rows, report.notes)


def _write(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
    dynamic_shapes: Any,
    opset: int | None,
    in_training: list[str],
) -> None:
    """Export and check the file; the batch norms at the paths ``in_training`` get ONNX's training mode."""
    import onnx

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the exporter's own parts, as are the loggers' messages
            torch.onnx.export(
                model, args, path, kwargs=kwargs, dynamo=True, external_data=False, verbose=False,
                dynamic_shapes=dynamic_shapes, opset_version=opset, optimize=not in_training,
            )  # fmt: skip
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    proto = onnx.load(path)
    written = next(one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if opset not in (None, written):  # torch.onnx says so in its log at most
        raise RuntimeError(
            f"export_onnx: opset_version={opset} was asked for, and this torch's exporter wrote version {written}, "
            "which it can't translate; no file was written. Ask for another version, or leave opset_version out"
        )
    if in_training:
        onnx.save(_set_training(proto, in_training), path)
    onnx.checker.check_model(path)


def _set_training(proto: Any, layers: list[str]) -> Any:
    """Set ONNX's attribute for training mode on the batch norms at these paths, found by their buffers' names."""
    import onnx

    paths = {f"{path}.running_mean" if path else "running_mean": path for path in layers}
    found = set()
    for node in proto.graph.node:  # several for a layer that is called several times
        name = node.input[3] if node.op_type == "BatchNormalization" else None
        if name in paths:
            found.add(paths[name])
            kept = [attribute for attribute in node.attribute if attribute.name != "training_mode"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("training_mode", 1)])
            node.output.extend(f"{node.output[0]}.new_{name}" for name in ("running_mean", "running_var"))
    _refuse_training(set(layers) - found)
    return proto


def _refuse_training(paths: Iterable[str]) -> None:
    refused = [named(path) for path in sorted(paths)]
    if refused:
        raise RuntimeError(
            f"export_onnx: {', '.join(refused)} can't be written in training mode, because ONNX has no such operator; "
            "freeze it (kn.freeze), or put it in evaluation mode"
        )


def _other_values(value: Tensor) -> Tensor:
    """Other values of the same shape: random numbers, or integers (which may be indices) in another order."""
    generator = torch.Generator().manual_seed(0)
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)


def _difference(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, *, as_written: bool
) -> float:
    """How far the file's outputs differ from the model's; ``as_written`` disables onnxruntime's optimizations."""
    with torch.no_grad():
        expected = [tensor.cpu() for tensor in tensors_in(model(*args, **kwargs))]
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    return difference(expected, _run(path, given, tensors_in((args, kwargs)), as_written=as_written))


def _run(path: Path, given: dict[str, Any], inputs: list[Tensor], *, as_written: bool) -> list[Tensor]:
    """Run the file in onnxruntime and return its outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    tensors = _by_name([one.name for one in session.get_inputs()], given, inputs)
    feed = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _by_name(names: list[str], given: Mapping[str, Any], inputs: list[Tensor]) -> dict[str, Tensor]:
    """The tensors by the file's input names: matched to forward's arguments by name, or else by order."""
    if len(names) != len(inputs):
        raise RuntimeError(
            f"export_onnx: the file takes {', '.join(names)}, but the example has {len(inputs)} tensors: the exporter "
            "left out those that the output does not depend on. Leave them out of the example and of forward too"
        )
    if all(isinstance(given.get(name), Tensor) for name in names):
        inputs = [given[name] for name in names]
    return dict(zip(names, inputs, strict=True))


def _check_dynamic(
    dynamic_shapes: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any], path: Path
) -> None:
    """Raise if an axis that was asked to be dynamic has a fixed size in the file."""
    import onnx

    values = given if isinstance(dynamic_shapes, Mapping) else [*args, *kwargs.values()]
    asked = dict(_dynamic_axes(dynamic_shapes, values))
    inputs = onnx.load(path).graph.input
    tensors = _by_name([one.name for one in inputs], given, tensors_in((args, kwargs)))
    for one in inputs:
        dims = one.type.tensor_type.shape.dim
        fixed = [axis for axis in asked.get(id(tensors[one.name]), ()) if dims[axis].HasField("dim_value")]
        if fixed:
            raise RuntimeError(
                f"export_onnx: dynamic_shapes asks for a dynamic axis {fixed[0]} of {one.name}, which the exporter has "
                f"fixed to {dims[fixed[0]].dim_value}, because the model's code depends on its size; no file was "
                "written. Change that code, or ask for a fixed axis (torch.export.Dim.STATIC)"
            )


def _dynamic_axes(shapes: Any, value: Any) -> Iterator[tuple[int, list[int]]]:
    """The axes of each tensor that are to be dynamic, by the tensor's ``id``."""
    if isinstance(value, Tensor):
        axes = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        free = (None, torch.export.Dim.AUTO, torch.export.Dim.STATIC)
        yield id(value), [axis for axis, dim in axes if dim not in free and not isinstance(dim, int)]
    elif isinstance(value, Mapping) and isinstance(shapes, Mapping):
        for name in value.keys() & shapes.keys():
            yield from _dynamic_axes(shapes[name], value[name])
    elif isinstance(value, list | tuple) and isinstance(shapes, list | tuple):
        for one, part in zip(shapes, value, strict=False):
            yield from _dynamic_axes(one, part)
