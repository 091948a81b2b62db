from foreshock.records.timestamp import format_utc


def test_time_is_utc_with_milliseconds_and_z():
    assert format_utc(1_767_225_600_000_000_000) == "2026-01-01T00:00:00.000Z"


def test_time_is_cut_not_rounded_to_milliseconds():
    assert format_utc(1_767_225_599_999_999_999) == "2025-12-31T23:59:59.999Z"
    assert format_utc(1_767_225_600_005_600_000) == "2026-01-01T00:00:00.005Z"
