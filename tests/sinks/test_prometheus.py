"""What Prometheus gets when it asks, read by its own parser."""

from __future__ import annotations

import math
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from foreshock.sinks import Prometheus
from tests.sinks import story


class Scraped(Prometheus):
    """Asked once more when the run ends: afterwards nobody answers."""

    def close(self) -> None:
        self.told = scrape(self.port)
        super().close()


def scrape(port: int) -> dict[tuple[str, str], float]:
    """By name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_last_measurements_are_gauges_and_events_are_counted(tmp_path: Path) -> None:
    sink = Scraped(port=0)
    counted = story.tell(tmp_path, sink)
    assert counted["Scraped"] == {"written": story.NUM_RECORDS, "dropped": 0, "error": None}
    told = sink.told
    assert told["foreshock_step", ""] == 3
    assert told["foreshock_train_loss", ""] == 1.0
    assert told["foreshock_largest_gradients", "head.weight"] == 0.5
    assert told["foreshock_precursor_alert", ""] == 1
    assert told["foreshock_risk_level", "STABLE"] == 1
    assert told["foreshock_events_total", "rollback_success"] == 1
    assert told["foreshock_events_total", "risk_level_changed"] == 1
    assert "foreshock_theta" not in {name for name, _ in told}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_told_as_it_is(loss: float) -> None:
    sink = Prometheus(port=0)
    sink.write({"event": "telemetry", "step": 7, "time": "", "train_loss": loss, "a-b": 1.0})
    told = scrape(sink.port)
    sink.close()
    assert str(told["foreshock_train_loss", ""]) == str(loss)
    assert told["foreshock_a_b", ""] == 1.0


def test_what_was_not_measured_the_last_time_is_not_told() -> None:
    sink = Prometheus(port=0)
    sink.write({"event": "telemetry", "step": 7, "time": "", "top": {"a": 1.0}, "theta": 2.0})
    sink.write({"event": "telemetry", "step": 8, "time": "", "top": {"b": 1.0}})
    told = scrape(sink.port)
    sink.close()
    assert told == {("foreshock_step", ""): 8, ("foreshock_top", "b"): 1.0}


def test_only_this_machine_is_answered_and_nobody_after_the_run() -> None:
    sink = Prometheus(port=0)
    assert sink._server.server_address[0] == "127.0.0.1"
    sink.close()
    with pytest.raises(OSError, match="refused"):
        scrape(sink.port)


def test_a_port_that_is_taken_is_named() -> None:
    sink = Prometheus(port=0)
    with pytest.raises(OSError, match=f"port {sink.port} of 127.0.0.1 .*; accepted: one that is"):
        Prometheus(sink.port)
    sink.close()
