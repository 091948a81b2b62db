"""A local store of MLflow, read by its own client."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from foreshock.sinks import MLflow
from tests.sinks import story


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # A database would be migrated for seconds, and needs packages that nothing else here does.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "store").as_uri()


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run_id, f"foreshock/{name}")
    return [(metric.step, metric.value) for metric in found]


def test_numbers_and_counts_of_events_are_metrics_and_the_last_of_them_a_tag(
    tmp_path: Path, uri: str
) -> None:
    sink = MLflow(uri, experiment="stories", run_name="first")
    counted = story.tell(tmp_path, sink)
    assert counted["MLflow"] == {"written": story.NUM_RECORDS, "dropped": 0, "error": None}
    client = MlflowClient(uri)
    losses = history(client, sink.run_id, "train_loss")
    assert [step for step, _ in losses] == [0, 1, 2, 3, 2, 3]  # both times that they were run
    assert losses[:3] == [(0, 3.0), (1, math.inf), (2, 5.0)]
    assert math.isnan(losses[3][1])
    assert history(client, sink.run_id, "largest_gradients/body.0 bias_")[0] == (0, 0.25)
    assert history(client, sink.run_id, "rollback_success") == [(3, 1.0)]
    run = client.get_run(sink.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.metrics["foreshock/train_loss"] == 1.0  # of the last step, the later time
    assert "NONFINITE_LOSS" in run.data.tags["foreshock/rollback_success"]


def test_a_run_that_is_given_stays_open(uri: str) -> None:
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("mine")).info.run_id
    sink = MLflow(uri, run_id=run_id)
    sink.write({"event": "telemetry", "step": 7, "time": "2026-01-01T00:00:00.000Z", "a": 1.0})
    sink.close()
    assert history(client, run_id, "a") == [(7, 1.0)]
    assert client.get_run(run_id).info.status == "RUNNING"
