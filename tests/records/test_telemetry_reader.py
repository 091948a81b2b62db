import json
import math

import pytest

from foreshock.records import Telemetry, TelemetryWriter, read_telemetry

START = '{"event": "start", "schema_version": 1, "time": "2026-01-01T00:00:00.000Z"}'


def line(step, **fields):
    return json.dumps({"event": "telemetry", "step": step, "time": "t", **fields})


def steps(telemetry):
    return [record["step"] for record in telemetry.records if record["event"] != "start"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.jsonl"


def test_torn_last_line_is_skipped_and_counted(path):
    path.write_text("\n".join([START, line(1), line(2)[:-5]]))
    telemetry = read_telemetry(path)
    assert steps(telemetry) == [1]
    assert telemetry.torn_lines == 1
    assert telemetry.schema_version == 1


def test_file_cut_at_any_byte_gives_every_whole_line_and_at_most_one_torn(path):
    contents = "\n".join([START, line(1, a="\\n"), line(2), ""]).encode()
    for size in range(len(contents) + 1):
        path.write_bytes(contents[:size])
        telemetry = read_telemetry(path)
        num_whole_lines = contents[:size].count(b"\n")
        # A line that lacks only its line break is whole.
        is_end_whole = contents[size : size + 1] == b"\n"
        is_end_empty = contents[:size].endswith(b"\n") or size == 0
        assert len(telemetry.records) == num_whole_lines + is_end_whole
        assert telemetry.torn_lines == (not is_end_whole and not is_end_empty)


@pytest.mark.parametrize(
    "corrupt",
    [
        b"{",
        b"\x00" * 100,
        b"\xff\xfe",
        b'{"loss": NaN}',
        b"[1]",
        b"3",
        b'{"a": 1}{"b": 2}',
        b"[" * 10_000,
    ],
)
def test_corrupt_line_in_the_middle_is_skipped_and_counted(path, corrupt):
    path.write_bytes(b"\n".join([START.encode(), line(1).encode(), corrupt, line(2).encode()]))
    telemetry = read_telemetry(path)
    assert steps(telemetry) == [1, 2]
    assert telemetry.torn_lines == 1


@pytest.mark.parametrize("version", [2, 0, "1", 1.5, True, None])
def test_unknown_schema_version_is_refused_and_named(path, version):
    path.write_text(json.dumps({"event": "start", "schema_version": version}) + "\n")
    with pytest.raises(ValueError, match=r"telemetry\.jsonl.* states schema_version") as caught:
        read_telemetry(path)
    assert repr(version) in str(caught.value)


def test_newer_schema_version_of_a_resumption_is_refused_too(path):
    path.write_text("\n".join([START, line(1), START.replace(": 1", ": 2"), line(2)]))
    with pytest.raises(ValueError, match="states schema_version 2"):
        read_telemetry(path)


def test_empty_file_is_readable(path):
    path.write_bytes(b"")
    assert read_telemetry(path) == Telemetry([], 0, 0)


def test_missing_file_is_a_file_not_found_error(path):
    with pytest.raises(FileNotFoundError, match=r"telemetry\.jsonl"):
        read_telemetry(path)


def test_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="path must name a file"):
        read_telemetry(tmp_path)


def test_nonfinite_texts_come_back_as_floats_except_in_event_and_time(path):
    with TelemetryWriter(path) as writer:
        writer.write("NaN", 1, loss=math.nan, nested={"a": [math.inf, -math.inf]}, name="nan")
    record = read_telemetry(path).records[1]
    assert record["event"] == "NaN"
    assert math.isnan(record["loss"])
    assert record["nested"] == {"a": [math.inf, -math.inf]}
    assert record["name"] == "nan"


def test_nonfinite_texts_stay_texts_on_demand(path):
    with TelemetryWriter(path) as writer:
        writer.write("telemetry", 1, loss=math.nan)
    assert read_telemetry(path, decode_nonfinite=False).records[1]["loss"] == "NaN"
