"""The model that a command is about, from `package.module:callable`."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keelnorm.cli._shared.failures import CommandError, one_line

if TYPE_CHECKING:
    from torch import nn


def load_model(
    name: str, arguments: str | None, weights: Path | None, key: str | None = None, prefix: str | None = None
) -> tuple[nn.Module, list[str]]:
    """Load the model of a command, with its weights; gives notes on where the weights were found.

    Args:
        name: ``package.module:callable``, or ``package.module:model`` for a model that exists.
        arguments: The callable's keywords, in JSON.
        weights: A file with its state_dict.
        key: The name of the state_dict in the file.
        prefix: The prefix of the keys to take.

    Raises:
        CommandError: The name is not found, gives no model, or the weights don't fit.
    """
    from torch import nn

    keywords = _keywords(arguments)
    found = find(name)
    if isinstance(found, nn.Module):
        if keywords:
            raise CommandError(f"--args: {name} is a model already, a {type(found).__name__}, and takes no keywords")
        model: Any = found
    else:
        model = call(name, found, keywords)
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name} must return a torch.nn.Module; it returned {described(model)}")
    if weights is None:
        if key is not None or prefix is not None:
            raise CommandError("--key and --prefix say what to take of --weights FILE, which is not given")
        return model, []
    from keelnorm.cli._shared.weights_file import load_weights

    return model, load_weights(model, weights, key, prefix)


def find(name: str) -> Any:
    """Import `package.module:attribute`: from what is installed, then from the current directory."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise CommandError(f"expected package.module:callable, such as torchvision.models:resnet50; got {name!r}")
    if os.sep in module_name or Path(module_name).is_file():
        raise CommandError(f"{name}: a module is meant, not its file: {_as_module(Path(module_name), attribute)}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last, so that no file in it hides an installed package
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(f"{name}: importing {module_name} raised {one_line(error)}") from None
        raise CommandError(
            f"{name}: no module named {error.name!r}; looked in {here} and in what is installed"
        ) from None
    except Exception as error:  # a module may raise anything
        raise CommandError(f"{name}: importing {module_name} raised {one_line(error)}") from None
    _check_not_hidden(name, module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = getattr(found, "__dict__", {})
            names = sorted(key for key, value in own.items() if callable(value) and not key.startswith("_"))
            from keelnorm.engine.error_messages import shortened

            has = f"; it has {shortened(names)}" if names else ""
            raise CommandError(f"{name}: there is no {part!r} in {module_name}{has}")
        found = getattr(found, part)
    return found


def source_of(name: str) -> tuple[str, int] | None:
    """The file and line of `package.module:attribute`, relative to the current directory; None if it lies elsewhere."""
    found = find(name)
    try:
        thing = inspect.unwrap(found) if callable(found) and not hasattr(found, "parameters") else type(found)
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
    except (TypeError, OSError):  # without source code, as what C defines
        return None
    path = None if file is None else Path(os.path.abspath(file))
    if path is None or not path.is_relative_to(Path.cwd()):
        return None
    return path.relative_to(Path.cwd()).as_posix(), max(line, 1)


def _as_module(path: Path, attribute: str) -> str:
    """The name of a file's module, to be written in place of its path."""
    path, here = Path(os.path.abspath(path)).with_suffix(""), Path.cwd()
    if path.is_relative_to(here):
        return f"{'.'.join(path.relative_to(here).parts)}:{attribute}"
    return f"{path.name}:{attribute}, in the directory {path.parent}"


def _check_not_hidden(name: str, module_name: str) -> None:
    """Raise if the current directory has a module of this name too, and another one was found first."""
    root = module_name.partition(".")[0]
    here, file = Path.cwd(), getattr(sys.modules[root], "__file__", None)
    for own in (here / f"{root}.py", here / root / "__init__.py"):
        if own.is_file() and not (file is not None and own.samefile(file)):
            raise CommandError(
                f"{name}: {root} is both {own.relative_to(here)} here and {file or 'part of Python'}, which comes "
                "first: rename yours, or set PYTHONPATH=. if it is meant; else run this in another directory"
            )


def call(name: str, found: Any, keywords: dict[str, Any]) -> Any:
    """Call what was found; its errors are reported with its name."""
    if not callable(found):
        raise CommandError(f"{name} must be a callable; it is {described(found)}")
    try:
        return found(**keywords)
    except Exception as error:  # its code may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
        raise CommandError(f"{name}({given}) raised {one_line(error)}") from None


def _keywords(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CommandError(f"--args must be JSON, such as '{{\"num_classes\": 10}}'; got {text!r}: {error}") from None
    if not isinstance(found, dict):
        raise CommandError(f"--args must be a JSON object of keywords, such as '{{\"num_classes\": 10}}'; got {text!r}")
    return found


def described(value: Any) -> str:
    """Describe a value in a few words."""
    from keelnorm.engine.error_messages import describe

    said = " ".join(describe(value).split())
    return said if len(said) <= 100 else f"a {type(value).__name__}"
