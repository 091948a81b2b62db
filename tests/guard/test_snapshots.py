"""The ring of snapshots: which are taken, trusted, dropped and restored."""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

import pytest
import torch

from foreshock.guard import SnapshotDropped, SnapshotRing, snapshots
from foreshock.guard.arena import Arena
from foreshock.guard.snapshots import Standing, checksum, find_nonfinite


class Box:
    """A part of the state that holds one tensor, or whatever it is given."""

    def __init__(self, value: Any = 0.0) -> None:
        self.value = torch.tensor([value]) if isinstance(value, float) else value
        self.restored = 0

    def live(self) -> Any:
        return {"x": self.value}

    def restore(self, saved: Any) -> None:
        self.value = saved["x"].clone()
        self.restored += 1


class Ring(SnapshotRing):
    """A ring over a box, that keeps what it was told."""

    def __init__(self, depth: int = 3, clean_steps: int = 2, **boxes: Box) -> None:
        self.told: list[SnapshotDropped] = []
        self.box = Box()
        parts = {"parameters": self.box, **boxes}
        super().__init__(parts, depth, clean_steps, self.told.append)

    @property
    def standings(self) -> dict[int, Standing]:
        return {entry.step: entry.standing for entry in self.entries}


def test_a_snapshot_is_verified_then_known_good_after_clean_steps() -> None:
    ring = Ring(clean_steps=2)
    ring.take(0)
    assert ring.standings == {0: Standing.VERIFIED}
    ring.note_clean_step(10**9)
    assert ring.standings == {0: Standing.VERIFIED}
    assert ring.newest_good(99) is None
    ring.note_clean_step(10**9)
    assert ring.standings == {0: Standing.KNOWN_GOOD}
    assert ring.newest_good(99) is ring.entries[0]


def test_without_clean_steps_asked_for_it_is_good_at_once() -> None:
    ring = Ring(clean_steps=0)
    ring.take(0)
    assert ring.newest_good(0) is not None


def test_trap_17_the_newest_snapshot_is_not_restored_before_it_is_proven() -> None:
    ring = Ring(clean_steps=2)
    ring.take(0)
    ring.note_clean_step(10**9)
    ring.note_clean_step(10**9)
    ring.take(2)
    ring.note_clean_step(10**9)
    found = ring.newest_good(3)
    assert found is not None
    assert found.step == 0


def test_only_a_snapshot_that_is_old_enough_is_found() -> None:
    ring = Ring(clean_steps=0)
    for step in (0, 10, 20):
        ring.take(step)
    for not_after, step in ((25, 20), (20, 20), (19, 10), (9, 0)):
        found = ring.newest_good(not_after)
        assert found is not None
        assert found.step == step
    assert ring.newest_good(-1) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused_and_named(bad: float) -> None:
    ring = Ring()
    ring.box.value = torch.tensor([1.0, bad])
    assert ring.take(7) is None
    assert not ring.entries
    assert ring.told == [SnapshotDropped(7, "parameters.x is not finite")]


def test_values_meant_to_be_infinite_are_no_fault_but_new_ones_are() -> None:
    """A mask of -inf among the buffers, from the start."""
    mask, scale = Box(torch.tensor([0.0, -math.inf])), Box(1.0)
    ring = Ring(buffers=mask, scaler=scale)
    assert ring.take(0) is not None
    scale.value = torch.tensor([math.nan])
    assert ring.take(1) is None
    assert ring.told == [SnapshotDropped(1, "scaler.x is not finite")]


@pytest.mark.parametrize("part", ["parameters", "gradients", "optimizer"])
def test_parameters_and_moments_are_never_meant_to_be_infinite(part: str) -> None:
    ring = Ring(**({} if part == "parameters" else {part: Box(math.inf)}))
    if part == "parameters":
        ring.box.value = torch.tensor([math.inf])
    assert ring.take(0) is None


def test_a_flipped_bit_in_a_snapshot_is_found_and_the_older_one_used() -> None:
    ring = Ring(clean_steps=0)
    for step, value in enumerate((1.0, 2.0, 3.0)):
        ring.box.value = torch.tensor([value])
        ring.take(step)
    ring.entries[2].saved["parameters"]["x"].view(torch.int32)[0] ^= 1
    found = ring.newest_good(99)
    assert found is not None
    ring.restore(found)
    assert ring.box.value.item() == 2.0
    assert ring.told == [SnapshotDropped(2, "its checksum no longer fits")]
    assert [entry.step for entry in ring.entries] == [0, 1]


def test_when_every_snapshot_is_corrupt_none_is_restored() -> None:
    ring = Ring(clean_steps=0)
    for step in range(3):
        ring.take(step)
    for entry in ring.entries:
        entry.saved["parameters"]["x"].add_(1)
    assert ring.newest_good(99) is None
    assert len(ring.told) == 3


