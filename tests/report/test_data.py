"""What the report says of a run is what the run's files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreshock.records import SeriesRecorder, read_telemetry
from foreshock.records.event_sentence import event_sentence, offender_sentence
from foreshock.report import events as events_module
from foreshock.report import report_data
from foreshock.report.curves import MAX_CURVES, MAX_LABELS, MAX_POINTS, Curves
from foreshock.report.events import LANES, MAX_MARKS, MAX_ROWS, Events
from foreshock.report.layerwise import read_layerwise
from foreshock.report.risk import RiskBands
from foreshock.report.telemetry import RunSeen
from tests.report.runs import (
    STRUCK_STEP,
    add_autopsy,
    add_layerwise,
    add_other_series,
    loss_at,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def curve(data: dict[str, Any], name: str, source: str = "telemetry.jsonl") -> dict[str, Any]:
    drawing = data["drawing"]
    (found,) = (c for c in drawing["curves"] if (c["name"], c["source"]) == (name, source))
    return found | {"steps": drawing["steps"][found["steps"]]}


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_curve_has_every_value_of_the_telemetry(run: Path) -> None:
    loss = curve(report_data(run), "train_loss")
    assert loss["steps"] == list(range(40))
    assert loss["mean"] == pytest.approx([loss_at(step) for step in range(40)])
    assert loss["width"] == 1
    assert loss["nonfinite"] == [[STRUCK_STEP, 1]]
    records = read_telemetry(run / "telemetry.jsonl").records
    norms = {r["step"]: r["grad_norm"] for r in records if r["event"] == "telemetry"}
    found = curve(report_data(run), "grad_norm")
    assert dict(zip(found["steps"], found["mean"], strict=True)) == pytest.approx(norms)


def test_every_other_number_has_a_curve_too_and_what_is_no_measurement_has_none(run: Path) -> None:
    names = [c["name"] for c in report_data(run)["drawing"]["curves"]]
    assert names[:4] == ["train_loss", "grad_norm", "learning_rate", "spectral_kappa"]
    labels = {"largest_gradients.head.weight", "largest_gradients.tail.bias"}
    assert {*names[4:]} - {"steps_per_second"} == {"loss_z"} | labels


def test_a_step_that_was_run_twice_keeps_both_values() -> None:
    curves = Curves()
    for step, loss in [(0, 3.0), (1, 2.0), (1, 4.0)]:
        curves.add("x", step, {"loss": loss})
    (drawn,) = curves.drawn()["curves"]
    assert (drawn["low"], drawn["mean"], drawn["high"]) == ([3, 2], [3, 3], [3, 4])


def test_a_long_curve_is_short_and_keeps_its_extremes() -> None:
    curves = Curves()
    for step in range(50_000):
        curves.add("x", step, {"loss": 99.0 if step == 31_415 else 1.0})
    drawn = curves.drawn()
    (loss,) = drawn["curves"]
    assert len(loss["mean"]) <= 2048
    peak = loss["high"].index(99)
    assert drawn["steps"][0][peak] <= 31_415 < drawn["steps"][0][peak] + loss["width"]
    assert drawn["last"] == 49_999


def test_many_curves_share_the_points_that_there_are() -> None:
    curves = Curves()
    for step in range(1500):
        curves.add("x", step, {f"series_{i}": 1.0 for i in range(MAX_CURVES + 5)})
    drawn = curves.drawn()["curves"]
    assert len(drawn) == MAX_CURVES
    assert sum(len(c["mean"]) for c in drawn) <= MAX_POINTS
    assert curves.omitted == 5 * 1500


def test_labels_beyond_the_limit_are_counted() -> None:
    curves = Curves()
    curves.add("x", 0, {"norms": {f"layer.{i}": 1.0 for i in range(MAX_LABELS + 3)}, "loss": 1.0})
    assert len(curves.drawn()["curves"]) == MAX_LABELS + 1
    assert curves.omitted == 3


def test_the_risk_holds_until_it_changes(run: Path) -> None:
    levels = [(band["step"], band["level"]) for band in report_data(run)["drawing"]["bands"]]
    assert levels == [(0, "STABLE"), (STRUCK_STEP, "DANGER"), (30, "STABLE")]


def test_a_calm_step_after_a_restless_one_is_seen_where_steps_are_many() -> None:
    bands = RiskBands()
    for step in range(10_000):
        bands.add(step, "WARNING" if step == 5000 else "STABLE")
    assert [band["level"] for band in bands.bands()] == ["STABLE", "WARNING", "STABLE"]


def test_an_action_names_the_offender_and_says_what_was_done(run: Path) -> None:
    data = report_data(run)
    rollback, recovery = data["actions"]["first"]
    assert rollback["step"] == STRUCK_STEP
    assert rollback["reasons"] == "NONFINITE_WEIGHTS, head.weight"
    assert rollback["offender"] == "parameter head.weight: 1 NaN of 40 values"
    assert rollback["sentence"].startswith("rolled back to step 15, learning rate times 0.5: NONF")
    assert recovery["sentence"] == "the step that had failed was passed"
    marks = {lane["lane"]: lane["marks"] for lane in data["drawing"]["lanes"]}
    assert marks["rollbacks"] == [[STRUCK_STEP, 1, rollback["sentence"]]]
    assert set(marks) == {"rollbacks", "recoveries", "risk changes", "autopsies"}
    (change,) = data["risk_changes"]["first"]
    assert (change["before"], change["level"]) == ("STABLE", "DANGER")


def test_of_many_events_the_first_and_last_are_shown_and_all_are_counted() -> None:
    events = Events()
    for step in range(5000):
        events.add({"event": "update_skipped", "step": step, "reasons": ["LOSS_SPIKE"]})
    actions = events.actions()
    assert actions["left_out"] == 5000 - MAX_ROWS
    assert (actions["first"][0]["step"], actions["last"][-1]["step"]) == (0, 4999)
    (lane,) = events.marks()
    assert len(lane["marks"]) <= MAX_MARKS
    assert sum(count for _, count, _ in lane["marks"]) == 5000


def test_the_worst_layers_are_ranked(run: Path) -> None:
    worst = report_data(run)["worst_layers"]
    assert worst["spectral"] == [
        {"name": "head.weight", "times": 40, "largest": 49.0, "nonfinite": 0}
    ]
    assert [(row["name"], row["largest"]) for row in worst["gradients"]] == [
        ("head.weight", 41.0),
        ("tail.bias", 1.0),
    ]


def test_a_whole_run_has_no_problems_and_its_ledger_is_intact(run: Path) -> None:
    data = report_data(run)
    assert data["problems"] == []
    assert data["integrity"]["status"] == "RECOVERED"
    assert (data["ledger"]["state"], data["ledger"]["sentence"]) == ("intact", "1 line")
    assert "complete up to line 1" in data["ledger"]["limits"][0]
    assert data["overhead"] == {"mean_ms": 0.25, "percent": 1.5}
    assert dict(data["facts"])["steps"] == 40


def test_autopsies_are_told(run: Path) -> None:
    add_autopsy(run)
    (autopsy,) = report_data(run)["autopsies"]
    assert (autopsy["step"], autopsy["cause"]) == (STRUCK_STEP, "transient")
    assert autopsy["sentence"] == "nothing is wrong with head.weight"
    assert autopsy["file"] == f"autopsy/step_{STRUCK_STEP}.json"


def test_settings_are_flat_and_in_sections(run: Path) -> None:
    guard, versions = report_data(run)["settings"]
    assert guard == {"name": "guard", "rows": [("mode", "recover"), ("persist_dir", "none")]}
    assert versions["rows"][0] == ("torch", "2.13.0")


def test_metrics_watchers_and_pictures_are_there(run: Path) -> None:
    add_other_series(run)
    data = report_data(run)
    accuracy = curve(data, "accuracy", "metrics/training_metrics.json")
    assert accuracy["mean"] == pytest.approx([0.1 * step for step in range(10)])
    rms = curve(data, "rms.mlp", "monitoring/activations.jsonl")
    assert rms["mean"] == [step + 0.5 for step in range(10)]
    assert data["problems"] == [
        "monitoring/activations.jsonl: 2 lines skipped, being no whole record"
    ]
    pictures = {picture["file"]: picture["address"] for picture in data["pictures"]}
    assert pictures["plots/loss.png"].startswith("data:image/png;base64,")
    assert pictures["plots/large.png"] == ""
    assert "plots/loss.svg" not in pictures


def break_telemetry(run: Path) -> None:
    append(run / "telemetry.jsonl", '{"event": "telemetry", "st')


def drop_records(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"dropped_records": 7}))


def alter_ledger(run: Path) -> None:
    text = (run / "ledger.jsonl").read_text()
    (run / "ledger.jsonl").write_text(text.replace('"nan":1', '"nan":2'))


def break_autopsy(run: Path) -> None:
    add_autopsy(run)
    (run / "autopsy" / f"step_{STRUCK_STEP}.json").write_text("{")


BREAKAGES = {
    "1 line skipped": break_telemetry,
    "7 telemetry records were dropped": drop_records,
    "ledger.jsonl is broken: line 1: altered": alter_ledger,
    "autopsy/step_20.json cannot be read": break_autopsy,
    "summary.json is missing: the run goes on": lambda run: (run / "summary.json").unlink(),
    "summary.json cannot be read": lambda run: (run / "summary.json").write_text("[]"),
    "config.json is missing": lambda run: (run / "config.json").unlink(),
    "telemetry.jsonl is missing": lambda run: (run / "telemetry.jsonl").unlink(),
    "1 telemetry records have no step": lambda run: append(
        run / "telemetry.jsonl", '{"event": "telemetry", "step": -1}\n'
    ),
    "states schema_version 99": lambda run: append(
        run / "telemetry.jsonl", '{"event": "start", "schema_version": 99}\n'
    ),
}


@pytest.mark.parametrize("told", BREAKAGES)
def test_what_is_wrong_with_a_file_is_told_and_the_others_are_shown(run: Path, told: str) -> None:
    BREAKAGES[told](run)
    data = report_data(run)
    assert any(told in problem for problem in data["problems"]), data["problems"]
    assert data["ledger"]["state"] in ("intact", "broken", "not verified")
    assert data["actions"]["first"] or "telemetry.jsonl is missing" in told


def test_strange_values_do_no_harm(run: Path) -> None:
    strange = [
        {"event": "telemetry", "step": 10**400, "train_loss": 1.0},
        {"event": "telemetry", "step": True, "train_loss": 1.0},
        {"event": "telemetry", "step": 41, "train_loss": 10**400, "risk_level": "ODD", "time": 3},
        {"event": "telemetry", "step": 42, "largest_gradients": [1], "worst_layer": {"a": 1}},
        {"event": "rollback_success", "step": "x", "reasons": 7, "offender": "y", "time": None},
        {"event": ["a"], "step": 43, "reasons": [None]},
        {"step": 44},
    ]
    append(run / "telemetry.jsonl", "".join(json.dumps(record) + "\n" for record in strange))
    data = report_data(run)
    assert curve(data, "train_loss")["nonfinite"][-1] == [40, 1]
    json.dumps(data["drawing"], allow_nan=False)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere', which is not there; accepted: a run's direct"):
        report_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no files of a run; accepted: a directory with one"):
        report_data(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file"):
        report_data(tmp_path / "file")


def test_a_run_of_which_only_metrics_are_left_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path)
    add_other_series(tmp_path)
    for name in ("telemetry.jsonl", "summary.json", "ledger.jsonl", "config.json"):
        (tmp_path / name).unlink()
    data = report_data(tmp_path)
    assert curve(data, "loss", "metrics/training_metrics.json")["steps"] == list(range(10))
    assert data["integrity"]["status"] == "NOT ENDED"


def test_steps_per_second_follow_from_the_times_and_not_across_a_pause() -> None:
    curves = Curves()
    seen = RunSeen(curves)
    for second, step in [(0, 0), (1, 10), (None, 0), (50, 11), (52, 51)]:
        time = f"2026-01-01T00:00:{second or 0:02d}.000Z"
        event = "start" if second is None else "telemetry"
        seen.add({"event": event, "step": step, "time": time})
    (speed,) = curves.drawn()["curves"]
    assert speed["mean"] == [10.0, 20.0]


def test_what_surprised_each_layer_is_shown_from_its_file(run: Path) -> None:
    add_layerwise(run)
    data = report_data(run)
    (shown,) = data["layerwise"]
    assert (shown["file"], shown["groups"]) == ("surprise/layers.npz", ["normal", "far"])
    first, second = shown["layers"]
    assert (first["name"], first["means"]) == ("blocks.0", [2.0, 9.0])
    assert second["means"] == [1.0, 2.0]
    ((first_shades, second_shades),) = data["drawing"]["shades"]
    assert sorted(first_shades[:3]) == first_shades[:3]
    assert (first_shades[0], first_shades[3]) == (0, 255)
    assert second_shades.count(None) == 1


def test_it_is_what_surprise_saves(tmp_path: Path) -> None:
    import torch

    from foreshock.surprise import save_layerwise

    per_layer = {"a": torch.arange(1000.0), "b": torch.full((1000,), float("nan"))}
    save_layerwise(tmp_path / "x.npz", per_layer)
    found = read_layerwise(tmp_path / "x.npz")
    assert found["groups"] == ["all"]
    assert [layer["means"] for layer in found["layers"]] == [[499.5], [None]]
    assert len(found["layers"][0]["shades"]) == 400
    assert set(found["layers"][1]["shades"]) == {None}


@pytest.mark.parametrize("break_it", [b"PK", b""], ids=["no zip", "empty"])
def test_other_npz_files_are_left_alone_and_a_wrong_one_is_told(run: Path, break_it: bytes) -> None:
    np.savez(run / "other.npz", x=np.zeros(3))
    (run / "broken.npz").write_bytes(break_it)
    assert report_data(run)["problems"] == []
    wrong = {"layers": np.array(["a"]), "surprise_LN": np.zeros((2, 2)), "groups": np.array(["x"])}
    np.savez(run / "wrong.npz", **wrong)  # type: ignore[arg-type]
    assert report_data(run)["problems"] == [
        "wrong.npz cannot be read: surprise_LN is float64 of (2, 2)"
    ]


def test_every_event_that_the_monitor_writes_has_a_sentence_and_a_row() -> None:
    from foreshock import journal

    for name in [*journal._EVENT_NAMES.values(), *journal._RESPONSE_NAMES.values()]:
        events = Events()
        events.add({"event": name, "step": 1})
        (lane,) = events.marks()
        is_answer = name in journal._RESPONSE_NAMES.values()
        assert (lane["lane"] != "other events") or is_answer
        assert (
            (event_sentence({"event": name}) != name.replace("_", " "))
            or is_answer
            or (name == "autopsy")
        )


def test_a_recorded_series_has_a_curve_for_each_label(tmp_path: Path) -> None:
    with SeriesRecorder(tmp_path) as series:
        for step in range(3):
            series.record("logits", step, mean=0.5, rms={"layers.0": step, "layers.1": 2.0})
    data = report_data(tmp_path)
    assert curve(data, "mean", "monitoring/logits.jsonl")["mean"] == [0.5, 0.5, 0.5]
    assert curve(data, "rms.layers.0", "monitoring/logits.jsonl")["mean"] == [0, 1, 2]
    assert [picture["file"] for picture in data["pictures"]] == ["monitoring/logits.png"]
    assert not any("npz" in problem for problem in data["problems"])


def test_every_row_of_events_has_a_shape_of_its_own() -> None:
    script = (Path(events_module.__file__).parent / "page" / "run_charts.js").read_text()
    shapes = dict(re.findall(r'^  "([a-z ]+)": "(M[^"]+)"', script, re.M))
    assert set(shapes) == set(LANES.values())
    of_one_kind = {"rollbacks not made"}  # drawn as rollbacks are
    assert len({shapes[lane] for lane in set(shapes) - of_one_kind}) == len(shapes) - 1


def test_a_gate_at_risk_is_told_with_what_was_accepted() -> None:
    said = {"event": "gate_at_risk", "gate": "h.3", "what": "orthogonality", "value": 0.5}
    assert event_sentence(said) == "gate h.3: |R^T R - I| is 0.5"
    assert event_sentence(said | {"expected": 0.001}).endswith("is 0.5, accepted is 0.001")
    alpha = said | {"what": "alpha", "expected": 0.1}
    assert event_sentence(alpha) == "gate h.3: sigmoid(alpha) is 0.5, planned is 0.1"


@pytest.mark.parametrize("ranks", [(), (1,), (0, 2)])
@pytest.mark.parametrize("nan", [0, 3])
def test_an_offender_is_told_of_in_the_words_of_the_monitor(
    ranks: tuple[int, ...], nan: int
) -> None:
    from foreshock.guard import Offender

    offender = Offender("parameter", "head.weight", nan, 0, 24, ranks)
    assert offender_sentence({**vars(offender), "ranks": [*ranks]}) == str(offender)
