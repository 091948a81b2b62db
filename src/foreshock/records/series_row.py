"""One row of a series: a step, and numbers by name, or by name and label."""

import re
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from foreshock.records.metrics_row import checked_number, checked_step, is_number
from foreshock.records.strict_json import (
    JsonValue,
    decode_nonfinite_texts,
    dump_json,
    load_json,
    to_json_object,
)
from foreshock.records.timestamp import format_utc, parse_utc

MAX_NUMBERS = 1024
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MAX_LABEL_CHARACTERS = 256
_STAMPS = ("step", "time")

Column = tuple[str, str]
"""A name, and a label; the label of a number that stands alone is empty."""


class SeriesRow(NamedTuple):
    """What was seen at a step.

    Attributes:
        step: of the training.
        time_ns: when it was recorded, nanoseconds since the epoch.
        columns: whose the numbers are.
        numbers: as many; they may be NaN or infinite.
    """

    step: int
    time_ns: int
    columns: tuple[Column, ...]
    numbers: "array[float]"

    def record(self) -> dict[str, object]:
        """The row as a dict: step, time (UTC, as a text), then the values."""
        values: dict[str, object] = {"step": self.step, "time": format_utc(self.time_ns)}
        for (name, label), number in zip(self.columns, self.numbers, strict=True):
            if label:
                vector = values.setdefault(name, {})
                assert isinstance(vector, dict)
                vector[label] = number
            else:
                values[name] = number
        return values

    def line(self) -> bytes:
        """The row as one line of strict JSON, without its line break."""
        return dump_json(to_json_object(self.record())).encode()


def make_row(step: object, values: Mapping[str, object]) -> SeriesRow:
    """Copies what was given into a row, stamped with the present time.

    Args:
        step: an integer from 0.
        values: by name, each a number, or a mapping from labels to numbers.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.
    """
    number_of_step = checked_step(step)
    columns: list[Column] = []
    numbers = array("d")
    for name, value in values.items():
        check_name(name)
        for label, number in _labelled(name, value):
            columns.append((name, label))
            numbers.append(_float(f"{name}[{label!r}]" if label else name, number))
    if len(columns) > MAX_NUMBERS:
        raise ValueError(f"the row holds {len(columns)} numbers; accepted: up to {MAX_NUMBERS}")
    return SeriesRow(number_of_step, time.time_ns(), tuple(columns), numbers)


def check_name(name: str) -> None:
    """Raises ValueError unless a value may have this name."""
    if not _NAME.fullmatch(name) or name in _STAMPS:
        raise ValueError(
            f"the name of a value is {name!r}; accepted: up to 64 letters, digits and underscores, "
            f"no digit first, and not {' or '.join(_STAMPS)}"
        )


def row_of_line(line: bytes) -> SeriesRow | None:
    """Reads a row again; None if the line is no whole one."""
    try:
        record = load_json(line)
        step, time_ns = checked_step(record.pop("step")), parse_utc(record.pop("time"))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    columns: list[Column] = []
    numbers = array("d")
    for name, value in record.items():
        of_name = value if isinstance(value, dict) else {"": value}
        for label, text in of_name.items():
            number = decode_nonfinite_texts(text)
            if is_number(number):  # else redacted, or another program's
                columns.append((name, label))
                numbers.append(_float(name, number))
    return SeriesRow(step, time_ns, tuple(columns), numbers)


def _labelled(name: str, value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, Mapping):
        yield "", value
        return
    for label, number in value.items():
        is_text = isinstance(label, str) and label.isprintable()
        if not is_text or not 0 < len(label) <= _MAX_LABEL_CHARACTERS:
            raise ValueError(
                f"{name} has the label {label!r}; accepted: up to {_MAX_LABEL_CHARACTERS} "
                "printable characters, at least one"
            )
        yield label, number


def _float(name: str, value: "object | JsonValue") -> float:
    if type(value) is float:
        return value
    number = checked_number(name, value)
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is an integer that no float holds; accepted: a number") from None
