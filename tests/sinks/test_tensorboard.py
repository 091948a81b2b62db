"""Event files, read by TensorBoard's own reader."""

from __future__ import annotations

import math
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from foreshock.sinks import TensorBoard
from tests.sinks import story


def read(log_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(log_dir)).Reload()


def scalars(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(f"foreshock/{name}")]


def test_numbers_are_scalars_by_name_and_step(tmp_path: Path) -> None:
    counted = story.tell(tmp_path, TensorBoard(tmp_path / "tb"))
    assert counted["TensorBoard"] == {"written": story.NUM_RECORDS, "dropped": 0, "error": None}
    found = read(tmp_path / "tb")
    assert scalars(found, "largest_gradients/head.weight") == [(s, 0.5) for s in range(4)]
    assert scalars(found, "precursor_alert")[0] == (0, 1.0)
    assert "foreshock/theta" not in found.Tags()["scalars"]


def test_steps_that_were_run_again_are_those_that_stand(tmp_path: Path) -> None:
    story.tell(tmp_path, TensorBoard(tmp_path / "tb"))
    assert scalars(read(tmp_path / "tb"), "train_loss") == [
        (0, 3.0), (1, math.inf), (2, 2.0), (3, 1.0),
    ]  # fmt: skip


def test_nan_is_written_as_nan(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path)
    sink.write({"event": "telemetry", "step": 7, "time": "", "train_loss": math.nan})
    sink.close()
    ((step, value),) = scalars(read(tmp_path), "train_loss")
    assert (step, math.isnan(value)) == (7, True)


def test_a_rollback_is_a_text_that_says_why(tmp_path: Path) -> None:
    story.tell(tmp_path, TensorBoard(tmp_path / "tb"))
    found = read(tmp_path / "tb")
    (event,) = found.Tensors("foreshock/rollback_success/text_summary")
    assert event.step == 3
    assert b"NONFINITE_LOSS" in event.tensor_proto.string_val[0]
    assert b"head.weight" in event.tensor_proto.string_val[0]


def test_a_run_that_is_taken_up_discards_what_it_runs_again(tmp_path: Path) -> None:
    head = {"event": "telemetry", "time": ""}
    for first, loss in ((0, 9.0), (2, 1.0)):
        sink = TensorBoard(tmp_path)
        if first:
            sink.write({"event": "resumed", "step": first, "time": "", "path": "snapshots/2"})
        for step in range(first, 4):
            sink.write({**head, "step": step, "train_loss": loss})
        sink.close()
    assert scalars(read(tmp_path), "train_loss") == [(0, 9.0), (1, 9.0), (2, 1.0), (3, 1.0)]
