"""Read a state_dict from a file, unpickling only tensors, and write one."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from keelnorm.cli._shared.failures import CommandError, need, one_line
from keelnorm.engine.error_messages import shortened

#: The usual keys of the state_dict in a checkpoint, and the prefixes that wrappers add to its own keys.
_HOLDERS = ("model_state_dict", "state_dict", "model", "ema", "net")
_PREFIXES = {"module.": "DistributedDataParallel's", "_orig_mod.": "torch.compile's", "model.": "A trainer's"}


def load_weights(model: nn.Module, path: Path, key: str | None = None, prefix: str | None = None) -> list[str]:
    """Load all of a file's state_dict into a model; gives notes on where it was found.

    Args:
        model: The model.
        path: A .safetensors file, or a file of torch.save.
        key: The key of the state_dict in the file, with dots for nested ones; None tries the usual names.
        prefix: Take only keys with this prefix, and remove it; None removes the usual prefixes of wrappers.

    Raises:
        CommandError: The file holds more than tensors, or does not fit the model.
    """
    content = read_tensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    state, notes = _state_in(content, path, key)
    state, more = _without_prefix(state, path, model, prefix)
    notes += more
    try:
        model.load_state_dict(state)
    except Exception as error:
        why = _misfit(model, state) or one_line(error)
        raise CommandError(f"{path} does not fit the model: {why}") from None
    return notes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file."""
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
        raise CommandError(f"safetensors holds tensors alone; the state_dict has others: {shortened(others)}")
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, path, {"format": "pt"})


def _read_checkpoint(path: Path) -> Any:
    _check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CommandError(
            f"{path} holds more than tensors, or is no file of torch.save: a pickle can run any code, so it was not "
            "loaded; legal are a state_dict as .safetensors, and one written by torch.save(model.state_dict(), ...)"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CommandError(f"{path} is no file of torch.save: {one_line(error)}") from None


def _state_in(content: Any, path: Path, key: str | None) -> tuple[Mapping[str, Any], list[str]]:
    """The state_dict that is the whole content of a file, or under a key of it."""
    held = [one for one, value in content.items() if _is_state(value) and value] if isinstance(content, Mapping) else []
    usual = [one for one in _HOLDERS if one in held]
    if key is None and len(usual) > 1:
        raise CommandError(f"{path} has several state_dicts; --key says which: {' or '.join(usual)}")
    if key is None and not usual and held:
        raise CommandError(f"{path} has a state_dict under {shortened(held)}; --key says which")
    name = key if key is not None else usual[0] if usual else None
    if name is not None:
        found = _under(content, name)
        if not _is_state(found):
            there = (
                f"it has {shortened([str(one) for one in content])}"
                if isinstance(content, Mapping)
                else "there is none"
            )
            raise CommandError(f"{path} has no state_dict under {name!r}; {there}")
        return found, [f"The state_dict was taken from {name!r} in {path.name}."]
    if not _is_state(content):
        names = f" with {shortened([str(one) for one in content])}" if isinstance(content, Mapping) else ""
        raise CommandError(
            f"{path} must hold a state_dict, by itself, under {', '.join(map(repr, _HOLDERS))}, or under --key; "
            f"it holds a {type(content).__name__}{names}"
        )
    return content, []


def _under(content: Any, key: str) -> Any:
    """The value under a key, or under nested keys joined by dots; None if there is none."""
    if not isinstance(content, Mapping):
        return None
    first, dot, rest = key.partition(".")
    return content[key] if key in content else _under(content.get(first), rest) if dot else None


def _without_prefix(
    state: Mapping[str, Any], path: Path, model: nn.Module, prefix: str | None
) -> tuple[Mapping[str, Any], list[str]]:
    """The state_dict without the prefix of its keys, and notes."""
    if prefix is not None:
        left = [key for key in state if not key.startswith(prefix)]
        if len(left) == len(state):
            raise CommandError(f"{path} has no key that begins with --prefix {prefix!r}; it has {shortened(left)}")
        notes = (
            [f"{len(left)} keys of {path.name} without {prefix!r} were left out: {shortened(left)}."] if left else []
        )
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, notes
    own, found, notes = model.state_dict().keys(), state, []
    while found.keys() - own:
        common = next((one for one in _PREFIXES if all(key.startswith(one) for key in found)), None)
        if common is None:
            break
        found = {key.removeprefix(common): value for key, value in found.items()}
        notes.append(f"{_PREFIXES[common]} prefix {common!r} was taken off the keys of {path.name}.")
    better = len(found.keys() & own) > len(state.keys() & own)
    return (found, notes) if better else (state, [])


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and (not value or any(isinstance(one, Tensor) for one in value.values()))
    )


def _misfit(model: nn.Module, state: Mapping[str, Any]) -> str:
    """Say why a state_dict does not fit the model."""
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
    wrong = [f"{len(keys)} {what}: {shortened(keys)}" for what, keys in found.items() if keys]
    first = next(iter(own), "")
    for prefix in (key.removesuffix(first) for key in state if key.endswith(f".{first}")):
        if all(prefix + key in state for key in own):
            wrong.append(f"with --prefix {prefix} it has all keys of the model")
    return "; ".join(wrong)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
