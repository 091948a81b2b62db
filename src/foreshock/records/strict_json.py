"""Strict JSON (RFC 8259) out of whatever a training run holds, and back.

JSON has no NaN and no infinities; they are written as the strings "NaN", "Infinity", "-Infinity".
Encoding never raises, because watching must never break what is watched:

- numbers, texts, booleans, None, mappings, lists, tuples: as they are (texts subject to redaction)
- zero-dimensional arrays and tensors of any library: their `.item()`
- enum members: their value if it is text, else their name; dataclasses: an object of their fields
- sets: sorted lists; paths: text; dates: ISO 8601; other real numbers: floats
- integers of more than 2048 bits, cycles, nesting below 64 levels and all else: a text in angle
  brackets that says what stood there, such as "<torch.Tensor>", never its contents
- a key that is not text: the text that bytes spell, else the JSON text of its encoded value
  (3 -> "3", None -> "null", (1, 2) -> "[1, 2]"); of two keys that become one the later wins
- named tuples: lists, in which the name of a secret hides its value as a key does
- lone surrogates, which strict parsers refuse: their escaped spelling, "\\udc80"
"""

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from numbers import Integral, Real
from typing import Any, NoReturn, TypeAlias, cast

from foreshock.records.redaction import (
    MAX_TEXT_CHARACTERS,
    Secrecy,
    redacted_secret,
    redacted_text,
    secrecy_of_key,
)

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

_SCALAR_TYPES = frozenset({float, int, str, bool, type(None)})
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

MAX_DEPTH = 64
# Python itself refuses to write or read integers of some thousand digits.
_MAX_INTEGER = 2**2048


def to_json_value(value: object, *, redact: bool = True) -> JsonValue:
    """Copies a value into what strict JSON can hold; later changes of the value do not reach it.

    Args:
        value: anything.
        redact: replace texts of more than 256 characters by their length and digest. Values under
            keys that name secrets are redacted whatever this says.

    Returns:
        None, booleans, finite numbers, texts, and lists and string-keyed dicts of these.

    Cost: well below a microsecond per number. A tensor on a device costs its `.item()`, which waits
    for the device: pass Python numbers from a training loop.
    """
    return _Encoder(redact=redact).encode(value)


def to_json_object(mapping: Mapping[str, object], *, redact: bool = True) -> dict[str, JsonValue]:
    """As `to_json_value`, for a mapping, which gives an object.

    Args:
        mapping: its keys name the fields.
        redact: as in `to_json_value`.

    Returns:
        The object.

    Raises:
        Exception: whatever a mapping that is not a dict raises when it is read.
    """
    # Of a dict the encoder makes an object whatever it holds.
    return cast("dict[str, JsonValue]", to_json_value(dict(mapping), redact=redact))


def holds_only_scalars(mapping: Mapping[str, object]) -> bool:
    """Tells whether nothing in a mapping can change later, so that encoding it can wait.

    Args:
        mapping: of any values.

    Returns:
        True if every value is a plain number, text, boolean or None.

    Cost: a small part of that of encoding them.
    """
    return _SCALAR_TYPES.issuperset(map(type, mapping.values()))


def dump_json(value: object, *, indent: int | None = None) -> str:
    """Writes a value made by `to_json_value` as ASCII text (one line unless `indent` is given).

    ASCII, because a line then has one possible line break and a torn line no torn character.

    Args:
        value: what to write.
        indent: spaces per level; None for one line.

    Returns:
        The text, with no closing line break.

    Raises:
        TypeError, ValueError: the value holds what `to_json_value` would not have left in it.
    """
    return json.dumps(value, allow_nan=False, indent=indent)


def load_json(data: bytes) -> Any:
    """Reads strict JSON.

    Args:
        data: UTF-8 text.

    Returns:
        The value; non-finite floats are still the texts that stand for them.

    Raises:
        ValueError: not UTF-8, not JSON, NaN or Infinity outside quotes, or nested too deeply.
    """
    try:
        return _STRICT_DECODER.decode(data.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply to be read") from error


def decode_nonfinite_texts(value: Any) -> Any:
    """Gives the texts "NaN", "Infinity" and "-Infinity" back as floats.

    Args:
        value: a value read from JSON.

    Returns:
        A copy in which every value, not key, that is exactly one of these texts is a float. JSON
        has one spelling for both, so a text that was meant as a text becomes a float as well.
    """
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, list):
        return [decode_nonfinite_texts(item) for item in value]
    if isinstance(value, dict):
        return {key: decode_nonfinite_texts(item) for key, item in value.items()}
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} outside quotes is not JSON")


_STRICT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _type_mark(value: object) -> str:
    kind = type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"


