"""One record of the metrics recorder: what may be in it, and its text in JSON and in CSV."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

from foreshock.records.redaction import Secrecy, secrecy_of_key
from foreshock.records.strict_json import (
    JsonValue,
    decode_nonfinite_texts,
    dump_json,
    to_json_object,
    to_json_value,
)
from foreshock.records.timestamp import format_utc, parse_utc

REQUIRED = ("step", "epoch", "loss", "learning_rate")
STAMPS = ("timestamp", "elapsed_time_seconds")
FIXED = REQUIRED + STAMPS

_NUMBER_TYPES = frozenset({int, float})


class Row(NamedTuple):
    """A record on its way to the files.

    Attributes:
        names: of its optional values.
        values: the required ones, then the optional ones; floats may be NaN or infinite.
        is_plain: whether they all are numbers.
        time_ns: when it was recorded, nanoseconds since the epoch.
        elapsed_s: seconds of training until then.
    """

    names: tuple[str, ...]
    values: tuple[JsonValue, ...]
    is_plain: bool
    time_ns: int
    elapsed_s: float


class RowTexts(NamedTuple):
    """A row spelt out: the values of `FIXED`, then those of `names`, in either format."""

    names: tuple[str, ...]
    in_json: tuple[str, ...]
    in_csv: tuple[str, ...]


def are_numbers(values: Iterable[object]) -> bool:
    """Tells whether all values are Python's own ints and floats, which nothing changes later."""
    return _NUMBER_TYPES.issuperset(map(type, values))


def is_number(value: object) -> bool:
    """Tells whether a settled value is one that has statistics; a bool is none."""
    return type(value) in _NUMBER_TYPES


def checked_step(step: object) -> int:
    """Turns the argument `step` into an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is negative.
    """
    try:
        number = operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(step, bool):
        raise TypeError(f"step must be an integer, not {type(step).__name__}")
    if not 0 <= number < 2**63:
        raise ValueError(f"step must be 0 to 2**63 - 1, not {number}")
    return number


def checked_number(name: str, value: object) -> int | float:
    """Turns a required argument into a number, which may be NaN or infinite.

    Args:
        name: of the argument.
        value: a number, or an array or tensor that holds one.

    Raises:
        TypeError: it is neither.
    """
    number = _settled(value, to_json_value(value))
    if not is_number(number):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    return cast("int | float", number)


def settled_values(optional: Mapping[str, object]) -> dict[str, JsonValue]:
    """Copies optional values into what may be written, without secrets and long texts.

    Args:
        optional: by name.

    Returns:
        By the name that may be written. Floats that JSON lacks are still floats.

    Raises:
        ValueError: a name is one of `STAMPS`, which the recorder fills itself.
    """
    for stamp in STAMPS:
        if stamp in optional:
            raise ValueError(f'optional must not hold "{stamp}", which the recorder itself writes')
    settled: dict[str, JsonValue] = {}
    for name, value in optional.items():
        for shown, encoded in to_json_object({name: value}).items():
            settled[shown] = _settled(value, encoded)
    return settled


def is_harmless(name: str) -> bool:
    """Tells whether numbers under this name may be written as they are, and the name itself."""
    return secrecy_of_key(name) <= Secrecy.TEXT and to_json_object({name: 0}) == {name: 0}


def row_of_record(record: Mapping[str, object]) -> Row:
    """Makes a row again of what was written of it.

    Raises:
        KeyError, TypeError, ValueError: it is no record of this recorder.
    """
    optional = {name: value for name, value in record.items() if name not in FIXED}
    given = (*(record[name] for name in REQUIRED), *optional.values())
    values = cast("tuple[JsonValue, ...]", tuple(map(_number_again, given)))
    checked_step(values[0])
    time_ns = parse_utc(record["timestamp"])
    elapsed_s = checked_number("elapsed_time_seconds", record["elapsed_time_seconds"])
    return Row(tuple(optional), values, are_numbers(values), time_ns, float(elapsed_s))


def texts_of(row: Row) -> RowTexts:
    """Spells a row out.

    Cost: a microsecond per float; a row of finite numbers is the same in JSON and in CSV.
    """
    values = row.values
    stamps = (_timestamp(row.time_ns), repr(row.elapsed_s))
    if row.is_plain and _are_finite(values):
        texts = (*map(repr, values[: len(REQUIRED)]), *stamps, *map(repr, values[len(REQUIRED) :]))
        return RowTexts(row.names, texts, texts)
    return RowTexts(
        row.names,
        *(
            (*map(spell, values[: len(REQUIRED)]), *stamps, *map(spell, values[len(REQUIRED) :]))
            for spell in (_json_text, csv_cell)
        ),
    )


def json_line(texts: RowTexts) -> str:
    """The row as one line of strict JSON."""
    return _json_template(texts.names) % texts.in_json


def csv_line(texts: RowTexts, columns: tuple[str, ...]) -> str:
    """The row as one line of CSV, empty where it lacks a column.

    Args:
        texts: of the row.
        columns: `FIXED`, and at least the row's names.
    """
    return _csv_template(texts.names, columns).format(*texts.in_csv)


def csv_cell(value: JsonValue) -> str:
    """A value as one cell on one line: numbers bare, objects as JSON, line breaks escaped."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value if value.isprintable() else dump_json(value)[1:-1]
    else:
        encoded = to_json_value(value)
        text = encoded if isinstance(encoded, str) else dump_json(encoded)
    if any(mark in text for mark in ',"') or text != text.strip():
        text = '"' + text.replace('"', '""') + '"'
    return text


def csv_header(columns: Sequence[str]) -> str:
    """The line that names the columns."""
    return ",".join(map(csv_cell, columns))


def _settled(value: object, encoded: JsonValue) -> JsonValue:
    if isinstance(encoded, str) and not isinstance(value, str):
        return cast(JsonValue, decode_nonfinite_texts(encoded))
    return encoded


def _number_again(value: object) -> object:
    return decode_nonfinite_texts(value) if isinstance(value, str) else value


def _timestamp(time_ns: int) -> str:
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    return f"{_second(seconds)}.{rest_ns // 1_000_000:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    # Many rows share one; spelling it out costs more than all their numbers.
    return format_utc(seconds * 1_000_000_000)[: -len(".000Z")]


def _are_finite(numbers: Iterable[JsonValue]) -> bool:
    # One NaN or infinity makes the sum one; so may overflow, which only costs the slower way.
    try:
        return math.isfinite(sum(cast("Iterable[float]", numbers)))
    except OverflowError:  # an integer that no float can hold, and perhaps too long for repr
        return False


def _json_text(value: JsonValue) -> str:
    return dump_json(to_json_value(value))


@lru_cache(maxsize=256)
def _json_template(names: tuple[str, ...]) -> str:
    keys = [dump_json(name).replace("%", "%%") for name in (*FIXED, *names)]
    marks = ['"%s"' if name == STAMPS[0] else "%s" for name in (*FIXED, *names)]
    return "{" + ", ".join(f"{key}: {mark}" for key, mark in zip(keys, marks, strict=True)) + "}"


@lru_cache(maxsize=256)
def _csv_template(names: tuple[str, ...], columns: tuple[str, ...]) -> str:
    places = {name: f"{{{place}}}" for place, name in enumerate((*FIXED, *names))}
    return ",".join(places.get(column, "") for column in columns)
