"""A state_dict from a file, without unpickling anything but tensors, and to a file."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from evenkeel.commands.errors import CommandError, need, one_line

#: Where checkpoints keep the state_dict, and what wrappers put before its keys.
_HOLDERS = ("state_dict", "model")
_PREFIXES = {"module.": "DistributedDataParallel's", "_orig_mod.": "torch.compile's"}


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a file's state_dict into a model, all of it; gives notes on how it was found.

    Raises:
        CommandError: The file is not of tensors alone, or does not fit the model.
    """
    content = read_tensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    state, notes = _state_in(content, path, model)
    try:
        model.load_state_dict(state)
    except Exception as error:
        why = _misfit(model, state) or one_line(error)
        raise CommandError(f"{path} does not fit the model: {why}") from None
    return notes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file."""
    need("cli", "safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_exists(path)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CommandError(f"{path} is no safetensors file: {error}") from None


def save_state_dict(model: nn.Module, path: Path) -> None:
    """Write a model's state_dict as safetensors; tensors that share memory are written for each of their names."""
    need("cli", "safetensors")
    from safetensors.torch import save_file

    state = model.state_dict()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CommandError(f"safetensors holds tensors alone; the state_dict has others: {_listed(others)}")
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, path, {"format": "pt"})


def _read_checkpoint(path: Path) -> Any:
    _check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickles of a kind that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CommandError(
            f"{path} holds more than tensors, or is no file of torch.save: a pickle can run any code, so it was not "
            "loaded; legal are a state_dict as .safetensors, and one written by torch.save(model.state_dict(), ...)"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CommandError(f"{path} is no file of torch.save: {one_line(error)}") from None


def _state_in(content: Any, path: Path, model: nn.Module) -> tuple[Mapping[str, Any], list[str]]:
    notes = []
    holder = next((key for key in _HOLDERS if isinstance(content, Mapping) and _is_state(content.get(key))), None)
    if holder is not None:
        content = content[holder]
        notes.append(f"The state_dict was taken from {holder!r} in {path.name}.")
    if not _is_state(content):
        names = f" with {_listed([str(key) for key in content])}" if isinstance(content, Mapping) else ""
        raise CommandError(
            f"{path} must hold a state_dict, by itself or under {' or '.join(map(repr, _HOLDERS))}; "
            f"it holds a {type(content).__name__}{names}"
        )
    own = model.state_dict().keys()
    for prefix, whose in _PREFIXES.items():
        if content.keys() - own and all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
            notes.append(f"{whose} prefix {prefix!r} was taken off the keys of {path.name}.")
    return content, notes


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and (not value or any(isinstance(one, Tensor) for one in value.values()))
    )


def _misfit(model: nn.Module, state: Mapping[str, Any]) -> str:
    """What is wrong with a state_dict for the model."""
    own = model.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor)
        if not is_lazy(value) and value.shape != state[key].shape
    ]
    found = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in found.items() if keys)


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
