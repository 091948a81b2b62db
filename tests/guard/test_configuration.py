"""Guard's fields: validated, named in the error, and answered with the nearest known one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

import foreshock as fs

BAD = {
    "mode": "watch",
    "snapshot_interval": 0,
    "depth": 0,
    "clean_steps": -1,
    "min_depth": -1,
    "check_interval": -5,
    "violation_threshold": 0.0,
    "max_consecutive_skips": 0,
    "max_rollbacks": -1,
    "rollback_window": "soon",
    "lr_backoff": 1.5,
    "lr_recovery_steps": -1,
    "skip_batches": 0.5,
    "persist_dir": 5,
    "verify_state": "perhaps",
    "replica_interval": -1,
    "straggler_ratio": 0,
}


def test_defaults_are_the_specified_ones() -> None:
    assert fs.Guard().model_dump() == {
        "mode": "observe",
        "snapshot_interval": 100,
        "depth": 3,
        "persist_dir": None,
        "neighbor_copies": False,
        "clean_steps": 2,
        "min_depth": 0,
        "check_interval": 1,
        "replica_interval": 100,
        "straggler_ratio": 1.5,
        "verify_state": False,
        "violation_threshold": 1e6,
        "spike_window": 128,
        "spike_min_count": 32,
        "spike_z": 8.0,
        "spike_grad_z": 32.0,
        "spike_warmup_ratio": 10.0,
        "spike_response": "log",
        "max_consecutive_skips": 3,
        "max_rollbacks": 3,
        "rollback_window": 200,
        "lr_backoff": 0.5,
        "lr_recovery_steps": 100,
        "skip_batches": 0,
    }


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_answered_with_its_field_and_the_value(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        fs.Guard(**{field: BAD[field]})
    assert field in str(caught.value)
    assert str(BAD[field]) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_threshold_must_be_comparable(value: float) -> None:
    with pytest.raises(ValidationError, match="violation_threshold"):
        fs.Guard(violation_threshold=value)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("snapshot_intervall", "snapshot_interval"),
        ("max_rollback", "max_rollbacks"),
        ("lr_back_off", "lr_backoff"),
        ("mod", "mode"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known(given: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{given}'; did you mean '{nearest}'"):
        fs.Guard(**{given: 1})


def test_an_unknown_key_near_to_none_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match="unknown key 'zzz'; accepted: mode, snapshot_interval"):
        fs.Guard(zzz=1)


def test_a_guard_cannot_be_changed_once_made() -> None:
    guard: Any = fs.Guard()
    with pytest.raises(ValidationError, match="frozen"):
        guard.depth = 5


@pytest.mark.parametrize("mode", ["observe", "skip"])
def test_a_directory_for_snapshots_that_are_never_taken_is_refused(mode: Any) -> None:
    with pytest.raises(ValidationError, match=r"takes no snapshots; accepted: with mode='recover'"):
        fs.Guard(mode=mode, persist_dir="x")
    assert fs.Guard(mode="recover", persist_dir="x").persist_dir is not None


def test_copies_need_a_directory_to_be_in() -> None:
    with pytest.raises(ValidationError, match="neighbor_copies is True without persist_dir"):
        fs.Guard(mode="recover", neighbor_copies=True)
    assert fs.Guard(mode="recover", persist_dir="x", neighbor_copies=True).neighbor_copies


def test_a_seal_needs_a_step_that_confirms_a_snapshot() -> None:
    with pytest.raises(ValidationError, match="clean_steps is 0 with verify_state=True"):
        fs.Guard(mode="recover", verify_state=True, clean_steps=0)
    assert fs.Guard(mode="skip", verify_state=True, clean_steps=0).verify_state
