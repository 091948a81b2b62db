"""Offline runs of Weights & Biases, read back out of their files. No network."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

from foreshock.sinks import WandB
from tests.sinks import story

_BLOCK = 32768


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Of the one run in a folder. Its file is written by another process, which outlives `finish`
    by a moment."""
    deadline = time.monotonic() + 20
    found: list[wandb_internal_pb2.Record] = []
    while not (found and found[-1].HasField("exit")):
        assert time.monotonic() < deadline, "the run has no end"
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        with contextlib.suppress(struct.error, DecodeError):  # cut off where it is being written
            found = list(parsed(file.read_bytes()))
        time.sleep(0.05)
    return found


def parsed(data: bytes) -> Iterator[wandb_internal_pb2.Record]:
    """The client has no reader; the format is LevelDB's log."""
    at, whole = 7, b""
    while at < len(data):
        if _BLOCK - at % _BLOCK < 7:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(folder)
        if record.HasField("history")
    ]


def test_rows_are_logged_over_the_step_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--hf-token=hunter2-canary"])
    sink = WandB(project="stories", dir=tmp_path, mode="offline")
    counted = story.tell(tmp_path, sink)
    assert counted["WandB"] == {"written": story.NUM_RECORDS, "dropped": 0, "error": None}
    assert wandb.run is None
    found = rows(tmp_path)
    losses = [(r["foreshock/step"], r.get("foreshock/train_loss")) for r in found]
    assert str(losses) == str([
        (0, 3), (1, math.inf), (2, 5), (3, math.nan), (3, None), (3, None), (2, 2), (3, 1),
    ])  # fmt: skip
    assert found[0]["foreshock/risk_level"] == "STABLE"
    assert found[0]["foreshock/largest_gradients/head.weight"] == 0.5
    assert "NONFINITE_LOSS" in found[5]["foreshock/rollback_success"]
    axes = [r.metric for r in records(tmp_path) if r.HasField("metric")]
    assert {m.glob_name: m.step_metric for m in axes}["foreshock/*"] == "foreshock/step"
    for file in (tmp_path / "wandb").rglob("*"):
        assert not file.is_file() or b"hunter2" not in file.read_bytes(), file


def test_a_run_that_is_given_stays_open_and_takes_nothing_else(tmp_path: Path) -> None:
    run = wandb.init(project="mine", dir=tmp_path, mode="offline")
    with pytest.raises(TypeError, match=r"run is given, and \['project'\] too"):
        WandB(run, project="other")
    sink = WandB(run)
    sink.write({"event": "telemetry", "step": 7, "time": "", "a": 1.0})
    sink.close()
    run.log({"own": 2.0})
    run.finish()
    assert [r.get("foreshock/a") for r in rows(tmp_path)] == [1.0, None]
    assert rows(tmp_path)[1]["own"] == 2.0
