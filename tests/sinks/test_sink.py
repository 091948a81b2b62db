"""What a sink finds in a record."""

from __future__ import annotations

import math

import pytest

from foreshock.records.strict_json import to_json_object
from foreshock.sinks.sink import is_measurement, numbers_of, sentence_of, texts_of


def record(**fields: object) -> dict[str, object]:
    return {"event": "telemetry", "step": 3, "time": "2026-01-01T00:00:00.000Z", **fields}


def test_numbers_are_found_at_any_depth_and_nothing_else_is_one() -> None:
    found = numbers_of(
        record(loss=0.5, is_late=True, layers={"0": {"norm": 2}}, none=None, text="a", row=[1.0])
    )
    assert found == {("loss",): 0.5, ("is_late",): 1.0, ("layers", "0", "norm"): 2.0}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_found(number: float) -> None:
    assert str(numbers_of(record(loss=number))) == str({("loss",): number})


def test_an_integer_that_no_float_can_hold_is_left_out() -> None:
    assert numbers_of(record(seed=2**2000, loss=1)) == {("loss",): 1.0}


def test_marks_of_what_is_redacted_are_no_numbers() -> None:
    said = to_json_object({"password": 5, "note": "x" * 300, "loss": 1.0})
    assert numbers_of(record(**said)) == {("loss",): 1.0}


def test_texts_are_those_of_the_fields() -> None:
    assert texts_of(record(risk_level="STABLE", loss=1.0)) == {"risk_level": "STABLE"}


def test_an_event_is_told_on_one_line() -> None:
    event = {**record(loss=math.nan, why="a\nb"), "event": "aborted"}
    assert sentence_of(event) == 'aborted at step 3: {"loss": "NaN", "why": "a\\nb"}'
    assert not is_measurement(event)
    assert is_measurement(record())
