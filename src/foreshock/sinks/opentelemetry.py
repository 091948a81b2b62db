"""To whatever takes OpenTelemetry."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from foreshock.sinks.sink import (
    Record,
    is_measurement,
    numbers_of,
    of_extra,
    sentence_of,
    texts_of,
)

if TYPE_CHECKING:
    from opentelemetry._logs import LoggerProvider
    from opentelemetry.metrics import MeterProvider, _Gauge
    from opentelemetry.sdk._logs import LoggerProvider as OwnLoggerProvider
    from opentelemetry.sdk.metrics import MeterProvider as OwnMeterProvider

_TIMEOUT_S = 5
_WARNINGS = ("rollback_success", "update_skipped", "anomaly_seen", "snapshot_dropped")


class OpenTelemetry:
    """Exports numbers as gauges `foreshock.<name>`, events as log records and counted.

    The gauges have the value that was last measured before an export; numbers that stand under one
    name are told apart by the attribute `of`. The counter `foreshock.events` has the attribute
    `event`. A log record has the event's name, its texts and numbers as attributes, and its step.
    NaN and infinities, which the client refuses in a gauge, are counted in `foreshock.nonfinite`
    instead, with the attribute `name`. After a rollback `foreshock.step` falls.

    Args:
        endpoint: of a collector that speaks OTLP over HTTP, such as "http://localhost:4318"; None:
            what OTEL_EXPORTER_OTLP_ENDPOINT says, or that.
        interval_s: seconds between exports.
        meter_provider: that you have set up; it stays open, and nothing is exported but by it.
        logger_provider: likewise.
    Raises:
        ModuleNotFoundError: there is no OpenTelemetry; install `foreshock[opentelemetry]`.
        TypeError: endpoint is given beside a provider.
    Cost:
        Exports are made by threads of the client. What a collector does not take, the client drops
        and says so; it is not among the losses in the summary.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        interval_s: float = 10.0,
        meter_provider: MeterProvider | None = None,
        logger_provider: LoggerProvider | None = None,
    ) -> None:
        with of_extra("opentelemetry"):
            from opentelemetry._logs import NoOpLoggerProvider
            from opentelemetry.metrics import NoOpMeterProvider
        self._own: tuple[OwnMeterProvider, OwnLoggerProvider] | None = None
        if meter_provider is None and logger_provider is None:
            self._own = _exporting(endpoint, interval_s)
            meter_provider, logger_provider = self._own
        elif endpoint is not None:
            raise TypeError("endpoint is given, and a provider too; accepted: one of them")
        self._meter = (meter_provider or NoOpMeterProvider()).get_meter("foreshock")
        self._logger = (logger_provider or NoOpLoggerProvider()).get_logger("foreshock")
        self._events = self._meter.create_counter("foreshock.events")
        self._nonfinite = self._meter.create_counter("foreshock.nonfinite")
        self._gauges: dict[str, _Gauge] = {}

    def write(self, record: Record) -> None:
        """Sets its gauges, or counts and logs it."""
        if is_measurement(record):
            self._gauge("step").set(record["step"])
            for (name, *inner), number in numbers_of(record).items():
                if math.isfinite(number):
                    self._gauge(name).set(number, {"of": "/".join(inner)} if inner else {})
                else:
                    self._nonfinite.add(1, {"name": name})
            return
        self._events.add(1, {"event": record["event"]})
        self._log(record)

    def _gauge(self, name: str) -> _Gauge:
        if name not in self._gauges:
            self._gauges[name] = self._meter.create_gauge(f"foreshock.{name}")
        return self._gauges[name]

    def _log(self, record: Record) -> None:
        from opentelemetry._logs import LogRecord, SeverityNumber

        severity = SeverityNumber.INFO
        if record["event"] == "aborted":
            severity = SeverityNumber.ERROR
        elif record["event"] in _WARNINGS:
            severity = SeverityNumber.WARN
        numbers = {".".join(name): number for name, number in numbers_of(record).items()}
        self._logger.emit(
            LogRecord(
                event_name=f"foreshock.{record['event']}",
                severity_number=severity,
                severity_text=severity.name,
                body=sentence_of(record),
                attributes={"step": record["step"], **numbers, **texts_of(record)},
            )
        )

    def close(self) -> None:
        """Exports what is left, by providers of its own."""
        for provider in self._own or ():
            provider.shutdown()


def _exporting(
    endpoint: str | None, interval_s: float
) -> tuple[OwnMeterProvider, OwnLoggerProvider]:
    with of_extra("opentelemetry"):
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    base = None if endpoint is None else endpoint.rstrip("/")
    metrics = OTLPMetricExporter(base and f"{base}/v1/metrics", timeout=_TIMEOUT_S)
    logs = OTLPLogExporter(base and f"{base}/v1/logs", timeout=_TIMEOUT_S)
    reader = PeriodicExportingMetricReader(metrics, export_interval_millis=1000 * interval_s)
    loggers = LoggerProvider()
    loggers.add_log_record_processor(
        BatchLogRecordProcessor(logs, schedule_delay_millis=1000 * interval_s)
    )
    return MeterProvider([reader]), loggers
