"""Series of numbers over the steps: lines, arrays, pictures, and what goes wrong with them."""

import json
import logging
import math
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foreshock.records import SeriesRecorder, line_file, read_series, series_recorder
from foreshock.records.series_arrays import write_arrays
from foreshock.records.series_file import MAX_COLUMNS, SeriesFile
from foreshock.records.series_row import make_row

LABELS = ("layers.0", "layers.1", "layers.2")


def record_some(recorder, num, start=0, name="gates"):
    for step in range(start, start + num):
        alpha = {label: step + i / 10 for i, label in enumerate(LABELS)}
        recorder.record(name, step, det=1 - step / 7, alpha=alpha)


def strict_lines(path):
    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run" / "monitoring"


@pytest.fixture
def recorder(tmp_path):
    with SeriesRecorder(tmp_path / "run") as recorder:
        yield recorder


@pytest.fixture
def warnings_of(caplog):
    caplog.set_level(logging.WARNING, "foreshock")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "foreshock"]


# What is written


def test_lines_arrays_and_picture_say_the_same(recorder, directory):
    record_some(recorder, 50)
    recorder.close()
    assert sorted(os.listdir(directory)) == ["gates.jsonl", "gates.npz", "gates.png"]
    rows = read_series(directory / "gates.jsonl").rows
    assert [row["step"] for row in rows] == list(range(50))
    arrays = np.load(directory / "gates.npz")
    assert set(arrays) == {"step", "time", "det", "alpha", "alpha.labels"}
    assert (arrays["step"].dtype, arrays["det"].dtype) == (np.int64, np.float64)
    assert arrays["alpha.labels"].tolist() == list(LABELS)
    assert arrays["step"].tolist() == list(range(50))
    assert arrays["det"].tolist() == [row["det"] for row in rows]
    assert arrays["alpha"].tolist() == [[row["alpha"][label] for label in LABELS] for row in rows]
    assert [str(t) + "Z" for t in arrays["time"]] == [row["time"] for row in rows]
    assert (directory / "gates.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("num", [1, 127, 128, 129, 300])
def test_arrays_hold_every_number_of_any_number_of_rows(recorder, directory, num):
    for step in range(num):
        recorder.record("s", step, a=step, b={"x": 2.0 * step, "y": -step}, c=0.5 * step)
    recorder.close()
    arrays = np.load(directory / "s.npz")
    steps = np.arange(num)
    assert np.array_equal(arrays["a"], steps)
    assert np.array_equal(arrays["b"], np.stack([2 * steps, -steps], 1))
    assert np.array_equal(arrays["c"], 0.5 * steps)


def test_pandas_reads_the_lines(recorder, directory):
    record_some(recorder, 20)
    recorder.record("gates", 20, det=math.nan)
    recorder.close()
    plain = pd.read_json(directory / "gates.jsonl", lines=True)
    assert plain["det"].dtype == np.float64
    assert plain["step"].tolist() == list(range(21))
    frame = pd.json_normalize(read_series(directory / "gates.jsonl").rows)
    assert frame["alpha.layers.1"][3] == 3.1
    assert math.isnan(frame["alpha.layers.1"][20])


def test_nan_and_infinities_are_texts_in_the_lines_and_floats_to_the_readers(recorder, directory):
    recorder.record("s", 0, a=math.nan, b={"x": math.inf, "y": -math.inf})
    recorder.close()
    (line,) = strict_lines(directory / "s.jsonl")
    assert (line["a"], line["b"]) == ("NaN", {"x": "Infinity", "y": "-Infinity"})
    (row,) = read_series(directory / "s.jsonl").rows
    assert math.isnan(row["a"])
    assert row["b"] == {"x": math.inf, "y": -math.inf}
    assert np.load(directory / "s.npz")["b"].tolist() == [[math.inf, -math.inf]]


def test_names_and_labels_may_come_and_go(recorder, directory):
    recorder.record("s", 0, a=1.0)
    recorder.record("s", 1, b={"x": 2.0})
    recorder.record("s", 2, a={"y": 3.0}, b={"z": 4.0, "x": 5.0})
    recorder.close()
    arrays = np.load(directory / "s.npz")
    nan = math.nan
    assert np.array_equal(arrays["a"], [[1, nan], [nan, nan], [nan, 3]], equal_nan=True)
    assert arrays["a.labels"].tolist() == ["", "y"]
    assert np.array_equal(arrays["b"], [[nan, nan], [2, nan], [5, 4]], equal_nan=True)


def test_tensors_and_numpy_numbers_are_numbers(recorder, directory):
    import torch

    recorder.record("s", np.int64(3), a=torch.tensor(0.5), b={"x": np.float32(0.25), "y": True + 1})
    recorder.close()
    (row,) = read_series(directory / "s.jsonl").rows
    assert (row["step"], row["a"], row["b"]) == (3, 0.5, {"x": 0.25, "y": 2.0})


def test_recent_rows_are_in_memory_and_the_rest_on_disk(tmp_path, directory):
    with SeriesRecorder(tmp_path / "run", num_recent=10) as recorder:
        record_some(recorder, 25)
        assert [row["step"] for row in recorder.recent("gates")] == list(range(15, 25))
        assert recorder.recent("gates")[-1]["alpha"] == {
            "layers.0": 24.0,
            "layers.1": 24.1,
            "layers.2": 24.2,
        }
        assert recorder.recent("of another name") == []
    assert len(read_series(directory / "gates.jsonl").rows) == 25


def test_a_thousand_rows_are_kept_by_default(recorder):
    record_some(recorder, 1100)
    assert [row["step"] for row in recorder.recent("gates")] == list(range(100, 1100))


def test_nothing_is_made_before_the_first_row(tmp_path):
    threads = threading.active_count()
    SeriesRecorder(tmp_path / "run").close()
    assert threading.active_count() == threads
    assert os.listdir(tmp_path) == []


def test_an_existing_series_is_continued(tmp_path, directory):
    for start in (0, 30):
        with SeriesRecorder(tmp_path / "run") as recorder:
            record_some(recorder, 30, start=start)
    assert [r["step"] for r in read_series(directory / "gates.jsonl").rows] == list(range(60))
    arrays = np.load(directory / "gates.npz")
    assert arrays["alpha"].shape == (60, 3)


def test_a_torn_line_is_skipped_and_counted_and_the_next_row_is_whole(tmp_path, directory):
    with SeriesRecorder(tmp_path / "run") as recorder:
        record_some(recorder, 5)
    path = directory / "gates.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    with SeriesRecorder(tmp_path / "run") as recorder:
        record_some(recorder, 1, start=5)
    found = read_series(path)
    assert [row["step"] for row in found.rows] == [0, 1, 2, 3, 5]
    assert found.torn_lines == 1
    assert np.load(directory / "gates.npz")["step"].tolist() == [0, 1, 2, 3, 5]


def test_arrays_are_written_while_the_series_grows(recorder, directory, monkeypatch):
    written = []
    write = SeriesFile.write_arrays

    def write_and_note(self, *pause):
        write(self, *pause)
        written.append(len(np.load(directory / "s.npz")["step"]))

    monkeypatch.setattr(SeriesFile, "write_arrays", write_and_note)
    monkeypatch.setattr(series_recorder, "_PAUSE_S", 0.0)
    monkeypatch.setattr(series_recorder, "_FIRST_ARRAYS", 10)
    for step in range(200):
        recorder.record("s", step, a=1.0)
    recorder.close()
    assert written == [10, 20, 40, 80, 160, 200]


# What it costs


def test_memory_does_not_grow_with_the_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(series_recorder, "_FIRST_ARRAYS", math.inf)  # the next test's

    def held_after(steps):
        for step in steps:
            recorder.record("s", step, a=step / 3, b={"x": step / 7, "y": step / 11})
            while not step % 2000 and recorder._queue._telemetry:
                threading.Event().wait(0.01)
        while recorder._queue._telemetry:
            threading.Event().wait(0.01)
        return tracemalloc.get_traced_memory()[0]

    with SeriesRecorder(tmp_path / "run") as recorder:
        tracemalloc.start()
        try:
            # Curves are as full after a power of two times as many steps.
            before = held_after(range(3_000))
            after = held_after(range(3_000, 12_000))
        finally:
            tracemalloc.stop()
    assert recorder.dropped_rows == 0
    assert after - before < 200_000  # 9000 rows, held in any way, are more than a million bytes


def test_memory_for_the_arrays_does_not_grow_with_the_rows(tmp_path):
    def peak_with(num_rows):
        rows = (make_row(step, {"a": 0.0, "b": {"x": 1.0, "y": 2.0}}) for step in range(num_rows))
        tracemalloc.start()
        try:
            write_arrays(tmp_path / "s.npz", rows, [("a", ""), ("b", "x"), ("b", "y")])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_with(10)
    assert peak_with(10_000) < peak_with(1_000) + 50_000 < 10_000 * 5 * 8


def test_a_save_costs_its_rows_whatever_is_there_already(recorder, directory, monkeypatch):
    num_read = []
    rows = SeriesFile._rows

    def rows_and_note(self):
        for row in rows(self):
            num_read.append(row.step)
            yield row

    monkeypatch.setattr(SeriesFile, "_rows", rows_and_note)
    monkeypatch.setattr(series_recorder, "_PAUSE_S", 0.0)
    monkeypatch.setattr(series_recorder, "_FIRST_ARRAYS", 16)
    for step in range(3000):
        recorder.record("s", step, a=1.0)
    recorder.close()
    assert len(num_read) < 3 * 3000


def test_a_hanging_disk_holds_up_nobody(tmp_path, monkeypatch, warnings_of):
    is_released = threading.Event()
    append = line_file.LineFile.append

    def hang(self, line):
        assert is_released.wait(20)
        append(self, line)

    monkeypatch.setattr(line_file.LineFile, "append", hang)
    recorder = SeriesRecorder(tmp_path / "run", capacity=10)
    record_some(recorder, 100)  # would never end
    recorder.close(timeout=0.05)
    assert recorder.dropped_rows >= 89
    is_released.set()
    assert len(warnings_of()) == 1


def test_arrays_that_take_too_long_are_given_up_and_no_row_is(tmp_path, monkeypatch, warnings_of):
    is_released = threading.Event()
    monkeypatch.setattr(SeriesFile, "write_arrays", lambda self: is_released.wait(20))
    recorder = SeriesRecorder(tmp_path / "run")
    record_some(recorder, 5)
    while recorder._queue._telemetry:
        threading.Event().wait(0.01)
    recorder.close(timeout=0.3)
    is_released.set()
    (warning,) = warnings_of()
    assert "arrays and pictures missing" in warning
    assert recorder.dropped_rows == 0
    assert len(read_series(tmp_path / "run" / "monitoring" / "gates.jsonl").rows) == 5


# What goes wrong


def test_a_full_disk_is_warned_of_once_and_counted(recorder, monkeypatch, warnings_of):
    def fail(self, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(line_file.LineFile, "append", fail)
    record_some(recorder, 7)
    recorder.close()
    assert recorder.dropped_rows == 7
    (warning,) = [w for w in warnings_of() if "rows missing" in w]
    assert "No space left" in warning
    assert [row["step"] for row in recorder.recent("gates")] == list(range(7))


def test_a_directory_that_cannot_be_made_is_warned_of_once(tmp_path, warnings_of):
    (tmp_path / "run").write_text("a file")
    with SeriesRecorder(tmp_path / "run") as recorder:
        record_some(recorder, 3)
    assert recorder.dropped_rows == 3
    assert len(warnings_of()) == 1


def test_without_matplotlib_there_is_one_line_and_no_picture(
    recorder, directory, monkeypatch, warnings_of
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    record_some(recorder, 3)
    record_some(recorder, 3, name="more")
    recorder.close()
    (warning,) = warnings_of()
    assert "foreshock[plots]" in warning
    assert not list(directory.glob("*.png"))
    assert len(list(directory.glob("*.npz"))) == 2


def test_arrays_that_cannot_be_written_leave_the_old_ones(tmp_path, directory, monkeypatch):
    with SeriesRecorder(tmp_path / "run") as recorder:
        record_some(recorder, 3)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with SeriesRecorder(tmp_path / "run") as recorder:
        record_some(recorder, 3, start=3)
    assert len(np.load(directory / "gates.npz")["step"]) == 3
    assert len(read_series(directory / "gates.jsonl").rows) == 6
    assert sorted(os.listdir(directory)) == ["gates.jsonl", "gates.npz", "gates.png"]


def test_labels_without_end_are_rows_that_are_counted(recorder, warnings_of):
    for step in range(6):
        recorder.record("s", step, a={f"{step}-{i}": 1.0 for i in range(1000)})
    recorder.close()
    assert recorder.dropped_rows == 2
    assert f"more than {MAX_COLUMNS} names" in warnings_of()[0]


def test_after_closing_rows_are_counted(recorder, warnings_of):
    recorder.close()
    recorder.record("s", 0, a=1.0)
    assert recorder.dropped_rows == 1
    assert "closed" in warnings_of()[0]


FORK = """
import os
from foreshock.records import SeriesRecorder
recorder = SeriesRecorder(sys.argv[1])
recorder.record("s", 0, a=1.0)
child = os.fork()
if child == 0:
    recorder.record("s", 1, a=1.0)
    recorder.close()
    os._exit(recorder.dropped_rows)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
recorder.record("s", 2, a=1.0)
"""


def test_a_forked_child_writes_nothing_and_the_end_of_the_parent_writes_all(tmp_path, run_python):
    assert run_python(FORK, tmp_path).endswith("1\n")
    assert [r["step"] for r in read_series(tmp_path / "monitoring" / "s.jsonl").rows] == [0, 2]


KILL = """
from foreshock.records import SeriesRecorder
recorder = SeriesRecorder(sys.argv[1])
for step in range(300):
    recorder.record("s", step, a=1.0)
while recorder._queue._telemetry:
    pass
print("written", flush=True)
while True:
    recorder.record("s", step, a=1.0)
"""


def test_a_kill_leaves_what_was_written(tmp_path, start_python):
    with start_python(KILL, tmp_path) as process:
        assert process.stdout.readline() == "written\n"
        process.kill()
    found = read_series(tmp_path / "monitoring" / "s.jsonl")
    assert len(found.rows) >= 299
    assert found.torn_lines <= 1


@pytest.mark.parametrize(
    ("series", "step", "values", "said"),
    [
        ("../s", 0, {}, "series is '../s'"),
        ("", 0, {}, "series is ''"),
        ("s", -1, {}, "step must be"),
        ("s", 1.5, {}, "step must be"),
        ("s", 0, {"a": "word"}, "a must be a number"),
        ("s", 0, {"a": None}, "a must be a number"),
        ("s", 0, {"a": [1.0]}, "a must be a number"),
        ("s", 0, {"a": {"x": "word"}}, r"a\['x'\] must be a number"),
        ("s", 0, {"a": {"": 1.0}}, "a has the label ''"),
        ("s", 0, {"a": {3: 1.0}}, "a has the label 3"),
        ("s", 0, {"a": 10**400}, "no float"),
        ("s", 0, {"time": 1.0}, "name of a value is 'time'"),
        ("s", 0, {"a.b": 1.0}, r"name of a value is 'a\.b'"),
        ("s", 0, {"a": {str(i): 0.0 for i in range(1025)}}, "1025 numbers"),
    ],
)
def test_wrong_arguments_are_errors_that_name_them(recorder, series, step, values, said):
    with pytest.raises((TypeError, ValueError), match=said):
        recorder.record(series, step, **values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"out_dir": 3}, "out_dir is a int"),
        ({"out_dir": ""}, "out_dir is empty"),
        ({"num_recent": 0}, "num_recent is 0"),
        ({"num_recent": 1.5}, "num_recent is a float"),
        ({"capacity": True}, "capacity is a bool"),
    ],
)
def test_wrong_settings_are_errors_that_name_them(tmp_path, given, said):
    with pytest.raises((TypeError, ValueError), match=said):
        SeriesRecorder(**{"out_dir": tmp_path, **given})


def test_a_file_that_is_no_series_has_no_rows(tmp_path):
    path = Path(tmp_path / "other.jsonl")
    path.write_text('[1]\n{"step": 1}\n\n{"step": "1", "time": 2}\n3\n')
    found = read_series(path)
    assert (found.rows, found.torn_lines) == ([], 4)