class _Encoder:
    """One walk through one value: remembers where it is, to see cycles and depth."""

    def __init__(self, *, redact: bool) -> None:
        self._redact = redact
        self._secrecy = Secrecy.NOTHING
        self._ancestors: list[int] = []

    def encode(self, value: object) -> JsonValue:
        kind = type(value)
        if kind is float:
            return self._float(cast(float, value))
        if kind is str:
            return self._text(cast(str, value))
        if kind is int:
            return self._integer(cast(int, value))
        if kind is bool or value is None:
            return cast("bool | None", value)
        if len(self._ancestors) >= MAX_DEPTH:
            return f"<nested deeper than {MAX_DEPTH}>"
        if id(value) in self._ancestors:
            return "<cycle>"
        self._ancestors.append(id(value))
        try:
            return self._encode_object(value)
        except Exception:  # foreign code runs here (items, __iter__, item), and may do anything
            return _type_mark(value)
        finally:
            self._ancestors.pop()

    def _encode_object(self, value: object) -> JsonValue:
        if isinstance(value, Enum):
            return self._text(value.value if isinstance(value.value, str) else value.name)
        if isinstance(value, str):
            return self._text(str.__str__(value))
        if isinstance(value, int):
            return self._integer(int(value))
        if isinstance(value, float):
            return self._float(float(value))
        if isinstance(value, Mapping):
            return self._mapping(list(value.items()))
        if isinstance(value, list | tuple):
            names = getattr(value, "_fields", None)
            if names is None:
                return [self.encode(item) for item in list(value)]
            return [
                self._encode_under(secrecy_of_key(name), item)
                for name, item in zip(names, value, strict=True)
            ]
        return self._encode_rarity(value)

    def _encode_rarity(self, value: object) -> JsonValue:
        if isinstance(value, set | frozenset):
            return sorted([self.encode(item) for item in list(value)], key=repr)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return self._mapping([(name, getattr(value, name)) for name in names])
        if isinstance(value, datetime.date | datetime.time):
            return self._text(value.isoformat())
        if isinstance(value, os.PathLike):
            return self._text(os.fsdecode(value))
        if isinstance(value, Integral):
            return self._integer(int(value))
        if isinstance(value, Real):
            return self._float(float(value))
        if getattr(value, "ndim", None) == 0:
            return self.encode(value.item())  # type: ignore[attr-defined]
        return _type_mark(value)

    def _mapping(self, items: Iterable[tuple[object, object]]) -> JsonValue:
        encoded: dict[str, JsonValue] = {}
        for key, value in items:
            name = _key_text(key)
            secrecy = secrecy_of_key(name)
            encoded[self._shown_key(name)] = (
                self._encode_under(secrecy, value) if secrecy else self.encode(value)
            )
        return encoded

    def _encode_under(self, secrecy: Secrecy, value: object) -> JsonValue:
        if secrecy is Secrecy.EVERYTHING:
            return cast(JsonValue, redacted_secret())
        outer, self._secrecy = self._secrecy, max(self._secrecy, secrecy)
        try:
            return self.encode(value)
        finally:
            self._secrecy = outer

    def _shown_key(self, name: str) -> str:
        name = _without_lone_surrogates(name)
        if not self._redact or len(name) <= MAX_TEXT_CHARACTERS:
            return name
        mark = redacted_text(name)
        return f"<redacted, {mark['length']} characters, sha256 {mark['sha256']}>"

    def _text(self, text: str) -> JsonValue:
        if self._secrecy >= Secrecy.TEXT:
            return cast(JsonValue, redacted_secret())
        text = _without_lone_surrogates(text)
        if self._redact and len(text) > MAX_TEXT_CHARACTERS:
            return cast(JsonValue, redacted_text(text))
        return text

    def _integer(self, number: int) -> JsonValue:
        if self._secrecy >= Secrecy.TEXT_AND_INTEGERS:
            return cast(JsonValue, redacted_secret())
        if -_MAX_INTEGER < number < _MAX_INTEGER:
            return number
        return f"<integer of {number.bit_length()} bits>"

    def _float(self, number: float) -> JsonValue:
        if math.isfinite(number):
            return number
        if math.isnan(number):
            return "NaN"
        return "Infinity" if number > 0 else "-Infinity"


def _key_text(key: object) -> str:
    if type(key) is str:
        return key
    if isinstance(key, bytes):
        return key.decode(errors="backslashreplace")
    encoded = to_json_value(key, redact=False)
    return encoded if isinstance(encoded, str) else dump_json(encoded)


def _without_lone_surrogates(text: str) -> str:
    if text.isascii():
        return text
    return text.encode(errors="backslashreplace").decode()
