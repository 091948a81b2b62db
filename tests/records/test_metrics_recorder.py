import csv
import json
import logging
import math
import os
import re
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreshock.records import MetricsRecorder, read_metrics
from foreshock.records.locked_file import LockedFile
from foreshock.records.metrics_recorder import MAX_METRICS
from foreshock.records.strict_json import load_json


@pytest.fixture
def recorder(tmp_path):
    with MetricsRecorder(tmp_path / "run", "gpt-small", save_interval=3) as recorder:
        yield recorder


def record_some(recorder, num, start=0, **optional):
    for step in range(start, start + num):
        recorder.record(step, step / 10, 1 / (1 + step), 1e-3, **optional)


def steps(path):
    return [record["step"] for record in read_metrics(path).records]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, strict=True))


def strict_array(path):
    return load_json(path.read_bytes())


# What is written


def test_files_are_strict_json_and_csv_with_the_documented_columns(recorder):
    recorder.record(
        7, 0, 2.5, 1e-3, pet_loss=0.5, so8t_loss=0.25, accuracy=0.5, perplexity=12, grad_norm=1.5
    )
    recorder.close()
    (record,) = strict_array(recorder.json_path)
    stamp, elapsed = record.pop("timestamp"), record.pop("elapsed_time_seconds")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert 0 <= elapsed < 60
    expected = {
        "step": 7,
        "epoch": 0,
        "loss": 2.5,
        "learning_rate": 1e-3,
        "pet_loss": 0.5,
        "so8t_loss": 0.25,
        "accuracy": 0.5,
        "perplexity": 12,
        "grad_norm": 1.5,
    }
    assert record == expected
    (row,) = table(recorder.csv_path)
    assert (row.pop("timestamp"), float(row.pop("elapsed_time_seconds"))) == (stamp, elapsed)
    assert {name: float(cell) for name, cell in row.items()} == expected


def test_array_is_closed_after_every_save(recorder):
    assert strict_array(recorder.json_path) == []
    for step in range(20):
        recorder.record(step, 0, 1.0, 1e-3)
        found = strict_array(recorder.json_path)
        assert [record["step"] for record in found] == [*range(recorder.saved_records)]
        assert recorder.saved_records == (step + 1) // 3 * 3
    recorder.close()
    assert recorder.saved_records == 20
    assert recorder.json_path.read_text().count("\n") == 22  # one record a line


def test_nan_and_infinities_are_spelt_as_texts_and_read_as_floats(recorder):
    recorder.record(0, 0, math.nan, math.inf, grad_norm=-math.inf)
    recorder.close()
    (record,) = strict_array(recorder.json_path)
    assert [record[name] for name in ("loss", "learning_rate", "grad_norm")] == [
        "NaN",
        "Infinity",
        "-Infinity",
    ]
    (row,) = table(recorder.csv_path)
    assert (row["loss"], row["learning_rate"], row["grad_norm"]) == (
        "NaN",
        "Infinity",
        "-Infinity",
    )
    for path in (recorder.json_path, recorder.csv_path):
        (read,) = read_metrics(path).records
        assert math.isnan(read["loss"])
        assert (read["learning_rate"], read["grad_norm"]) == (math.inf, -math.inf)
        (read,) = read_metrics(path, decode_nonfinite=False).records
        assert read["loss"] == "NaN"


def test_names_that_appear_later_widen_the_table(recorder):
    record_some(recorder, 5)
    record_some(recorder, 5, start=5, accuracy=0.5)
    record_some(recorder, 5, start=10, **{'odd, "name"\n': 1.5, "pet_loss": 0.25})
    recorder.close()
    rows = table(recorder.csv_path)
    assert [int(row["step"]) for row in rows] == [*range(15)]
    assert [row["accuracy"] for row in rows] == [""] * 5 + ["0.5"] * 5 + [""] * 5
    assert [row["pet_loss"] for row in rows] == [""] * 10 + ["0.25"] * 5
    assert {None} & {key for row in rows for key in row} == set()
    assert len({line.count(",") for line in recorder.csv_path.read_text().splitlines()[1:]}) == 1
    assert strict_array(recorder.json_path)[12]['odd, "name"\n'] == 1.5
    assert read_metrics(recorder.csv_path).records[12]["pet_loss"] == 0.25


