"""Settings out of a YAML file: typed, validated, and with no surprises of YAML's own."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foreshock.guard import Guard
from foreshock.monitor import MonitorSettings
from foreshock.run_metrics import TrainingSettings
from foreshock.settings import Settings


class ForeshockSettings(Settings):
    """How the training is watched, and what may be done about it."""

    monitor: MonitorSettings = MonitorSettings()
    """Fields of `foreshock.Monitor`."""
    guard: Guard = Guard()
    """Fields of `foreshock.Guard`."""


class RunSettings(Settings):
    """What `load_settings` reads.

    >>> settings = load_settings("run.yaml")
    >>> given = settings.foreshock
    >>> arguments = {**dict(given.monitor), **dict(settings.training)}
    >>> fs.Monitor(model, optimizer, "runs/first", given.guard, **arguments)
    """

    training: TrainingSettings = TrainingSettings()
    """The section `training`."""
    foreshock: ForeshockSettings = ForeshockSettings()
    """The section `foreshock`."""


def load_settings(path: str | os.PathLike[str]) -> RunSettings:
    """Reads a YAML file with the sections `training` and `foreshock`; what it leaves out has its
    default.

    Where YAML 1.1 makes something else of a bare word than a person may mean (`off` is false, `no`
    is false, `2026-01-01` is a date), the error says that quotes are missing; nothing is converted
    silently. `1e6`, for YAML a text, is the number.

    Args:
        path: the file, in UTF-8.

    Returns:
        The settings; immutable.

    Raises:
        TypeError: path is no path.
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, says a thing twice, has an unknown key (the nearest known
            one is suggested), or a value that is not accepted; the error names file and field.
        ImportError: PyYAML is not installed; the extra `yaml` has it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; accepted: str or os.PathLike")
    contents = Path(path).read_bytes()
    try:
        given = _without_empty_sections(_parse(contents), RunSettings)
        if not isinstance(given, dict):
            accepted = ", ".join(RunSettings.model_fields)
            raise ValueError(f"is a {type(given).__name__}; accepted: a mapping with {accepted}")
        _check_words(given, RunSettings, ())
        return RunSettings.model_validate(given)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {_spelt_out(error)}") from error


def _parse(contents: bytes) -> Any:
    try:
        import yaml
    except ImportError as error:
        why = "reading settings from YAML needs PyYAML; install foreshock[yaml]"
        raise ImportError(why) from error
    try:
        text = contents.decode("utf-8-sig")
        _check_repetition(yaml.compose(text, Loader=yaml.SafeLoader), ())
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"is not YAML that can be read: {error}") from error


def _check_repetition(node: Any, where: tuple[str, ...]) -> None:
    """YAML itself lets the last of two equal keys win; the first would be lost unseen."""
    if node is None or isinstance(node.value, str):
        return
    if node.id == "sequence":
        for item in node.value:
            _check_repetition(item, where)
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            line = key.start_mark.line + 1
            raise ValueError(f"{'.'.join((*where, name))} stands twice, again in line {line}")
        seen.add(name)
        _check_repetition(value, (*where, name))


def _without_empty_sections(given: Any, model: type[Settings]) -> Any:
    """A section whose lines are all left out is one with nothing but defaults."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        return given
    sections = {key: kind for key in given if (kind := _section(model, key)) is not None}
    return {
        key: _without_empty_sections(value, sections[key]) if key in sections else value
        for key, value in given.items()
    }


def _section(model: type[Settings], key: object) -> type[Settings] | None:
    field = model.model_fields.get(key) if isinstance(key, str) else None
    kind = None if field is None else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _check_words(given: Any, model: type[Settings], where: tuple[str, ...]) -> None:
    for key, value in given.items() if isinstance(given, dict) else ():
        if key not in model.model_fields:  # the model itself says which there are
            continue
        section, path = _section(model, key), (*where, key)
        if section is not None:
            _check_words(value, section, path)
        elif model.model_fields[key].annotation is not bool:
            for scalar in _scalars(value):
                _check_word(scalar, ".".join(path))


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _check_word(scalar: Any, name: str) -> None:
    if isinstance(scalar, bool):
        raise ValueError(
            f"{name} is {str(scalar).lower()}, which is what YAML makes of a bare yes, no, on, "
            "off, true or false; accepted: another value, or the word in quotes"
        )
    if isinstance(scalar, datetime.date):
        raise ValueError(
            f"{name} is the date {scalar.isoformat()}, which is what YAML makes of such a word; "
            "accepted: the word in quotes"
        )


def _spelt_out(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, found["loc"])), _said(found))))
        for found in error.errors(include_url=False)
    )


def _said(found: Any) -> str:
    said = str(found["msg"]).removeprefix("Value error, ")
    is_ours = found["type"] == "value_error"
    return said if is_ours else f"{said}, it is {found['input']!r}"
