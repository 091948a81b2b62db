"""One file for a probe: safetensors, whose header holds the settings as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from foreshock.records.atomic_file import write_atomically
from foreshock.records.strict_json import dump_json, load_json

_FORMAT = "foreshock.surprise_probe"
_VERSION = 1
_SETTINGS = ("layers", "calibrator", "reading", "samples")


def write(
    path: str | os.PathLike[str], tensors: list[dict[str, Tensor]], settings: dict[str, Any]
) -> None:
    """Writes the tensors of each layer, and settings that JSON can hold, in one step.

    Raises:
        OSError: the file cannot be written; what was there is untouched.
    """
    named = {
        f"{i}.{name}": t.detach().cpu()
        for i, parts in enumerate(tensors)
        for name, t in parts.items()
    }
    header = {"format": _FORMAT, "version": _VERSION, **settings}
    write_atomically(path, safetensors.torch.save(named, {"foreshock": dump_json(header)}))


def read(path: str | os.PathLike[str]) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """What `write` was given.

    Raises:
        OSError, ValueError: the file cannot be read, or is no such file.
    """
    data = Path(path).read_bytes()
    try:
        named = safetensors.torch.load(data)
        header = load_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        settings = load_json(header["__metadata__"]["foreshock"].encode())
        kind = (settings["format"], settings["version"])
        tensors: list[dict[str, Tensor]] = [{} for _ in settings["layers"]]
        for key, tensor in named.items():
            index, _, name = key.partition(".")
            tensors[int(index)][name] = tensor
        found = {name: settings[name] for name in _SETTINGS}
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)} holds no probe: {error}") from error
    if kind != (_FORMAT, _VERSION):
        raise ValueError(f"{os.fspath(path)} says it is {kind}; accepted: {(_FORMAT, _VERSION)}")
    return tensors, found