@pytest.mark.parametrize("kind", ["text", "object", "list", "none", "bool"])
def test_what_is_no_number_is_written_too_and_has_no_statistics(recorder, kind):
    values = {
        "text": 'a "warm"\nup, phase',
        "object": {"a": [1, math.nan]},
        "list": [1, 2.5],
        "none": None,
        "bool": True,
    }
    value = values[kind]
    record_some(recorder, 3, phase=value)
    recorder.close()
    written = strict_array(recorder.json_path)[0]["phase"]
    assert written == ({"a": [1, "NaN"]} if kind == "object" else value)
    assert len(table(recorder.csv_path)) == 3
    assert "phase" not in recorder.summary()


def test_integer_that_no_float_holds_is_no_number(recorder):
    record_some(recorder, 3, count=10**5000)
    recorder.record(3, 0, 10**400, 1e-3)
    recorder.close()
    assert "integer of" in strict_array(recorder.json_path)[2]["count"]
    assert recorder.summary().keys() == {"loss", "learning_rate"}
    assert recorder.summary()["loss"]["count"] == 3
    with MetricsRecorder(recorder.out_dir, "m") as again:
        assert again.summary() == recorder.summary()


def test_one_number_in_a_tensor_or_array_is_a_number(recorder):
    import numpy
    import torch

    recorder.record(
        numpy.int64(3),
        torch.tensor(1),
        torch.tensor(0.5, requires_grad=True),
        numpy.float32(0.25),
        grad_norm=torch.tensor(math.nan),
    )
    recorder.close()
    (record,) = read_metrics(recorder.json_path).records
    assert (record["step"], record["epoch"], record["loss"]) == (3, 1, 0.5)
    assert math.isnan(record["grad_norm"])
    assert recorder.summary()["grad_norm"]["nonfinite"] == 1


def test_summary_has_minimum_maximum_mean_spread_and_the_last_value(recorder):
    for step, loss in enumerate([4.0, 2.0, math.nan, 6.0]):
        recorder.record(step, 0, loss, 1e-3)
    found = recorder.summary()
    assert set(found) == {"loss", "learning_rate"}
    std = math.sqrt(8 / 3)
    assert found["loss"] == pytest.approx(
        {"min": 2, "max": 6, "mean": 4, "std": std, "final": 6, "count": 3, "nonfinite": 1}
    )


