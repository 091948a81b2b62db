"""From what a step showed to what is done about it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from foreshock.guard import Action, Guard, Policy, Reason, Signs

R = Reason
CLEAN = Signs(loss=1.0)
BAD_GRADIENT = Signs(loss=1.0, has_nonfinite_gradient=True)
BAD_WEIGHTS = Signs(loss=1.0, has_nonfinite_weights=True)


def make_policy(**given: Any) -> Policy:
    return Policy(Guard(**{"mode": "recover", **given}))


def decide(policy: Policy, signs: Signs, has_snapshot: bool = True) -> tuple[Action, list[Reason]]:
    decision = policy.decide(signs, lambda: has_snapshot)
    if decision.action in (Action.SKIP, Action.CONTINUE):
        policy.note_update(is_bad=decision.action is Action.SKIP)
    return decision.action, list(decision.reasons)


@pytest.mark.parametrize(
    ("signs", "action", "reasons"),
    [
        (CLEAN, Action.CONTINUE, []),
        (Signs(), Action.CONTINUE, []),
        (Signs(loss=-1e9), Action.CONTINUE, []),
        (Signs(loss=1e6), Action.CONTINUE, []),
        (BAD_GRADIENT, Action.SKIP, [R.NONFINITE_GRADIENT]),
        (Signs(loss=math.nan), Action.SKIP, [R.NONFINITE_LOSS]),
        (Signs(loss=math.inf), Action.SKIP, [R.NONFINITE_LOSS]),
        (Signs(loss=1.1e6), Action.ROLL_BACK, [R.LOSS_OVER_THRESHOLD]),
        (BAD_WEIGHTS, Action.ROLL_BACK, [R.NONFINITE_WEIGHTS]),
        (
            Signs(math.nan, has_nonfinite_gradient=True, has_nonfinite_weights=True),
            Action.ROLL_BACK,
            [R.NONFINITE_WEIGHTS, R.NONFINITE_GRADIENT, R.NONFINITE_LOSS],
        ),
    ],
)
def test_what_recover_mode_does_about_each_sign(
    signs: Signs, action: Action, reasons: list[Reason]
) -> None:
    assert decide(make_policy(), signs) == (action, reasons)


def test_skips_in_a_row_are_a_bad_state() -> None:
    policy = make_policy(max_consecutive_skips=3)
    assert [decide(policy, BAD_GRADIENT)[0] for _ in range(2)] == [Action.SKIP] * 2
    assert decide(policy, BAD_GRADIENT) == (
        Action.ROLL_BACK,
        [R.NONFINITE_GRADIENT, R.CONSECUTIVE_SKIPS],
    )
    assert decide(policy, BAD_GRADIENT)[0] is Action.SKIP  # the count begins anew


def test_a_clean_update_in_between_ends_the_row() -> None:
    policy = make_policy(max_consecutive_skips=2)
    for signs in (BAD_GRADIENT, CLEAN, BAD_GRADIENT, CLEAN, BAD_GRADIENT):
        assert decide(policy, signs)[0] in (Action.SKIP, Action.CONTINUE)


def test_bad_steps_without_an_update_are_no_skips() -> None:
    policy = make_policy(max_consecutive_skips=2)
    for _ in range(10):
        assert policy.decide(BAD_GRADIENT, lambda: True).action is Action.SKIP


def test_one_rollback_more_than_allowed_in_the_window_aborts() -> None:
    policy = make_policy(max_rollbacks=3, rollback_window=10)
    assert [decide(policy, BAD_WEIGHTS)[0] for _ in range(3)] == [Action.ROLL_BACK] * 3
    assert decide(policy, BAD_WEIGHTS) == (
        Action.ABORT,
        [R.NONFINITE_WEIGHTS, R.TOO_MANY_ROLLBACKS],
    )


@pytest.mark.parametrize(("steps_between", "last"), [(4, Action.ABORT), (5, Action.ROLL_BACK)])
def test_rollbacks_that_were_recovered_from_leave_the_window(
    steps_between: int, last: Action
) -> None:
    """At 1, 1 + n, 1 + 2n: with a window of 9 the first still counts if n is 4, not if it is 5."""
    policy = make_policy(max_rollbacks=2, rollback_window=9)
    for _ in range(2):
        assert decide(policy, BAD_WEIGHTS)[0] is Action.ROLL_BACK
        for _ in range(steps_between - 1):
            decide(policy, CLEAN)
        policy.note_recovery()
    assert decide(policy, BAD_WEIGHTS)[0] is last


def test_no_step_is_retried_for_ever_however_long_a_retry_takes() -> None:
    """With 100 steps between failures never more than two rollbacks fall in a window of 200."""
    policy = make_policy(max_rollbacks=3, rollback_window=200)
    actions = []
    for _ in range(6):
        actions.append(decide(policy, BAD_WEIGHTS)[0])
        for _ in range(99):
            decide(policy, CLEAN)
    assert actions == [Action.ROLL_BACK] * 3 + [Action.ABORT] * 3


def test_without_a_snapshot_there_is_nothing_to_return_to() -> None:
    assert decide(make_policy(), BAD_WEIGHTS, has_snapshot=False) == (
        Action.ABORT,
        [R.NONFINITE_WEIGHTS, R.NO_SNAPSHOT],
    )


def test_no_rollbacks_allowed_means_the_first_aborts() -> None:
    assert decide(make_policy(max_rollbacks=0), BAD_WEIGHTS)[0] is Action.ABORT


def test_skip_mode_never_rolls_back_and_stops_when_skipping_does_not_help() -> None:
    policy = make_policy(mode="skip", max_consecutive_skips=3)
    for signs in (BAD_WEIGHTS, CLEAN, Signs(loss=1e9), BAD_GRADIENT):
        assert decide(policy, signs)[0] in (Action.SKIP, Action.CONTINUE)
    assert decide(policy, BAD_GRADIENT) == (
        Action.ABORT,
        [R.NONFINITE_GRADIENT, R.CONSECUTIVE_SKIPS],
    )


def test_snapshots_are_asked_for_only_when_it_matters() -> None:
    """To look for one costs a read of it."""

    def refuse() -> bool:
        raise AssertionError

    policy = make_policy()
    policy.decide(CLEAN, refuse)
    policy.decide(BAD_GRADIENT, refuse)
