"""OpenTelemetry in memory, and over HTTP to a server of the test."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from foreshock.sinks import OpenTelemetry
from tests.sinks import story


def points(reader: InMemoryMetricReader) -> dict[tuple[str, str], float]:
    """By name and attribute."""
    found = reader.get_metrics_data()
    assert found is not None
    return {
        (metric.name, "".join(map(str, (point.attributes or {}).values()))): point.value
        for of_resource in found.resource_metrics
        for scope in of_resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


def test_numbers_are_gauges_and_events_are_counted_and_logged(tmp_path: Path) -> None:
    reader, logs = InMemoryMetricReader(), InMemoryLogRecordExporter()
    loggers = LoggerProvider()
    loggers.add_log_record_processor(SimpleLogRecordProcessor(logs))
    sink = OpenTelemetry(meter_provider=MeterProvider([reader]), logger_provider=loggers)
    counted = story.tell(tmp_path, sink)
    assert counted["OpenTelemetry"]["written"] == story.NUM_RECORDS
    told = points(reader)
    assert told["foreshock.step", ""] == 3
    assert told["foreshock.train_loss", ""] == 1.0
    assert told["foreshock.largest_gradients", "head.weight"] == 0.5
    assert told["foreshock.events", "rollback_success"] == 1
    assert told["foreshock.nonfinite", "train_loss"] == 2
    risk, rollback = (entry.log_record for entry in logs.get_finished_logs())
    assert (risk.event_name, risk.severity_text) == ("foreshock.risk_level_changed", "INFO")
    assert risk.attributes is not None
    assert risk.attributes["level"] == "WARNING"
    assert (rollback.event_name, rollback.severity_text) == ("foreshock.rollback_success", "WARN")
    assert rollback.attributes is not None
    assert (rollback.attributes["step"], rollback.attributes["to_step"]) == (3, 2)
    assert "NONFINITE_LOSS" in str(rollback.body)


@pytest.fixture
def collector() -> Iterator[Any]:
    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server.received.append((self.path, body))  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.received = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_collector_gets_all_of_it_before_the_run_has_ended(
    tmp_path: Path, collector: Any
) -> None:
    story.tell(tmp_path, OpenTelemetry(f"http://127.0.0.1:{collector.server_port}/"))
    bodies = dict(collector.received)
    metrics, logs = ExportMetricsServiceRequest(), ExportLogsServiceRequest()
    metrics.ParseFromString(bodies["/v1/metrics"])
    logs.ParseFromString(bodies["/v1/logs"])
    told = {
        metric.name: metric.gauge.data_points[0].as_double
        for metric in metrics.resource_metrics[0].scope_metrics[0].metrics
        if metric.HasField("gauge")
    }
    assert told["foreshock.train_loss"] == 1.0
    records = logs.resource_logs[0].scope_logs[0].log_records
    assert [r.event_name for r in records] == [
        "foreshock.risk_level_changed", "foreshock.rollback_success",
    ]  # fmt: skip


def test_an_endpoint_beside_a_provider_is_refused() -> None:
    with pytest.raises(TypeError, match="endpoint is given, and a provider too"):
        OpenTelemetry("http://localhost:4318", meter_provider=MeterProvider())