def test_records_of_many_threads_are_all_there(recorder):
    threads = [threading.Thread(target=record_some, args=(recorder, 300)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    for path in (recorder.json_path, recorder.csv_path):
        assert sorted(steps(path)) == sorted([*range(300)] * 8)
        assert read_metrics(path).torn_lines == 0
    assert recorder.summary()["loss"]["count"] == 2400


def test_the_number_of_names_is_bounded_and_what_is_left_out_is_counted(recorder, caplog):
    for step in range(MAX_METRICS + 10):
        recorder.record(step, 0, 1.0, 1e-3, **{f"metric_{step}": 1.0})
    recorder.close()
    assert len(recorder.summary()) == MAX_METRICS + 2
    assert recorder.dropped_values == 10
    assert recorder.dropped_records == 0
    assert len(caplog.records) == 1
    assert len(table(recorder.csv_path)) == MAX_METRICS + 10


# Secrets

_secret_names = st.sampled_from(["password", "hf_token", "apiKey", "Authorization", "token", "key"])
_hidden = st.sampled_from(["hunter2-canary", "hunter2-canary" + "x" * 300])


@st.composite
def _data_with_a_secret(draw):
    hidden = draw(_hidden)
    data = draw(st.sampled_from([hidden, [hidden], {"a": hidden}, {"a": [1, {"b": hidden}]}]))
    for _ in range(draw(st.integers(0, 3))):
        data = draw(st.sampled_from([[data], {"x": data}, (1, data), {"x": [data, data]}]))
    return data


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(_secret_names, _data_with_a_secret(), st.text(min_size=257, max_size=300))
def test_secrets_and_long_texts_never_reach_the_disk(tmp_path, name, secret, long_text):
    folder = tmp_path / str(len([*tmp_path.iterdir()]))
    with MetricsRecorder(folder, "x" * 300, save_interval=1) as recorder:
        recorder.record(0, 0, 1.0, 1e-3, **{name: secret, "note": long_text})
        config = {name: secret, "inner": {name: [secret]}, "note": long_text}
        recorder.poc_report(config, {"deep": [config]}, {name: secret, "note": long_text})
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        contents = path.read_text()
        assert "hunter2" not in contents
        assert long_text not in contents
        assert json.dumps(long_text)[1:-1] not in contents
        assert "x" * 257 not in contents


def test_numbers_under_the_name_of_a_secret_are_hidden_and_have_no_statistics(recorder):
    record_some(recorder, 3, password=123456, tokens_per_second=5)
    recorder.close()
    assert "123456" not in recorder.json_path.read_text() + recorder.csv_path.read_text()
    assert set(recorder.summary()) == {"loss", "learning_rate", "tokens_per_second"}


_names = st.text(min_size=1, max_size=12)
_values = st.one_of(st.integers(), st.floats(), st.text(max_size=20), st.none(), st.booleans())


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.dictionaries(_names, _values, max_size=4), max_size=5))
def test_whatever_is_recorded_both_files_stay_whole(tmp_path, optional_of_steps):
    folder = tmp_path / str(len([*tmp_path.iterdir()]))
    with MetricsRecorder(folder, "m", save_interval=2) as recorder:
        for step, optional in enumerate(optional_of_steps):
            recorder.record(step, 0, 1.0, 1e-3, **optional)
    assert recorder.dropped_records == 0
    assert len(strict_array(recorder.json_path)) == len(optional_of_steps)
    rows = list(csv.reader(recorder.csv_path.read_text().split("\n")[:-1], strict=True))
    assert len(rows) == len(optional_of_steps) + 1
    assert {len(row) for row in rows} == {len(rows[0])}
    with MetricsRecorder(folder, "m") as again:
        assert again.summary().keys() == recorder.summary().keys()
    assert steps(recorder.json_path) == [*range(len(optional_of_steps))]


# Continuing


def test_existing_files_are_continued_with_their_statistics_and_seconds(tmp_path):
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 25, accuracy=0.5)
    before = read_metrics(recorder.json_path).records
    with MetricsRecorder(tmp_path, "m") as again:
        record_some(again, 25, start=25, accuracy=0.75)
        assert again.saved_records == 20
    for path in (again.json_path, again.csv_path):
        assert steps(path) == [*range(50)]
    records = strict_array(again.json_path)
    assert records[:25] == before
    seconds = [record["elapsed_time_seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert again.summary()["accuracy"]["mean"] == pytest.approx(0.625)
    assert again.summary()["loss"]["count"] == 50


@pytest.mark.parametrize("torn_by", [1, 5, 40])
def test_continuing_mends_a_torn_array_and_a_torn_table(tmp_path, torn_by):
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 5)
    for path in (recorder.json_path, recorder.csv_path):
        path.write_bytes(path.read_bytes()[:-torn_by])
    kept = len(read_metrics(recorder.json_path).records)
    with MetricsRecorder(tmp_path, "m") as again:
        record_some(again, 1, start=100)
    expected = [*range(kept), 100]
    assert [record["step"] for record in strict_array(again.json_path)] == expected
    assert steps(again.csv_path) == expected


def test_table_that_lacks_rows_or_is_gone_is_made_anew(tmp_path):
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 5)
        record_some(recorder, 5, start=5, accuracy=0.5)
    whole = recorder.csv_path.read_text()
    lines = whole.splitlines(keepends=True)
    for left in ("", "".join(lines[:4])):
        recorder.csv_path.write_text(left)
        MetricsRecorder(tmp_path, "m").close()
        assert recorder.csv_path.read_text() == whole
    recorder.csv_path.unlink()
    MetricsRecorder(tmp_path, "m").close()
    assert recorder.csv_path.read_text() == whole


@pytest.mark.parametrize("name", ["training_metrics.json", "training_metrics.csv"])
def test_file_of_someone_else_is_left_alone(tmp_path, caplog, name):
    path = tmp_path / "metrics" / name
    path.parent.mkdir()
    path.write_text('{"mine": 1}\n')
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 10)
    assert path.read_text() == '{"mine": 1}\n'
    assert recorder.dropped_records == 10
    assert len(caplog.records) == 1