def test_restoring_forgets_what_was_taken_later_and_keeps_the_snapshot() -> None:
    ring = Ring(clean_steps=0)
    for step in (0, 5, 10):
        ring.take(step)
    snapshot = ring.newest_good(5)
    assert snapshot is not None
    for _ in range(2):
        ring.restore(snapshot)
        assert [entry.step for entry in ring.entries] == [0, 5]
    assert ring.newest_good(99) is snapshot


def test_parts_can_be_left_out_of_a_restore() -> None:
    other = Box()
    ring = Ring(clean_steps=0, gradients=other)
    snapshot = ring.take(0)
    assert snapshot is not None
    ring.restore(snapshot, without=frozenset({"gradients"}))
    assert (ring.box.restored, other.restored) == (1, 0)


def test_a_snapshot_of_the_same_step_is_replaced() -> None:
    ring = Ring(clean_steps=0)
    ring.take(4)
    second = ring.take(4)
    assert ring.entries == (second,)


def test_the_oldest_makes_room_for_a_proven_one_only() -> None:
    ring = Ring(depth=1, clean_steps=2)
    ring.take(0)
    ring.note_clean_step(10**9)
    ring.note_clean_step(10**9)
    ring.take(2)
    assert [entry.step for entry in ring.entries] == [0, 2]
    assert not ring.has_room
    ring.note_clean_step(10**9)
    assert [entry.step for entry in ring.entries] == [0, 2]
    ring.note_clean_step(10**9)
    assert [entry.step for entry in ring.entries] == [2]
    assert ring.has_room


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("clean_steps", [0, 1, 2, 5, 9])
def test_memory_is_bounded_however_slowly_snapshots_are_proven(
    depth: int, clean_steps: int
) -> None:
    ring = Ring(depth=depth, clean_steps=clean_steps)
    for step in range(60):
        if ring.has_room:
            ring.take(step)
        assert len(ring.entries) <= depth + 1
        ring.note_clean_step(10**9)
        if step > 2 * clean_steps:
            assert ring.newest_good(step) is not None
    assert ring.entries[-1].step > 40


def test_size_is_that_of_the_tensors() -> None:
    ring = Ring()
    ring.box.value = torch.zeros(10, dtype=torch.float64)
    snapshot = ring.take(0)
    assert snapshot is not None
    assert snapshot.size_bytes == 80


# ---- checksum and scan


def test_every_flipped_bit_and_every_swap_changes_the_checksum() -> None:
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    before = checksum({"x": x})
    for byte in range(x.nbytes):
        for bit in (1, 128):
            x.view(torch.uint8)[byte] ^= bit
            assert checksum({"x": x}) != before
            x.view(torch.uint8)[byte] ^= bit
    assert checksum({"x": x}) == before
    assert checksum({"y": x}) != before
    assert checksum({"x": x.flip(0)}) != before
    assert checksum({"x": x.reshape(4, 4)}) != before


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.tensor([True]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.float8_e4m3fn),
        torch.tensor([1 + 1j]),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.eye(3).to_sparse(),
        torch.arange(3).numpy(),
    ],
)
def test_everything_that_a_state_may_hold_has_a_checksum(value: Any) -> None:
    assert checksum({"x": value}) == checksum({"x": value})
    assert checksum({"x": value}) != checksum({})


def test_nonfinite_tensors_are_found_in_any_dtype_that_can_hold_them() -> None:
    state = {
        "good": torch.ones(2),
        "integers": torch.ones(2, dtype=torch.int64),
        "half": torch.tensor([math.inf], dtype=torch.float16),
        "complex": torch.tensor([complex(0, math.nan)]),
        "empty": torch.ones(0),
        "nested": [{"deep": torch.tensor(math.nan)}],
    }
    assert find_nonfinite(state) == ["half", "complex", "nested.0.deep"]


# ---- memory


def test_memory_is_allocated_once_and_then_used_again() -> None:
    ring = Ring(depth=2, clean_steps=0)
    places = []
    for step in range(12):
        ring.box.value = torch.full((64,), float(step))
        snapshot = ring.take(step)
        assert snapshot is not None
        places.append(snapshot.arena)
    assert len(set(map(id, places))) == 3
    values = [entry.saved["parameters"]["x"][0].item() for entry in ring.entries]
    assert values == [10.0, 11.0]
    assert all(checksum(entry.saved) == entry.checksum for entry in ring.entries)


