"""To Prometheus, which comes and asks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from foreshock.sinks.sink import Record, is_measurement, numbers_of, of_extra, texts_of

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_]")


class Prometheus:
    """Serves the last measurements as gauges, and how often each event has been, at `/metrics`.

    Gauges are called `foreshock_<name>`; of numbers that stand under one name, such as the largest
    gradients, the label `of` tells whose they are. A text, such as the risk level, is a gauge that
    is 1 with the text as its label `is`. `foreshock_events_total` has the label `event`. A number
    that was not measured the last time is not there. NaN and infinities are served as such; after a
    rollback `foreshock_step` falls.

    Args:
        port: to listen on; 0: any that is free.
        addr: of the interface; by default only this machine is answered. Others get the numbers
            without being asked who they are.
    Raises:
        ModuleNotFoundError: there is no prometheus_client; install `foreshock[prometheus]`.
        OSError: the port is taken, or not to be had.
    Cost:
        A thread that serves, and one for each question.
    """

    def __init__(self, port: int = 9464, *, addr: str = "127.0.0.1") -> None:
        with of_extra("prometheus"):
            from prometheus_client import CollectorRegistry, start_http_server
        self._latest: Record = {}
        self._counts: Counter[str] = Counter()
        registry = CollectorRegistry()  # its own: of one process's runs each has its port
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, addr, registry)
        except OSError as error:
            why = f"port {port} of {addr} is not to be had ({error.strerror})"
            raise OSError(error.errno, f"{why}; accepted: one that is free, or 0") from error
        self.port: int = self._server.server_port
        """Where it listens."""

    def write(self, record: Record) -> None:
        """Keeps it for who asks next, or counts it."""
        if is_measurement(record):
            self._latest = record
        else:
            self._counts[record["event"]] += 1

    def collect(self) -> Iterator[Metric]:
        """What is there to be told, for `prometheus_client`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        counter = CounterMetricFamily("foreshock_events", "Events so far.", labels=["event"])
        for event, count in self._counts.copy().items():
            counter.add_metric([event], count)
        yield counter
        latest = self._latest
        if not latest:
            return
        gauges: dict[tuple[str, str], GaugeMetricFamily] = {}

        def add(name: str, label: str, value: str, number: float) -> None:
            allowed = _NOT_IN_NAMES.sub("_", name)
            key = (allowed, label)
            if key not in gauges:
                said = f"{name}, when it was last measured."
                labels = [label] if label else []
                gauges[key] = GaugeMetricFamily(f"foreshock_{allowed}", said, labels=labels)
            gauges[key].add_metric([value] if label else [], number)

        add("step", "", "", latest["step"])
        for (name, *inner), number in numbers_of(latest).items():
            add(name, "of" if inner else "", "/".join(inner), number)
        for name, text in texts_of(latest).items():
            add(name, "is", text, 1)
        yield from gauges.values()

    def close(self) -> None:
        """Answers no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