# Trouble


def check_that_training_went_on(recorder, caplog, num_dropped):
    assert recorder.dropped_records == num_dropped
    assert [(r.name, r.levelno) for r in caplog.records] == [("foreshock", logging.WARNING)]
    assert str(recorder.out_dir) in caplog.text
    assert recorder.summary()["loss"]["count"] > 0


@pytest.mark.parametrize("name", ["training_metrics.json", "training_metrics.csv"])
def test_full_disk_is_counted_and_warned_of_once(tmp_path, caplog, name):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / name).symlink_to("/dev/full")
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 35)
        assert recorder.saved_records == 0
    check_that_training_went_on(recorder, caplog, 35)
    assert "No space left on device" in caplog.text
    if name.endswith("csv"):
        assert len(strict_array(recorder.json_path)) == 35


def test_disk_that_fills_up_in_the_middle_of_a_write_leaves_whole_files(
    tmp_path, monkeypatch, caplog
):
    pwrite, is_full = os.pwrite, False

    def pwrite_until_full(descriptor, data, offset):
        if is_full and offset + len(data) > os.fstat(descriptor).st_size:
            pwrite(descriptor, data[: len(data) // 2], offset)
            raise OSError(28, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite_until_full)
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 20)
        is_full = True
        record_some(recorder, 20, start=20)
        for path in (recorder.json_path, recorder.csv_path):
            assert steps(path) == [*range(20)]
        assert len(strict_array(recorder.json_path)) == 20
        is_full = False
        record_some(recorder, 10, start=40)
    assert recorder.saved_records == 30
    check_that_training_went_on(recorder, caplog, 20)
    for path in (recorder.json_path, recorder.csv_path):
        assert steps(path) == [*range(20), *range(40, 50)]
        assert read_metrics(path).torn_lines == 0


@pytest.mark.parametrize("unusable", ["{tmp_path}/file", "/proc/foreshock"])
def test_directory_that_cannot_be_written_to_is_counted_and_warned_of_once(
    tmp_path, caplog, unusable
):
    (tmp_path / "file").write_text("")
    with MetricsRecorder(unusable.format(tmp_path=tmp_path), "m") as recorder:
        record_some(recorder, 25)
    check_that_training_went_on(recorder, caplog, 25)


def test_read_only_directory_is_counted_and_warned_of_once(tmp_path, monkeypatch, caplog):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # root may write to directories that are read-only
    with MetricsRecorder(tmp_path / "run", "m") as recorder:
        record_some(recorder, 25)
    assert recorder.plot() is None
    assert recorder.poc_report({}, {}, {}) is None
    monkeypatch.undo()
    assert recorder.dropped_records == 25
    assert len(caplog.records) == 3  # rows, picture, report: one each


def test_table_that_cannot_be_widened_is_given_up_and_made_whole_later(
    tmp_path, monkeypatch, caplog
):
    replace = os.replace
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 10)

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        record_some(recorder, 20, start=10, accuracy=0.5)
        monkeypatch.setattr(os, "replace", replace)
    check_that_training_went_on(recorder, caplog, 20)
    assert steps(recorder.csv_path) == [*range(10)]
    assert len(strict_array(recorder.json_path)) == 30
    MetricsRecorder(tmp_path, "m").close()
    assert steps(recorder.csv_path) == [*range(30)]


def test_file_that_was_removed_is_counted_and_warned_of_once(recorder, caplog):
    record_some(recorder, 3)
    recorder.json_path.unlink()
    record_some(recorder, 6)
    check_that_training_went_on(recorder, caplog, 6)


def test_second_recorder_of_the_same_files_writes_nothing_and_says_so(recorder, caplog):
    record_some(recorder, 3)
    with MetricsRecorder(recorder.out_dir, "m") as second:
        record_some(second, 10)
    assert second.dropped_records == 10
    assert "another" in caplog.text
    record_some(recorder, 3, start=3)
    assert steps(recorder.json_path) == [*range(6)]


