import json
import math
import os

import pytest

from foreshock.records import read_summary, write_summary


def test_summary_round_trips_with_nonfinite_values(tmp_path):
    path = tmp_path / "summary.json"
    summary = {
        "total_steps": 100,
        "final_loss": math.inf,
        "guard": {"total_rollbacks": 1, "integrity_status": "RECOVERED"},
        "spectral": {"final_kappa": -math.inf, "worst_layer": None},
    }
    write_summary(path, summary)
    assert read_summary(path) == summary
    assert read_summary(path, decode_nonfinite=False)["final_loss"] == "Infinity"


def test_summary_is_strict_json_and_leaves_no_other_file(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    write_summary(tmp_path / "summary.json", {"final_loss": math.nan})
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"final_loss": "NaN"}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_secrets_and_long_texts_are_redacted(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"api_key": "hunter2", "text": "x" * 300})
    assert read_summary(path)["api_key"] == {"redacted": True}
    assert read_summary(path)["text"]["length"] == 300
    write_summary(path, {"api_key": "hunter2", "text": "x" * 300}, redact=False)
    assert read_summary(path) == {"api_key": {"redacted": True}, "text": "x" * 300}


def test_summary_that_is_no_mapping_is_refused_before_the_old_one_is_touched(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, {"a": 1})
    with pytest.raises(TypeError, match="summary must be a mapping, not list"):
        write_summary(path, [1])
    assert read_summary(path) == {"a": 1}


@pytest.mark.parametrize("text", ["", '{"a": NaN}', '{"a": 1', "[1]", "\x00"])
def test_file_that_holds_no_summary_is_named(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_summary(path)


def test_missing_summary_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        read_summary(tmp_path / "summary.json")


def test_directory_is_no_summary(tmp_path):
    with pytest.raises(IsADirectoryError):
        read_summary(tmp_path)
    with pytest.raises(IsADirectoryError):
        write_summary(tmp_path, {})
