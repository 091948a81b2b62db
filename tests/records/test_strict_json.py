import dataclasses
import datetime
import enum
import json
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_like import is_same, json_like

from foreshock.records.strict_json import (
    MAX_DEPTH,
    decode_nonfinite_texts,
    dump_json,
    load_json,
    to_json_value,
)


def parse_strictly(text):
    """A parser that knows no more than the standard does, as those of other languages."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text.encode("ascii")
    return json.loads(text, parse_constant=refuse)


class Hostile:
    """An object on which everything that can be tried fails."""

    def __getattr__(self, name):
        raise RuntimeError("no attributes")

    def __repr__(self):
        raise RuntimeError("no repr")

    def __str__(self):
        raise RuntimeError("no str")


_hashables = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=5),
    st.text(st.characters(), max_size=5),
    st.text(st.characters(categories=["Cs"]), max_size=3),
    st.dates(),
    st.datetimes(),
    st.builds(Hostile),
    st.builds(object),
    st.just(int),
)
anything = st.recursive(
    _hashables,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.frozensets(_hashables, max_size=3),
        st.dictionaries(_hashables, inner, max_size=3),
    ),
    max_leaves=15,
)


@settings(deadline=None)
@given(json_like)
def test_json_like_data_round_trips(data):
    text = dump_json(to_json_value(data))
    parse_strictly(text)
    assert is_same(decode_nonfinite_texts(load_json(text.encode())), data)


@settings(deadline=None)
@given(anything)
def test_anything_at_all_becomes_strict_json_on_one_line(data):
    text = dump_json(to_json_value(data))
    has_no_lone_surrogate = json.dumps(parse_strictly(text), ensure_ascii=False).encode()
    assert has_no_lone_surrogate
    assert "\n" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(math.nan, '"NaN"'), (math.inf, '"Infinity"'), (-math.inf, '"-Infinity"')],
)
def test_nonfinite_floats_are_texts(number, text):
    assert dump_json(to_json_value(number)) == text
    assert dump_json(to_json_value([{"a": number}])) == f'[{{"a": {text}}}]'


@dataclasses.dataclass(frozen=True)
class Skipped:
    step: int
    password: str


class Risk(enum.Enum):
    LEARNING = "learning"
    COLLAPSE = 2


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    def __str__(self):
        return "not this"


class BrokenMapping(dict):
    def items(self):
        raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64("nan"), "NaN"),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.longdouble(0.5), 0.5),
        (np.array(0.25), 0.25),
        (np.array([0.25]), "<numpy.ndarray>"),
        ((1, (2, 3)), [1, [2, 3]]),
        ({3, 1, 2}, [1, 2, 3]),
        (Fraction(1, 4), 0.25),
        (Decimal("0.5"), "<decimal.Decimal>"),
        (Path("a/b"), "a/b"),
        (datetime.date(2026, 1, 1), "2026-01-01"),
        (Risk.LEARNING, "learning"),
        (Risk.COLLAPSE, "COLLAPSE"),
        (Level.HIGH, "HIGH"),
        (Text("this"), "this"),
        (Skipped(3, "hunter2"), {"step": 3, "password": {"redacted": True}}),
        (b"abc", "<builtins.bytes>"),
        (object(), "<builtins.object>"),
        (1j, "<builtins.complex>"),
        (2**2047, 2**2047),
        (-(2**20_000), "<integer of 20001 bits>"),
        ("\udc80é", "\\udc80é"),
        ([BrokenMapping(a=1), 2], [f"<{__name__}.BrokenMapping>", 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_a_training_run_are_written_as_documented(value, expected):
    assert is_same(to_json_value(value), expected)


def test_contents_of_an_unknown_object_never_reach_the_file():
    class Credentials:
        def __repr__(self):
            return "hunter2"

    assert "hunter2" not in dump_json(to_json_value([Credentials(), {Credentials(): 1}]))


class Scalar:
    """What a tensor of any library looks like, with a chosen outcome of item()."""

    ndim = 0

    def __init__(self, outcome):
        self.outcome = outcome

    def item(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_zero_dimensional_tensor_is_its_item():
    assert to_json_value(Scalar(1.5)) == 1.5
    assert to_json_value(Scalar(math.nan)) == "NaN"


def test_tensor_whose_item_fails_is_named_by_its_type():
    assert to_json_value(Scalar(RuntimeError("device lost"))) == f"<{__name__}.Scalar>"


@pytest.mark.parametrize(
    ("key", "text"),
    [(3, "3"), (None, "null"), (True, "true"), (0.5, "0.5"), (math.nan, "NaN"), ((1, 2), "[1, 2]")],
)
def test_keys_that_are_not_text_become_their_json_text(key, text):
    assert to_json_value({key: 0}) == {text: 0}


def test_of_two_keys_that_become_one_the_later_wins():
    assert to_json_value({1: "first", "1": "second"}) == {"1": "second"}


def test_cycle_is_marked():
    cycle = {"name": "a"}
    cycle["self"] = [cycle]
    assert to_json_value(cycle) == {"name": "a", "self": ["<cycle>"]}


def test_value_that_is_only_shared_is_no_cycle():
    shared = [1]
    assert to_json_value([shared, shared]) == [[1], [1]]


def test_nesting_is_cut_where_parsers_would_give_up():
    nested = 0
    for _ in range(100_000):
        nested = [nested]
    text = dump_json(to_json_value(nested))
    assert text == "[" * MAX_DEPTH + f'"<nested deeper than {MAX_DEPTH}>"' + "]" * MAX_DEPTH


def test_later_changes_do_not_reach_the_encoded_value():
    inner = [1]
    encoded = to_json_value({"a": inner})
    inner.append(2)
    assert encoded == {"a": [1]}


def test_decoding_leaves_other_texts_and_keys_alone():
    value = {"NaN": ["nan", "inf", "+Infinity", " NaN", "NaN "]}
    assert decode_nonfinite_texts(value) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"NaN", "NaN outside quotes is not JSON"),
        (b"[Infinity]", "Infinity outside quotes is not JSON"),
        (b"[-Infinity]", "-Infinity outside quotes is not JSON"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\x00" * 8, "Expecting value"),
        (b"\xff", "can't decode byte"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_reader_refuses_what_is_not_strict_json(data, message):
    with pytest.raises(ValueError, match=message):
        load_json(data)