def test_forgotten_recorder_saves_and_lets_go_of_the_files(tmp_path):
    recorder = MetricsRecorder(tmp_path, "m")
    record_some(recorder, 5)
    path = recorder.json_path
    del recorder
    assert steps(path) == [*range(5)]
    with MetricsRecorder(tmp_path, "m") as again:
        record_some(again, 5, start=5)
    assert steps(path) == [*range(10)]


@pytest.mark.parametrize("during", ["array", "table"])
def test_interrupted_save_is_made_whole_by_the_next(recorder, monkeypatch, during):
    record_some(recorder, 2)
    write = LockedFile.write
    interruptions = iter([True] if during == "array" else [False, True])

    def write_and_interrupt(file, data, offset):
        write(file, data, offset)
        if next(interruptions, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(LockedFile, "write", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        record_some(recorder, 1, start=2)
    assert recorder.saved_records == 0
    recorder.close()
    assert recorder.dropped_records == 0
    for path in (recorder.json_path, recorder.csv_path):
        assert steps(path) == [*range(3)]


def test_closed_recorder_counts_what_it_does_not_take(recorder, caplog):
    recorder.close()
    recorder.close()
    record_some(recorder, 3)
    assert recorder.dropped_records == 3
    assert len(caplog.records) == 1


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_dir": ""}, ValueError, "out_dir must name a directory, it is empty"),
        ({"out_dir": 3}, TypeError, r"out_dir must be str or os\.PathLike\[str\], not int"),
        ({"model_name": None}, TypeError, "model_name must be text, not NoneType"),
        ({"model_name": ""}, ValueError, "model_name must name the model, it is empty"),
        ({"save_interval": 0}, ValueError, "save_interval must be at least 1, not 0"),
        ({"save_interval": True}, TypeError, "save_interval must be an integer, not bool"),
        ({"save_interval": 1.5}, TypeError, "save_interval must be an integer, not float"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_the_recorder_are_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        MetricsRecorder(**{"out_dir": tmp_path / "run", "model_name": "m", **arguments})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": 1.0}, TypeError, "step must be an integer, not float"),
        ({"step": True}, TypeError, "step must be an integer, not bool"),
        ({"step": -1}, ValueError, r"step must be 0 to 2\*\*63 - 1, not -1"),
        ({"step": 2**63}, ValueError, r"step must be 0 to 2\*\*63 - 1"),
        ({"epoch": "one"}, TypeError, "epoch must be a number, not str"),
        ({"loss": None}, TypeError, "loss must be a number, not NoneType"),
        ({"loss": "NaN"}, TypeError, "loss must be a number, not str"),
        ({"loss": [1.0]}, TypeError, "loss must be a number, not list"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number, not bool"),
        ({"timestamp": 1.0}, ValueError, 'optional must not hold "timestamp"'),
        ({"elapsed_time_seconds": 1.0}, ValueError, '"elapsed_time_seconds"'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_record_are_named(recorder, arguments, error, message):
    with pytest.raises(error, match=message):
        recorder.record(**{"step": 0, "epoch": 0, "loss": 1.0, "learning_rate": 0.1, **arguments})


def test_optional_value_may_be_called_self(recorder):
    recorder.record(0, 0, 1.0, 1e-3, self=0.5)
    assert recorder.summary()["self"]["final"] == 0.5


def test_reader_names_what_it_cannot_read(tmp_path):
    path = tmp_path / "training_metrics.json"
    with pytest.raises(FileNotFoundError):
        read_metrics(path)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="holds no metrics"):
        read_metrics(path)
    path.write_text("")
    assert read_metrics(path).records == []


def test_reader_skips_and_counts_what_a_kill_has_torn_at_any_byte(tmp_path):
    """What the next rows are written over is the closing bracket: torn at any byte of that."""
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 2)
    old = recorder.json_path.read_bytes()
    with MetricsRecorder(tmp_path, "m") as recorder:
        record_some(recorder, 2, start=2, note={"a": [1]})
    new = recorder.json_path.read_bytes()
    path = tmp_path / "torn.json"
    for size in range(len(old) - 3, len(new)):
        path.write_bytes(new[:size] + old[size:])
        found = read_metrics(path)
        count = len(found.records)
        assert count >= 2
        assert [record["step"] for record in found.records] == [*range(count)]
        assert found.torn_lines <= 1
        assert count + found.torn_lines >= new[: size - 2].count(b'{"step"')
