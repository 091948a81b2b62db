"""Rotation gates in the monitor: what is told of them, what is written, what is a risk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import foreshock as fs
from foreshock.records import read_series, read_telemetry
from tests.gates.models import WIDTH, Decoder, decoder

KEYS = {
    "gate_step",
    "gate_orthogonality_max",
    "gate_orthogonality_mean",
    "gate_worst",
    "gate_det",
    "gate_mix_min",
    "gate_mix_max",
}
STEPS, WARMUP = 30, 20


def gated() -> nn.Module:
    torch.manual_seed(0)
    model = decoder().model
    fs.gates.attach(model, theta_std=0.3)
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))


class Run:
    """A training of a model with gates, with something that happens at a step."""

    def __init__(self, out_dir: Path, model: nn.Module | None = None, **given: Any) -> None:
        self.out_dir, self.model = out_dir, model or gated()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.schedule = fs.gates.AlphaSchedule(self.model, WARMUP, optimizer=self.optimizer)
        settings = {"telemetry_interval": 1, "gate_interval": 1, "gate_schedule": self.schedule}
        settings |= {"spectral_enabled": False, **given}
        self.monitor = fs.Monitor(self.model, self.optimizer, out_dir, **settings)

    def train(self, at: int | None = None, happens: Any = None) -> dict[str, Any]:
        for step, x in self.monitor.loop([batch(i) for i in range(STEPS)]):
            if step == at:
                at = None
                with torch.no_grad():
                    happens(self.gate)
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            self.monitor.step(loss)
            self.optimizer.step()
        return self.monitor.finalize()

    @property
    def gate(self) -> fs.gates.SO8RotationGate:
        return fs.gates.gates_of(self.model)["blocks.2"]

    def told(self, event: str = "telemetry") -> list[dict[str, Any]]:
        records = read_telemetry(self.out_dir / "telemetry.jsonl").records
        return [record for record in records if record["event"] == event]


def test_telemetry_tells_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    with caplog.at_level(logging.INFO, "foreshock"):
        run.train()
    first, *records = run.told()
    assert not KEYS & set(first)  # read one step later, so as to wait for no device
    assert all(set(record) >= KEYS for record in records)
    assert [record["gate_step"] for record in records] == list(range(STEPS - 1))
    mixes = [record["gate_mix_max"] for record in records]
    assert mixes[0] == pytest.approx(0.0066929, abs=1e-6)
    assert mixes[WARMUP] == pytest.approx(0.1, abs=1e-3)
    assert all(0 < record["gate_orthogonality_max"] < 1e-6 for record in records)
    assert not run.told("gate_at_risk")
    lines = [record for record in caplog.records if hasattr(record, "gates")]
    assert len(lines) == STEPS
    assert lines[3].gates == {key: records[3][key] for key in KEYS}
    assert lines[3].message.startswith("gate_step=3 gate_orthogonality_max=")


def test_their_numbers_are_files_that_numpy_and_pandas_read(tmp_path: Path) -> None:
    run = Run(tmp_path, gate_interval=3)
    run.train()
    arrays = np.load(tmp_path / "monitoring" / "gates.npz")
    assert arrays["step"].tolist() == list(range(0, STEPS, 3))
    assert arrays["mix"].shape == (STEPS // 3, 2)
    assert arrays["mix.labels"].tolist() == ["blocks.1", "blocks.2"]
    frame = pd.read_json(tmp_path / "monitoring" / "gates.jsonl", lines=True)
    assert len(frame) == STEPS // 3
    rows = read_series(tmp_path / "monitoring" / "gates.jsonl").rows
    assert set(rows[0]) == {"step", "time", "orthogonality_max", "orthogonality_mean", "det", "mix"}
    assert rows[0]["det"]["blocks.1"] == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "monitoring" / "gates.png").stat().st_size > 10_000


def test_a_model_without_gates_has_none_of_it(tmp_path: Path) -> None:
    model = decoder().model
    optimizer = torch.optim.AdamW(model.parameters())
    with fs.Monitor(model, optimizer, tmp_path, telemetry_interval=1) as monitor:
        for step in range(3):
            loss = model(batch(step)).square().mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    assert not KEYS & set(monitor.latest)
    assert not (tmp_path / "monitoring").exists()


def test_watching_changes_no_bit(tmp_path: Path) -> None:
    watched = Run(tmp_path)
    watched.train()
    alone = Run(tmp_path / "alone")
    alone.monitor.finalize()
    for step in range(STEPS):
        alone.optimizer.zero_grad()
        alone.model(batch(step)).square().mean().backward()
        alone.optimizer.step()
    pairs = zip(watched.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def open_wide(gate: fs.gates.SO8RotationGate) -> None:
    gate.alpha.fill_(2.0)


def stretch(gate: fs.gates.SO8RotationGate) -> None:
    """What rounds no longer to a rotation."""
    gate.theta.mul_(1e14)


RISKS = [(open_wide, "alpha", 0.8808), (stretch, "orthogonality", None)]


@pytest.mark.parametrize(("happens", "what", "value"), RISKS, ids=[what for _, what, _ in RISKS])
def test_a_gate_that_goes_astray_is_a_risk_that_is_recorded_and_said(
    tmp_path: Path, happens: Any, what: str, value: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    with caplog.at_level(logging.WARNING, "foreshock"):
        summary = run.train(11, happens)
    (risk,) = run.told("gate_at_risk")
    assert (risk["step"], risk["gate"], risk["what"]) == (11, "blocks.2", what)
    if value is None:
        assert risk["value"] > 1e-5 >= risk["expected"] >= 1e-6
    else:
        assert risk["value"] == pytest.approx(value, abs=1e-3)
        assert risk["expected"] == pytest.approx(0.0066929 + 11 / 20 * 0.0933071, abs=1e-4)
    said = [record.message for record in caplog.records if "gate blocks.2" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 11: gate blocks.2: ")
    assert summary["total_steps"] == STEPS
    assert not run.told("update_skipped")


def test_a_rollback_takes_schedule_and_gates_back(tmp_path: Path) -> None:
    guard = fs.Guard(mode="recover", snapshot_interval=5, clean_steps=1, lr_backoff=1.0)
    run = Run(tmp_path, guard=guard)
    seen: dict[int, float] = {}

    def strike(_: Any) -> None:
        run.model.get_parameter("head.weight")[0, 0] = float("nan")

    summary = run.train(13, strike)
    assert summary["guard"]["total_rollbacks"] == 1
    for row in read_series(tmp_path / "monitoring" / "gates.jsonl").rows:
        mix = row["mix"]["blocks.2"]
        assert seen.setdefault(row["step"], mix) == mix
    assert list(seen) == list(range(STEPS))
    assert seen[WARMUP] == pytest.approx(0.1, abs=1e-3)
    assert not run.told("gate_at_risk")


def test_a_guard_that_looks_for_flipped_bits_takes_no_opening_for_one(tmp_path: Path) -> None:
    run = Run(tmp_path, guard=fs.Guard(mode="recover", verify_state=True, snapshot_interval=5))
    summary = run.train()
    assert summary["guard"]["integrity_status"] == "OK"
    assert run.gate.mix().item() > 0.09


def test_an_update_that_is_withheld_opens_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, guard=fs.Guard(mode="skip"))
    hook = run.gate.alpha.register_hook(lambda grad: grad * float("nan"))
    loss = run.model(batch(0)).square().mean()
    loss.backward()
    run.monitor.step(loss)
    run.optimizer.step()
    assert run.schedule.state_dict()["step"] == 0
    hook.remove()
    run.optimizer.zero_grad()
    loss = run.model(batch(0)).square().mean()
    loss.backward()
    run.monitor.step(loss)
    run.optimizer.step()
    assert run.schedule.state_dict()["step"] == 1


def test_a_fault_in_here_ends_the_watching_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    run = Run(tmp_path)
    monkeypatch.setattr(fs.gates.GateMonitor, "begin", fail)
    with caplog.at_level(logging.ERROR, "foreshock"):
        run.train()
    assert len([r for r in caplog.records if "follows gates" in r.message]) == 1
    assert len(run.told()) == STEPS


def test_more_gates_than_a_row_takes_are_watched_all_the_same(tmp_path: Path) -> None:
    model = Decoder(nn.Identity, layers=300)
    fs.gates.attach(model, "all", dim=WIDTH)
    run = Run(tmp_path, model)
    run.monitor.step(0.0)
    run.monitor.finalize()
    (row,) = read_series(tmp_path / "monitoring" / "gates.jsonl").rows
    assert len(row["mix"]) == 256


def test_a_schedule_that_is_none_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = gated()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="gate_schedule is a int; accepted: an AlphaSchedule"):
        fs.Monitor(model, optimizer, tmp_path, gate_schedule=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'gate_schedule'"):
        fs.Monitor(model, optimizer, tmp_path, gate_shedule=None)


@pytest.mark.filterwarnings("default")
def test_the_trainer_of_hugging_face_gets_it_all(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from foreshock.integrations.huggingface import MonitorCallback
    from tests.gates.models import gpt2

    model = gpt2().model
    fs.gates.attach(model, theta_std=0.3)
    schedule = fs.gates.AlphaSchedule(model, 4)

    class Opening(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            schedule.step()

    callback = MonitorCallback(tmp_path / "run", gate_interval=1, gate_schedule=schedule)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=6,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    ids = torch.randint(0, 20, (16, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[callback, Opening()]
    ).train()
    seen = read_series(tmp_path / "run" / "monitoring" / "gates.jsonl").rows
    assert [row["step"] for row in seen] == list(range(6))
    assert seen[4]["mix"]["transformer.h.1"] == pytest.approx(0.1, abs=1e-3)
    assert not [
        r
        for r in read_telemetry(tmp_path / "run" / "telemetry.jsonl").records
        if r["event"] == "gate_at_risk"
    ]
