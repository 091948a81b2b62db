import csv
import logging
import math
import re

import pytest

from foreshock.records import MetricsRecorder, read_metrics, read_poc_report, read_poc_summary
from foreshock.records.strict_json import load_json

STAMP = r"\d{8}T\d{9}Z"


@pytest.fixture
def recorder(tmp_path):
    with MetricsRecorder(tmp_path, "so8t-gpt") as recorder:
        for step in range(25):
            loss = math.nan if step == 3 else 1 / (1 + step)
            recorder.record(step, 0, loss, 1e-3, accuracy=step / 25)
        yield recorder


def test_report_has_the_four_documented_parts(recorder, tmp_path):
    recorder.plot()
    path = recorder.poc_report({"width": 64}, {"lr": 1e-3}, {"test_accuracy": 0.75})
    assert path.parent == tmp_path / "poc_reports"
    assert re.fullmatch(f"poc_report_{STAMP}.json", path.name)
    load_json(path.read_bytes())
    report = read_poc_report(path)
    assert list(report) == ["model_info", "training_info", "metrics", "files"]
    assert report["model_info"] == {"model_name": "so8t-gpt", "config": {"width": 64}}
    training = report["training_info"]
    history = report["metrics"]["history"]
    assert (training["start"], training["end"]) == (
        history[0]["timestamp"],
        history[-1]["timestamp"],
    )
    assert training["total_time_seconds"] == history[-1]["elapsed_time_seconds"]
    assert (training["total_steps"], training["last_step"]) == (25, 24)
    assert training["config"] == {"lr": 1e-3}
    assert str(history) == str(read_metrics(recorder.json_path).records)
    assert report["metrics"]["final"] == {"test_accuracy": 0.75}
    assert report["metrics"]["summary"] == recorder.summary()
    assert report["files"]["metrics_json"] == "metrics/training_metrics.json"
    for name in report["files"].values():
        assert (tmp_path / name).is_file()
    assert len(report["files"]) == 5


def test_table_has_metric_statistic_and_value(recorder, tmp_path):
    recorder.poc_report({}, {}, {"test_accuracy": 0.75, "note": "a, b"})
    (path,) = (tmp_path / "poc_reports").glob("*.csv")
    assert re.fullmatch(f"poc_summary_{STAMP}.csv", path.name)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert rows[0].keys() == {"metric", "statistic", "value"}
    found = read_poc_summary(path)
    assert found.pop("test_accuracy") == {"reported": 0.75}
    assert found.pop("note") == {"reported": "a, b"}
    assert found == recorder.summary()


def test_final_metrics_are_the_last_values_if_none_are_given(recorder):
    recorder.record(25, 0, math.inf, 1e-3)
    report = read_poc_report(recorder.poc_report({}, {}))
    assert report["metrics"]["final"]["loss"] == math.inf
    assert report["metrics"]["final"]["accuracy"] == 24 / 25


def test_run_without_records_has_a_report(tmp_path):
    with MetricsRecorder(tmp_path, "m") as recorder:
        report = read_poc_report(recorder.poc_report({}, {}, {}))
    assert report["metrics"] == {"history": [], "final": {}, "summary": {}}
    assert report["training_info"]["total_steps"] == 0


def test_report_may_be_written_after_the_recorder_is_closed(recorder):
    recorder.close()
    assert len(read_poc_report(recorder.poc_report({}, {}, {}))["metrics"]["history"]) == 25


def test_report_that_cannot_be_written_is_one_warning(recorder, tmp_path, caplog):
    (tmp_path / "poc_reports").write_text("a file")
    assert recorder.poc_report({}, {}, {}) is None
    assert recorder.poc_report({}, {}, {}) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("name", ["model_config", "training_config", "final_metrics"])
def test_bad_arguments_are_named(recorder, name):
    arguments = {"model_config": {}, "training_config": {}, "final_metrics": {}, name: [1]}
    with pytest.raises(TypeError, match=f"{name} must be a mapping, not list"):
        recorder.poc_report(**arguments)


def test_table_of_someone_else_is_named(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns metric, statistic, value"):
        read_poc_summary(path)
