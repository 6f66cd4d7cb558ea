"""The action buffer, tick by tick: what is executed, when a chunk is asked for, what goes wrong."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_policy import ANSWER, observation, policy
from ticks import Ticks

from pi0.errors import ConfigError, EngineError, LimitError, ObservationError
from pi0.policy import ROBOTS, ActionBuffer, ActionLimits, RealTimeChunking, Robot
from pi0.policy.chunking import read_actions

HORIZON = 8


class Counting:
    """The chunk of the n-th call from the observation of tick k is k + 100 n, k + 1 + 100 n, …"""

    def __init__(self) -> None:
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def infer(self, observation: Any, /, **inpainting: Any) -> dict[str, Any]:
        self.calls.append((observation, inpainting))
        n = len(self.calls) - 1
        actions = observation + np.arange(HORIZON) + 100 * n
        return {"actions": actions[:, None].astype(np.float32)}


def run(delay: int, ticks: int, **options: Any) -> tuple[list[float], Counting, ActionBuffer]:
    """The actions of some ticks; tick k's observation is k."""
    robot, background = Counting(), Ticks(delay)
    buffer = ActionBuffer(robot, executor=background, **{"execution_horizon": 4, **options})
    actions = []
    for k in range(ticks):
        actions.append(float(buffer.step(k)[0]))
        background.tick()
    return actions, robot, buffer


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_the_observed_delay_is_skipped(delay: int) -> None:
    """Every action is the one that its chunk has for this very tick."""
    actions, robot, buffer = run(delay, 24)
    assert [int(a) % 100 for a in actions] == list(range(24))
    assert [k for k, _ in robot.calls] == list(range(0, 25 - delay, 4))
    taken = [int(a) // 100 for a in actions]
    assert taken == [max(0, (k - delay) // 4) for k in range(24)]
    assert set(buffer.delays) == {delay}


def test_a_delay_longer_than_the_execution_horizon() -> None:
    """The next chunk starts as soon as the last is there."""
    actions, robot, buffer = run(3, 14, execution_horizon=2)
    assert [int(a) % 100 for a in actions] == list(range(14))
    assert [k for k, _ in robot.calls] == [0, 2, 5, 8, 11]
    assert set(buffer.delays) == {3}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_delays_that_vary(delays: list[int]) -> None:
    robot, background = Counting(), Ticks(1)
    buffer = ActionBuffer(robot, executor=background, execution_horizon=4)
    varying = iter(delays)
    for k in range(4 * len(delays)):
        if k % 4 == 0:
            background.delay = next(varying)
        assert int(buffer.step(k)[0]) % 100 == k
        background.tick()
    assert buffer.held == 0


def test_average_along_a_line() -> None:
    """The chunk of tick 4 is there at tick 5; three actions overlap: 5, 6 and 7."""
    actions, _, _ = run(1, 8, overlap="average")
    assert actions == [0, 1, 2, 3, 4, 5 + 25, 6 + 50, 7 + 75]


@pytest.mark.parametrize("decay", [0.01, 0.5, -0.5])
def test_ensemble_is_acts(decay: float) -> None:
    """Against ACT's formula, written out over all chunks: exp(-decay · i), the oldest first."""
    actions, robot, _ = run(1, 20, overlap="ensemble", decay=decay, execution_horizon=2)
    starts = [k for k, _ in robot.calls]
    for k, action in enumerate(actions):
        covering = [(n, s) for n, s in enumerate(starts) if (s < k or s == 0) and k < s + HORIZON]
        weights = np.exp(-decay * np.arange(len(covering)))
        expected = np.sum(weights * [k + 100 * n for n, _ in covering]) / weights.sum()
        assert action == pytest.approx(expected, rel=1e-6)  # rounded to float32


@pytest.mark.parametrize("decay", [1000.0, -1000.0, float("inf"), float("-inf")])
def test_an_ensemble_of_the_oldest_or_the_newest_alone(decay: float) -> None:
    options = {"overlap": "ensemble", "execution_horizon": 1, "decay": decay}
    actions, _, _ = run(1, 40, **options)
    newest, _, _ = run(1, 40, **{**options, "overlap": "replace"})
    assert actions == newest if decay < 0 else actions[:7] == list(range(7))
    assert np.isfinite(actions).all()


def test_wait_stops_the_time_of_the_robot() -> None:
    actions, robot, buffer = run(10, 20, when_dry="wait")
    assert [int(a) % 100 for a in actions] == list(range(20))
    assert [k for k, _ in robot.calls][:3] == [0, 4, 8]
    assert (buffer.held, set(buffer.delays)) == (0, {4})


def test_hold_repeats_and_then_skips() -> None:
    actions, _, buffer = run(6, 14, when_dry="hold", execution_horizon=6)
    assert actions[:8] == list(range(8))
    assert actions[8:12] == [7, 7, 7, 7]
    assert actions[12:] == [112, 113]
    assert buffer.held == 4


def test_error_when_dry() -> None:
    robot, background = Counting(), Ticks(20)
    buffer = ActionBuffer(robot, executor=background, execution_horizon=4, when_dry="error")
    for k in range(HORIZON):
        buffer.step(k)
        background.tick()
    with pytest.raises(EngineError, match="expected an action for tick 8, found the plan at its e"):
        buffer.step(HORIZON)


def test_a_chunk_that_comes_when_it_is_over() -> None:
    with pytest.raises(EngineError, match="before its 8 actions were over, found it 9 ticks after"):
        run(9, 20, when_dry="hold")


def test_what_a_policy_is_told_to_inpaint() -> None:
    """The rest of the plan from the observation's tick, and the largest delay seen."""
    robot, background = Counting(), Ticks(3)
    buffer = ActionBuffer(robot, executor=background, execution_horizon=4, overlap="inpaint")
    for k in range(14):
        buffer.step(k)
        background.tick()
        background.delay = 2 if k >= 4 else 3
    (_, first), (_, second), (_, third), (_, fourth) = robot.calls
    assert first == {}
    assert second["previous"][:, 0].tolist() == [4, 5, 6, 7]
    assert second["delay"] == 4  # nothing is known of it yet: all that overlaps
    assert third["previous"][:, 0].tolist() == [108, 109, 110, 111]
    assert (third["delay"], fourth["delay"]) == (3, 3)
    assert list(buffer.delays) == [3, 2]


def test_reset_forgets_the_chunk_that_is_computed() -> None:
    robot, background = Counting(), Ticks(3)
    buffer = ActionBuffer(robot, executor=background, execution_horizon=4)
    for k in range(5):
        buffer.step(k)
        background.tick()
    buffer.reset()
    assert buffer.step(50) == [150]
    background.tick()
    assert buffer.step(51) == [151]


def test_an_error_in_the_background_is_raised_once() -> None:
    class Failing(Counting):
        def infer(self, observation: Any, /, **inpainting: Any) -> dict[str, Any]:
            result = super().infer(observation, **inpainting)
            if observation == 4:
                raise ObservationError("camera base: expected an image, found none.")
            return result

    background = Ticks(1)
    buffer = ActionBuffer(Failing(), executor=background, execution_horizon=4)
    seen = []
    for k in range(7):
        try:
            seen.append(int(buffer.step(k)[0]))
        except ObservationError:
            seen.append(-1)
        background.tick()
    assert seen == [0, 1, 2, 3, 4, -1, 6]
    assert int(buffer.step(7)[0]) == 207


def test_a_thread_of_its_own() -> None:
    with ActionBuffer(Counting(), execution_horizon=4) as buffer:
        assert [int(buffer.step(k)[0]) % 100 for k in range(40)] == list(range(40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": "blend"}, "overlap: expected one of replace, ensemble, average, inpaint"),
        ({"when_dry": "stop"}, "when_dry: expected one of wait, hold, error, found 'stop'"),
        ({"execution_horizon": 0}, "execution_horizon: .* ticks, at least 1, found 0"),
        ({"execution_horizon": 2.5}, "execution_horizon: .* ticks, at least 1, found 2.5"),
        ({"execution_horizon": math.nan}, "execution_horizon: .* ticks, at least 1, found nan"),
        ({"execution_horizon": True}, "execution_horizon: .* ticks, at least 1, found True"),
        ({"execution_horizon": "3"}, "execution_horizon: .* ticks, at least 1, found '3'"),
        ({"decay": "x"}, "decay: expected a number, found 'x'"),
        ({"decay": math.nan}, "decay: expected a number, found nan"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ActionBuffer(Counting(), **{"execution_horizon": 4, **options})


def test_a_policy_that_cannot_inpaint() -> None:
    made = policy(ROBOTS["generic"], ANSWER)
    with pytest.raises(ConfigError, match=r"made with real_time=RealTimeChunking\(\)"):
        ActionBuffer(made, execution_horizon=4, overlap="inpaint")
    identity = policy(ROBOTS["generic"], ANSWER, real_time=RealTimeChunking(jacobian="identity"))
    ActionBuffer(identity, execution_horizon=4, overlap="inpaint").close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"actions": np.full((8, 1), np.nan)}, "expected finite values, found NaN or infinite"),
        ({"actions": np.full((8, 1), 1e300)}, "expected finite values"),
        (
            {"actions": np.zeros(8)},
            r"expected numbers \[n, D\], found shape \[8\]",
        ),
        ({"actions": np.zeros((0, 1))}, r"expected numbers \[n, D\]"),
        ({"actions": [["left"]]}, "expected an array of numbers, found"),
        ({"actions": [[0.0], [0.0, 1.0]]}, "expected an array of numbers, found"),
        (
            {"actions": np.ma.masked_array([[0.0]], True)},
            "expected .* found a MaskedArray",
        ),
        ({"actions": np.zeros((8, 1), bool)}, r"expected real numbers, found bool"),
        ({"actions": torch.zeros(8, 1, device="meta")}, "expected an array of numbers, found"),
        ({"actions": torch.zeros(8, 1).to_sparse()}, "expected an .* torch.sparse_coo"),
        ({"actions": bytearray(8)}, "expected an array of numbers, found a bytearray"),
        ({"actions": np.zeros((8, 2))}, "expected 1 values each, as in the chunks before, found 2"),
        ({"action": np.zeros((8, 1))}, "expected an answer that has them, found action"),
        ([], r"expected an answer that has them, found \[\]"),
    ],
)
@pytest.mark.parametrize("overlap", ["replace", "ensemble"])
def test_what_is_no_chunk_is_not_executed(answer: Any, message: str, overlap: str) -> None:
    """As a server of others may send it, or one with another checkpoint than before."""

    class Broken(Counting):
        def infer(self, observation: Any, /, **inpainting: Any) -> dict[str, Any]:
            result = super().infer(observation, **inpainting)
            return answer if observation == 4 else result

    background = Ticks(1)
    buffer = ActionBuffer(Broken(), executor=background, execution_horizon=4, overlap=overlap)
    for k in range(5):
        assert buffer.step(k) == [k]
        background.tick()
    with pytest.raises(EngineError, match=f"actions: {message}"):
        buffer.step(5)
    assert buffer.step(6) == [6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_chunks_may_be_tensors(dtype: torch.dtype) -> None:
    actions = torch.ones(8, 1, dtype=dtype, requires_grad=dtype.is_floating_point)
    np.testing.assert_array_equal(read_actions({"actions": actions}), np.ones((8, 1)))


def test_a_client_of_a_server_that_cannot_inpaint() -> None:
    client = Counting()
    client.real_time = None
    with pytest.raises(
        ConfigError, match="or a server started with --real-time, found one without"
    ):
        ActionBuffer(client, execution_horizon=4, overlap="inpaint")


def test_reset_begins_an_episode_of_the_policy() -> None:
    client = Counting()
    resets = []
    client.reset = lambda: resets.append(len(client.calls))
    buffer = ActionBuffer(client, executor=Ticks(1), execution_horizon=4)
    buffer.step(0)
    buffer.reset()
    assert resets == [1]


def test_the_executor_of_several_robots_outlives_one() -> None:
    with ThreadPoolExecutor(1) as shared:
        one, other = (
            ActionBuffer(Counting(), executor=shared, execution_horizon=4) for _ in range(2)
        )
        with one:
            one.step(0)
        assert other.step(0) == [0]


def test_a_chunk_that_stands_in_line_is_not_computed_after_a_reset() -> None:
    """Else a server would be told with it, and not with the new episode's, that one begins."""
    with ThreadPoolExecutor(1) as shared:
        robot, others = Counting(), threading.Event()
        buffer = ActionBuffer(robot, executor=shared, execution_horizon=1)
        buffer.step(0)
        shared.submit(others.wait, 20)
        buffer.step(1)
        buffer.reset()
        others.set()
        buffer.step(50)
    assert [call[0] for call in robot.calls] == [0, 50]


def test_more_ticks_than_a_chunk_has_actions() -> None:
    buffer = ActionBuffer(Counting(), executor=Ticks(1), execution_horizon=HORIZON + 1)
    with pytest.raises(
        ConfigError, match=f"expected at most the {HORIZON} actions of a chunk, found"
    ):
        buffer.step(0)


def test_a_closed_buffer_has_no_actions() -> None:
    with ThreadPoolExecutor(1) as shared:
        for executor in (None, shared):
            with ActionBuffer(Counting(), executor=executor, execution_horizon=4) as buffer:
                buffer.step(0)
            with pytest.raises(EngineError, match="expected an open buffer, found it closed"):
                buffer.step(1)


def limited(step: float) -> Robot:
    table = ROBOTS["libero"]
    columns = ((None,) * 7, (None,) * 7, (step,) + (None,) * 6, (None,) * 7)
    return Robot(**{**vars(table), "limits": ActionLimits(*columns)})


def border(on_limit: str) -> list[float]:
    """Chunks that are flat, the second one unit above the first, with steps of at most 0.25."""
    made = policy(limited(0.25), ANSWER * 0, on_limit=on_limit)
    background = Ticks(1)
    buffer = ActionBuffer(made, executor=background, execution_horizon=4)
    actions = []
    for k in range(12):
        actions.append(float(buffer.step(observation("libero"))[0]))
        if k == 3:
            made.engine.answer = ANSWER * 0 + 1
        background.tick()
    return [action - actions[0] for action in actions]


def test_limits_hold_at_the_border_of_chunks() -> None:
    assert border("warn") == pytest.approx([0] * 5 + [1] * 7, abs=1e-5)
    assert border("clamp") == pytest.approx([0] * 5 + [0.25, 0.5, 0.75] + [1] * 4, abs=1e-5)
    with pytest.raises(LimitError, match="a change of at most 0.25 a tick"):
        border("error")


@pytest.mark.parametrize(
    ("on_limit", "done"), [("warn", "returned as it is"), ("clamp", "clamped")]
)
def test_jumps_at_the_border_of_chunks_are_reported_once(
    on_limit: str, done: str, caplog: pytest.LogCaptureFixture
) -> None:
    border(on_limit)
    (message,) = [m for m in caplog.messages if m.startswith("action buffer: ")]
    assert message == (
        "action buffer: action x: expected a change of at most 0.25 a tick, found 1 at tick 5; "
        f"{done}."
    )


def test_an_action_at_its_limit_is_within_it() -> None:
    """In float32, in which a buffer sees it, it is not the same number."""
    columns = ((0,) * 7, (0.1,) * 7, (None,) * 7, (None,) * 7)
    clipped = {"encode_actions": lambda x: x, "decode_actions": lambda x: x.clip(0, 0.1)}
    table = {**vars(limited(1)), "limits": ActionLimits(*columns), "delta": (), **clipped}
    made = policy(Robot(**table), ANSWER * 0 + 9, on_limit="error")
    with ActionBuffer(made, execution_horizon=4) as buffer:
        np.testing.assert_allclose(buffer.step(observation("libero")), 0.1)
