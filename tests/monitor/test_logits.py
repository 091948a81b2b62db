"""Logits of the model and of its attention, in telemetry and as series."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import foreshock as fs
from foreshock import logit_watch
from foreshock.host_read import Later
from foreshock.records import read_series, read_telemetry, series_file
from foreshock.signals import logit_statistics

KEYS = {f"logit_{name}" for name in ("step", "mean", "std", "max", "min", "nonfinite", "drift")}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cost more than all else here."""
    monkeypatch.setattr(series_file, "draw_series", lambda *_: None)


def run(out_dir: Path, logits: list[Any], name: str = "logits", **options: Any) -> fs.Monitor:
    """Steps of a model that does not change, one for each of the logits."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"telemetry_interval": 1, "spectral_enabled": False, **options}
    with fs.Monitor(model, optimizer, out_dir, **settings) as monitor:
        for given in logits:
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            monitor.step(loss, **{name: given})
            optimizer.step()
    return monitor


def told(out_dir: Path) -> list[dict[str, Any]]:
    records = read_telemetry(out_dir / "telemetry.jsonl").records
    return [r for r in records if r["event"] == "telemetry"]


def rows(out_dir: Path, name: str) -> list[dict[str, Any]]:
    return read_series(out_dir / "monitoring" / f"{name}.jsonl").rows


def drawn(seed: int, std: float = 1.0) -> torch.Tensor:
    return std * torch.randn(8, 500, generator=torch.Generator().manual_seed(seed))


def test_logits_are_in_telemetry_one_step_later_and_all_of_them_in_a_series(tmp_path: Path) -> None:
    logits = [drawn(step) for step in range(9)]
    run(tmp_path, logits, logit_interval=1)
    records = told(tmp_path)
    assert not KEYS & set(records[0])  # read one step later, so as to wait for no device
    assert all(set(r) >= KEYS for r in records[1:])
    assert [r["logit_step"] for r in records[1:]] == list(range(8))
    series = rows(tmp_path, "logits")
    assert [r["step"] for r in series] == list(range(9))
    for row, given in zip(series, logits, strict=True):
        expected = [float(x) for x in logit_statistics(given)]
        assert [row[k] for k in ("mean", "std", "max", "min", "nonfinite")] == expected
    assert [r["logit_drift"] is None for r in records[1:]] == [True] * 4 + [False] * 4


def test_a_change_of_their_distribution_is_a_drift(tmp_path: Path) -> None:
    run(tmp_path, [drawn(s, std=4 if s == 20 else 1) for s in range(22)], logit_interval=1)
    drift = {r["step"]: r["drift"] for r in rows(tmp_path, "logits") if "drift" in r}
    assert max(drift, key=drift.__getitem__) == 20
    assert drift[20] > 3 * max(drift[s] for s in range(4, 20))


def test_steps_between_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    statistics = logit_watch.logit_statistics

    def note(logits: torch.Tensor) -> Any:
        looked.append(logits)
        return statistics(logits)

    monkeypatch.setattr(logit_watch, "logit_statistics", note)
    logits = [drawn(step) for step in range(11)]
    run(tmp_path, logits, logit_interval=5)
    assert [r["step"] for r in rows(tmp_path, "logits")] == [0, 5, 10]
    assert [id(x) for x in looked] == [id(logits[i]) for i in (0, 5, 10)]


def test_a_look_that_is_due_waits_for_the_next_logits(tmp_path: Path) -> None:
    given = [drawn(s) if s in (2, 3, 9) else None for s in range(12)]
    run(tmp_path, given, logit_interval=5)
    assert [r["step"] for r in rows(tmp_path, "logits")] == [2, 9]


def test_logits_are_not_kept_alive(tmp_path: Path) -> None:
    import gc
    import weakref

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = fs.Monitor(model, optimizer, tmp_path, logit_interval=2)
    for _ in range(3):
        logits = drawn(0)
        gone = weakref.ref(logits)
        monitor.step(1.0, logits)
        del logits
        gc.collect()
        assert gone() is None
    monitor.finalize()


def test_without_logits_there_is_nothing_of_them(tmp_path: Path) -> None:
    run(tmp_path, [None] * 3)
    assert not any(KEYS & set(r) for r in told(tmp_path))
    assert not (tmp_path / "monitoring").exists()


def test_a_nan_among_them_blinds_no_later_look(tmp_path: Path) -> None:
    plain = [drawn(step) for step in range(9)]
    struck = [torch.full((8, 500), math.nan) if s == 5 else x for s, x in enumerate(plain)]
    run(tmp_path / "plain", plain, logit_interval=1)
    run(tmp_path / "struck", struck, logit_interval=1)
    series = rows(tmp_path / "struck", "logits")
    assert series[5]["nonfinite"] == 4000
    assert "drift" not in series[5]
    drift = logit_watch.LogitDrift()
    for step in (0, 1, 2, 3, 4, 6, 7, 8):
        expected = drift.update(logit_watch.logit_histogram(plain[step]).tolist())
        assert series[step].get("drift") == expected


def test_what_cannot_be_read_ends_the_looking_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "foreshock"):
        run(tmp_path, [torch.ones(3, dtype=torch.int64), *map(drawn, range(3))], logit_interval=1)
    assert len([r for r in caplog.records if "no longer follows logits" in r.message]) == 1
    assert len(told(tmp_path)) == 4


def test_a_rollback_takes_their_history_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = fs.Guard(mode="recover", snapshot_interval=5, clean_steps=1)
    monitor = fs.Monitor(model, optimizer, tmp_path, guard, logit_interval=1)
    is_struck = False
    for step, seed in monitor.loop(list(range(16))):
        if step == 12 and not is_struck:
            is_struck = True
            with torch.no_grad():
                model.weight[0, 0] = math.nan
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        monitor.step(loss, drawn(seed))
        optimizer.step()
    assert monitor.finalize()["guard"]["total_rollbacks"] == 1
    of_steps: dict[int, set[float]] = {}
    for row in rows(tmp_path, "logits"):
        if "drift" in row:
            of_steps.setdefault(row["step"], set()).add(row["drift"])
    assert set(of_steps) == set(range(4, 16))
    assert all(len(found) == 1 for found in of_steps.values())


# Attention


def test_the_largest_attention_logit_and_its_layer_are_told(tmp_path: Path) -> None:
    mask = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    given = [
        {"a": torch.full((2, 2), 3.0) + mask, "b": torch.tensor(step * 2.0)} for step in (1, 2)
    ]
    run(tmp_path, given, "attention_logits", logit_interval=1)
    assert told(tmp_path)[1]["attention_logit_max"] == 3.0
    assert told(tmp_path)[1]["attention_logit_max_layer"] == "a"
    assert [r["logit_max"] for r in rows(tmp_path, "attention")] == [
        {"a": 3.0, "b": 2.0},
        {"a": 3.0, "b": 4.0},
    ]


def test_a_nan_is_the_largest_attention_logit(tmp_path: Path) -> None:
    given = {"a": torch.tensor([5.0]), "b": torch.tensor([1.0, math.nan]), "c": torch.ones(1)}
    run(tmp_path, [given, None], "attention_logits")
    (record,) = [r for r in told(tmp_path) if "attention_step" in r]
    assert math.isnan(record["attention_logit_max"])
    assert record["attention_logit_max_layer"] == "b"


def test_attention_logits_may_be_one_tensor(tmp_path: Path) -> None:
    run(tmp_path, [torch.tensor([[1.0, 7.0]]), None], "attention_logits")
    assert rows(tmp_path, "attention")[0]["logit_max"] == {"attention": 7.0}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("logits", [1.0]),
        ("logits", {"a": torch.ones(1)}),
        ("attention_logits", [torch.ones(1)]),
        ("attention_logits", {"a": 1.0}),
    ],
)
def test_other_than_tensors_are_errors_that_say_so(tmp_path: Path, name: str, given: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is a .*accepted: a tensor"):
        run(tmp_path, [given], name)


@pytest.mark.gpu
def test_on_a_device_a_look_waits_for_nothing(tmp_path: Path) -> None:
    logits = drawn(0).cuda()
    watch = logit_watch.LogitWatch(1, lambda *_, **__: None)
    watch.offer(logits)
    watch.note_step(0)  # what is loaded and allocated once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.stack([*logit_statistics(logits)])
        Later(torch.cat([found, logit_watch.logit_histogram(logits).double()]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