def test_memory_that_a_file_is_being_made_of_is_left_as_it_is() -> None:
    ring = Ring(depth=1, clean_steps=0)
    first = ring.take(0)
    assert first is not None
    first.is_being_saved = True
    for step in range(1, 6):
        ring.box.value = torch.tensor([float(step)])
        ring.take(step)
    assert first.saved["parameters"]["x"].item() == 0.0
    assert checksum(first.saved) == first.checksum


def test_what_a_depth_costs_is_said_once_for_each_size(caplog: pytest.LogCaptureFixture) -> None:
    ring = Ring(depth=3)
    ring.box.value = torch.zeros(1 << 18)
    with caplog.at_level(logging.INFO, "foreshock"):
        ring.take(0)
        ring.take(1)
    (said,) = caplog.messages
    assert said == (
        "a snapshot takes 1.0 MiB of host memory; depth=3 keeps up to 4 of them, 4.0 MiB"
    )


def test_a_depth_that_memory_will_not_do_for_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "available_bytes", lambda: 3 << 20)
    ring = Ring(depth=3)
    ring.box.value = torch.zeros(1 << 18)
    with caplog.at_level(logging.WARNING, "foreshock"):
        assert ring.take(0) is not None
    assert "depth=3 keeps up to 4 of them, 4.0 MiB, and 3.0 MiB is left: lower depth" in caplog.text


@pytest.mark.parametrize("is_known", [True, False])
def test_a_snapshot_that_does_not_fit_is_refused_and_training_goes_on(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than to be ended by the system for want of memory."""
    monkeypatch.setattr(snapshots, "available_bytes", lambda: 1 << 20 if is_known else None)
    if not is_known:
        monkeypatch.setattr(snapshots, "Arena", lambda _: torch.empty(1 << 60))
    ring = Ring()
    ring.box.value = torch.zeros(1 << 19)
    assert ring.take(0) is None
    left = "1.0 MiB" if is_known else "an unknown amount"
    why = f"its copy takes 2.0 MiB of host memory, of which {left} is left"
    assert ring.told == [SnapshotDropped(0, why)]


# ---- copies that are under way


class LateTransfer:
    """A device that copies when it must: when the host waits, or is held back by an update."""

    def __init__(self, targets: Any, sources: Any, is_steady: Any) -> None:
        self.steady = []
        for target, source, steady in zip(targets, sources, is_steady, strict=True):
            if steady:
                self.steady.append((target, source))
            else:
                target.copy_(source)
        self.arrived = threading.Event()

    def hold_back(self) -> None:
        for target, source in self.steady:
            target.copy_(source)
        self.arrived.set()

    def wait(self) -> None:
        assert self.arrived.wait(10)


class OffDevice(Arena):
    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors)
        self.is_pinned = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "Transfer", LateTransfer)
    monkeypatch.setattr(snapshots, "Arena", OffDevice)


@pytest.mark.usefixtures("late")
def test_trap_18_a_copy_is_complete_before_the_next_update_and_nobody_waits_for_it() -> None:
    buffers = Box(1.0)
    ring = Ring(clean_steps=1, buffers=buffers)
    snapshot = ring.take(0)
    assert snapshot is not None
    assert ring.standings == {0: Standing.CAPTURED}
    buffers.value.fill_(2.0)  # the next forward
    ring.note_clean_step(0)
    assert ring.standings == {0: Standing.CAPTURED}  # proven, but not verified yet
    ring.hold_back_update()
    ring.box.value.fill_(3.0)  # the update
    found = ring.newest_good(0)
    assert found is snapshot
    assert found.standing is Standing.KNOWN_GOOD
    assert found.saved["parameters"]["x"].item() == 0.0
    assert found.saved["buffers"]["x"].item() == 1.0
    assert checksum(found.saved) == found.checksum
    ring.close()


@pytest.mark.usefixtures("late")
def test_a_bad_copy_that_is_under_way_is_never_restored() -> None:
    ring = Ring(clean_steps=0)
    ring.box.value = torch.tensor([math.nan])
    assert ring.take(0) is not None
    ring.hold_back_update()
    assert ring.newest_good(0) is None
    assert ring.told == [SnapshotDropped(0, "parameters.x is not finite")]
    ring.close()


@pytest.mark.gpu
def test_a_copy_from_a_device_runs_beside_it_and_comes_out_right() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ring = Ring(clean_steps=0)
    ring.box.value = torch.rand(1 << 24, device="cuda")
    expected = ring.box.value.cpu()
    ring.take(0)  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshot = ring.take(1)
        ring.hold_back_update()
        ring.box.value.mul_(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert snapshot is not None
    found = ring.newest_good(1)
    assert found is snapshot
    assert found.arena is not None
    assert found.arena.memory.is_pinned()
    assert torch.equal(found.saved["parameters"]["x"], expected)
    ring.restore(found)
    ring.close()
