"""The guard between a policy and a robot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0.errors import ConfigError, LimitError
from pi0.policy.limits import ActionLimits, apply_limits

LIMITS = ActionLimits(
    low=(-1.0, None, 0.0), high=(1.0, None, None), step=(0.5, None, 0.1), state=(0, None, None)
)
NAMES = ("joint", "free", "gripper")


def chunk(*rows: tuple[float, float, float]) -> np.ndarray:
    return np.array(rows, np.float64)


def test_within_limits_nothing_changes() -> None:
    actions = chunk((0.1, 9, 0.3), (0.2, -9, 0.35))
    out, violations = apply_limits(LIMITS, actions, np.zeros(3), "error", NAMES)
    assert violations == []
    np.testing.assert_array_equal(out, actions)


def test_each_kind_is_named() -> None:
    actions = chunk((0.7, 0, 0.5), (1.3, 0, 0.5), (1.2, 0, -0.2))
    with pytest.raises(LimitError) as caught:
        apply_limits(LIMITS, actions, np.zeros(3), "error", NAMES)
    message = str(caught.value)
    assert "action joint: expected at most 1, found 1.3 at tick 1 and 1 more" in message
    assert "action joint: expected a change of at most 0.5 a tick, found 0.7 at tick 0" in message
    assert "action gripper: expected at least 0, found -0.2 at tick 2" in message
    assert "No action of this chunk is returned" in message


def test_warn_hands_out_what_came() -> None:
    actions = chunk((5, 0, 0.5))
    out, violations = apply_limits(LIMITS, actions, np.zeros(3), "warn", NAMES)
    np.testing.assert_array_equal(out, actions)
    assert [(v.name, v.kind) for v in violations] == [("joint", "high"), ("joint", "step")]


def test_the_first_step_is_from_the_state() -> None:
    out, _ = apply_limits(LIMITS, chunk((0.9, 0, 0)), np.array([-0.2, 0, 0]), "clamp")
    assert out[0, 0] == pytest.approx(0.3)
    # The gripper's table names no state value: its first action may be anywhere in its range.
    out, violations = apply_limits(LIMITS, chunk((0, 0, 0.9)), np.zeros(3), "error")
    assert (out[0, 2], violations) == (0.9, [])


def test_the_first_step_is_from_the_last_action_too() -> None:
    """A robot lags behind its commands: near its state may be far from the command before."""
    state, last, wanted = np.array([0.1, 0, 0]), np.array([0.7, 0, 0.5]), chunk((0, 0, 0.5))
    with pytest.raises(LimitError, match="action joint: .* at most 0.5 a tick, found 0.7 at tick"):
        apply_limits(LIMITS, wanted, state, "error", NAMES, last)
    out, _ = apply_limits(LIMITS, wanted, state, "clamp", NAMES, last)
    assert out[0, 0] == pytest.approx(0.2)  # within a step of both
    out, _ = apply_limits(LIMITS, wanted, np.array([-0.9, 0, 0]), "clamp", NAMES, last)
    assert out[0, 0] == pytest.approx(0.2)  # nothing is, and commands do not jump


def test_a_range_further_away_than_a_step() -> None:
    for on_limit in ("clamp", "error"):  # which does not recommend to clamp then
        with pytest.raises(LimitError, match="They cannot be clamped: action joint starts further"):
            apply_limits(LIMITS, chunk((0, 0, 0)), np.array([5.0, 0, 0]), on_limit, NAMES)


def test_the_last_action_stands_before_the_first() -> None:
    last = np.array([np.nan, np.nan, 0.5])
    out, violations = apply_limits(LIMITS, chunk((0, 0, 0.9)), np.zeros(3), "clamp", last=last)
    assert out[0, 2] == pytest.approx(0.6)
    assert [violation.kind for violation in violations] == ["step"]


@given(
    arrays(np.float64, (6, 3), elements=st.floats(-10, 10)),
    arrays(np.float64, 3, elements=st.floats(-1, 1)),
)
def test_clamped_actions_are_within_all_limits(actions: np.ndarray, state: np.ndarray) -> None:
    given_actions = actions.copy()
    out, _ = apply_limits(LIMITS, actions, state, "clamp")
    np.testing.assert_array_equal(actions, given_actions)
    np.testing.assert_array_equal(out[:, 1], actions[:, 1])
    assert (np.abs(out[:, 0]) <= 1).all()
    assert (out[:, 2] >= 0).all()
    assert (np.abs(np.diff(out[:, 0], prepend=state[0])) <= 0.5 + 1e-12).all()
    assert (np.abs(np.diff(out[:, 2])) <= 0.1 + 1e-12).all()
    again, violations = apply_limits(LIMITS, out, state, "clamp")
    np.testing.assert_allclose(again, out, atol=1e-12)
    assert all(v.value <= v.limit + 1e-12 for v in violations if v.kind != "low")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": (2.0, None, 0.0)}, "action 0: expected low at most high, found 2.0 and 1.0"),
        ({"step": (0.0, None, None)}, "action 0: expected a step of more than 0, found 0"),
        ({"high": (float("nan"), None, None)}, "action 0: expected finite numbers"),
        ({"high": (1.0,)}, "expected columns of one length"),
        ({"low": 0.0}, "limits: low: expected a tuple of numbers, found 0.0"),
        ({"low": (True, None, None)}, "limits: low: expected a tuple of numbers"),
        ({"low": (np.complex64(0), None, None)}, "limits: low: expected a tuple of numbers"),
        ({"state": (0.5, None, None)}, "limits: state: expected a tuple of numbers"),
    ],
)
def test_limits_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionLimits(**{**vars(LIMITS), **change})


def test_columns_of_numpy_are_kept_as_plain_numbers() -> None:
    columns = np.zeros(2), np.ones(2, np.float32), (None, np.float32(0.5)), np.arange(2)
    limits = ActionLimits(*columns)  # type: ignore[arg-type]
    assert limits == ActionLimits((0.0, 0.0), (1.0, 1.0), (None, 0.5), (0, 1))
    assert json.loads(json.dumps(vars(limits)))["state"] == [0, 1]
