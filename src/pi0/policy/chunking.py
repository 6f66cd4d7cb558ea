"""A robot's loop that does not wait: a chunk is executed while the next one is computed.

Time is counted in ticks, calls of `ActionBuffer.step`. A chunk computed from the observation of
tick k has its first action for tick k; when its result is there at tick k + d, the delay d is a
fact, and its actions from the d-th on are used. Nothing here looks at a clock.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pi0.closing import Closing
from pi0.errors import ConfigError, EngineError, ObservationError
from pi0.inputs import to_float64
from pi0.number import is_real, is_whole
from pi0.policy.limits import ActionLimits, apply_limits, summary
from pi0.policy.observation import Observation
from pi0.policy.policy import Policy

logger = logging.getLogger("pi0")
OVERLAPS = ("replace", "ensemble", "average", "inpaint")
WHEN_DRY = ("wait", "hold", "error")
DELAYS_KEPT = 10

Floats = NDArray[np.float64]


class ChunkPolicy(Protocol):
    """What computes chunks: a `Policy`, or a client of one elsewhere. `infer` returns "actions"
    [horizon, D] in the robot's units; to inpaint it takes `previous` and `delay`, too. Where
    `real_time` is there and None, it cannot. `reset`, where it is there, begins an episode."""

    def infer(self, observation: Observation, /, **inpainting: Any) -> Mapping[str, Any]: ...


def read_actions(answer: Any) -> Floats:
    """The actions [n, D] of what `infer` returned, whoever computed it.

    Raises:
        EngineError: they are none that a robot can execute.
    """
    if not isinstance(answer, Mapping) or "actions" not in answer:
        found = ", ".join(map(str, answer)) if isinstance(answer, Mapping) else f"{answer!r:.80}"
        raise EngineError(f"actions: expected an answer that has them, found {found or 'nothing'}.")
    try:
        actions = to_float64("actions", answer["actions"])
    except ObservationError as error:
        raise EngineError(str(error)) from error
    if actions.ndim != 2 or not actions.size:
        raise EngineError(f"actions: expected numbers [n, D], found shape {list(actions.shape)}.")
    if not (np.abs(actions) <= np.finfo(np.float32).max).all():
        raise EngineError("actions: expected finite values, found NaN or infinite ones.")
    return actions


@dataclass(frozen=True)
class Plan:
    """What is to be executed from a tick on.

    Attributes:
        start: the tick of the first action.
        actions: [n, D], in the robot's units.
        weight: [n], of the chunks that an ensemble has averaged for a tick: the sum of their
            weights, that of the newest being 1.
    """

    start: int
    actions: Floats
    weight: Floats

    @classmethod
    def of_chunk(cls, start: int, actions: Floats) -> Plan:
        """One chunk alone."""
        return cls(start, actions, np.ones(len(actions)))

    def from_tick(self, tick: int) -> Plan:
        """Without what is before a tick."""
        past = max(0, tick - self.start)
        return Plan(self.start + past, self.actions[past:], self.weight[past:])


def merge(old: Plan, new: Plan, overlap: str, decay: float) -> Plan:
    """A new chunk after an old plan, both from the same tick on.

    - "replace", "inpaint": the new chunk.
    - "average": from the old to the new along a line; of n overlapping actions the j-th is
      new · (j+1)/(n+1) + old · (n-j)/(n+1).
    - "ensemble": the mean of all chunks with weights exp(-decay · i), i = 0 being the oldest (ACT,
      arXiv 2304.13705, section IV-B and its `imitate_episodes.py`, which has decay 0.01).
    """
    n = min(len(old.actions), len(new.actions))
    share, weight = np.ones(n), new.weight.copy()
    if overlap == "average":
        share = np.arange(1, n + 1) / (n + 1)
    elif overlap == "ensemble":
        with np.errstate(over="ignore"):  # beside infinite weights the newest has no share
            weight[:n] += old.weight[:n] * np.exp(decay)
        share = 1 / weight[:n]
    actions = new.actions.copy()
    actions[:n] = old.actions[:n] + share[:, None] * (new.actions[:n] - old.actions[:n])
    return Plan(new.start, actions, weight)


class ActionBuffer(Closing):
    """Hands out one action per tick, and has the next chunk computed in the background meanwhile.

    One robot's loop at a time. The first chunk of an episode is waited for.

    Attributes:
        delays: how many ticks passed between observation and result, of the last few chunks that
            the robot did not stand still for. With "inpaint" the largest is what the next chunk is
            told (the paper's algorithm 1); before there is one, that all of the overlap will be
            executed.
        held: how many ticks repeated an action because the plan had run dry.
    """

    def __init__(
        self,
        policy: ChunkPolicy | Policy,
        *,
        execution_horizon: int,
        overlap: str = "replace",
        when_dry: str = "wait",
        decay: float = 0.01,
        executor: Executor | None = None,
    ) -> None:
        """
        Args:
            policy: computes chunks. The actions handed out obey its robot's limits at the borders
                of chunks as well, as its `on_limit` says: a `Policy`'s, or those that a server's
                greeting states.
            execution_horizon: ticks from the observation of one chunk to that of the next, s in
                arXiv 2506.07339; more if computing takes longer.
            overlap: how a new chunk and the rest of the old plan become one; see `merge`.
                "inpaint": the policy makes the new chunk continue the old one (`real_time`).
            when_dry: what `step` does if the plan has no action for this tick: "wait" for the
                chunk (the robot's time stands still), "hold": repeat the last action, which keeps a
                robot in its place only where actions are positions, or "error".
            decay: of an ensemble's weights; larger: old chunks count more, below 0: new ones.
            executor: where `policy.infer` runs, which `close` leaves open; None: a thread of its
                own.

        Raises:
            ConfigError: a setting that does not exist, or a policy that cannot inpaint.
        """
        for name, value, allowed in (
            ("overlap", overlap, OVERLAPS),
            ("when_dry", when_dry, WHEN_DRY),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}.")
        if not is_whole(execution_horizon) or execution_horizon < 1:
            raise ConfigError(
                "execution_horizon: expected a whole number of ticks, at least 1, found "
                f"{execution_horizon!r}."
            )
        if not is_real(decay) or math.isnan(decay):
            raise ConfigError(f"decay: expected a number, found {decay!r}.")
        if overlap == "inpaint" and getattr(policy, "real_time", True) is None:
            raise ConfigError(
                "overlap inpaint: expected a policy made with real_time=RealTimeChunking(), or a "
                "server started with --real-time, found one without."
            )
        self.policy = policy
        self.execution_horizon = execution_horizon
        self.overlap, self.when_dry, self.decay = overlap, when_dry, decay
        self.delays: deque[int] = deque(maxlen=DELAYS_KEPT)
        self.held = 0
        self._own = executor is None
        self._executor = executor or ThreadPoolExecutor(1, "pi0-chunks")
        self._open = True
        self._pending: tuple[int, Future[Mapping[str, Any]]] | None = None
        self._forget()

    def reset(self) -> None:
        """Forgets the plan, and the chunk that is being computed: a new episode begins, for the
        policy, too."""
        self._forget()
        getattr(self.policy, "reset", lambda: None)()

    def _forget(self) -> None:
        if self._pending:
            self._pending[1].cancel()  # which may still stand behind other robots' chunks
        self._tick = 0
        self._observed = 0  # the tick of the newest chunk's observation
        self._plan: Plan | None = None
        self._last: Floats | None = None
        self._reported = False  # whether a jump was, since the last chunk came
        self._pending = None

    def step(self, observation: Observation) -> NDArray[np.float32]:
        """The action [D] for this tick, in the robot's units.

        Args:
            observation: of this tick; it is not read unless the next chunk begins with it, and then
                from another thread: do not change it afterwards.

        Raises:
            EngineError: the plan has run dry and `when_dry` is "error", a chunk took longer to
                compute than it lasts, or the buffer is closed.
            ConfigError: chunks have fewer actions than `execution_horizon`.
            Pi0Error: what `policy.infer` raised in the background, at the first tick after. The
                next call begins anew with its observation.
        """
        if not self._open:
            raise EngineError("action buffer: expected an open buffer, found it closed.")
        try:
            return self._next(observation).astype(np.float32)
        finally:
            self._tick += 1  # the tick has passed, with an action or without

    def close(self) -> None:
        """Waits for the chunk that is being computed, and ends the thread, if it is its own. There
        are no actions afterwards."""
        self._open = False
        self._forget()
        if self._own:
            self._executor.shutdown()

    def _next(self, observation: Observation) -> Floats:
        waits = self._last is None or self.when_dry == "wait"
        if self._pending and (self._pending[1].done() or (waits and not len(self._rest()))):
            self._take_in()
        rest = self._rest()
        due = self._tick - self._observed >= self.execution_horizon
        if self._pending is None and (due or not len(rest)):
            self._start(observation, rest)
            rest = self._rest()
        if not len(rest):
            if self._last is not None and not waits:
                return self._run_dry(self._last)
            self._take_in()
            rest = self._rest()
        self._last = self._within_limits(rest[0])
        return self._last

    def _rest(self) -> Floats:
        """The plan from this tick on, [n, D]; n is 0 if it has run dry."""
        if self._plan is None:
            return np.empty((0, 0))
        self._plan = self._plan.from_tick(self._tick)
        return self._plan.actions

    def _start(self, observation: Observation, rest: Floats) -> None:
        inpainting: dict[str, Any] = {}
        if self.overlap == "inpaint" and len(rest):
            expected = max(self.delays, default=len(rest))
            inpainting = {"previous": rest.astype(np.float32), "delay": min(expected, len(rest))}
        infer = partial(self.policy.infer, observation, **inpainting)
        future = self._executor.submit(infer)
        self._pending = self._tick, future
        if future.done():  # before this tick was over
            self._take_in()

    def _take_in(self) -> None:
        """Makes the pending chunk part of the plan; waits for it if need be."""
        assert self._pending is not None
        start, future = self._pending
        self._pending = None
        actions = read_actions(future.result())
        if self._last is not None and actions.shape[1] != len(self._last):
            raise EngineError(
                f"actions: expected {len(self._last)} values each, as in the chunks before, found "
                f"{actions.shape[1]}. Call reset() if another policy goes on."
            )
        if self.execution_horizon > len(actions):
            raise ConfigError(
                f"execution_horizon: expected at most the {len(actions)} actions of a chunk, found "
                f"{self.execution_horizon}."
            )
        delay = self._tick - start
        if delay >= len(actions):
            raise EngineError(
                f"delay: expected a chunk before its {len(actions)} actions were over, found it "
                f"{delay} ticks after its observation. The policy is too slow for this rate: see "
                "`pi0 bench`."
            )
        new = Plan.of_chunk(start, actions).from_tick(self._tick)
        if self._plan is not None:
            self.delays.append(delay)
            new = merge(self._plan.from_tick(self._tick), new, self.overlap, self.decay)
        self._plan, self._observed, self._reported = new, start, False

    def _run_dry(self, last: Floats) -> Floats:
        if self.when_dry == "error":
            raise EngineError(
                f"action buffer: expected an action for tick {self._tick}, found the plan at its "
                "end and the next chunk still being computed. Start it earlier (a smaller "
                'execution_horizon), or choose when_dry="hold" or "wait".'
            )
        self.held += 1
        return last

    def _within_limits(self, action: Floats) -> Floats:
        """The action as the robot may execute it after the last one: a chunk's own limits were
        applied without knowing what would be executed before it."""
        policy: Any = self.policy
        robot = policy.robot if isinstance(policy, Policy) else policy
        limits: ActionLimits | None = getattr(robot, "limits", None)
        if limits is None:
            return action
        names, how = robot.action_names, policy.on_limit
        guarded, found = apply_limits(limits, action[None], None, how, names, self._last)
        jumps = [replace(one, ticks=[self._tick]) for one in found if one.kind == "step"]
        if jumps and not self._reported:
            self._reported = True
            done = "clamped" if how == "clamp" else "returned as it is"
            logger.warning("action buffer: %s; %s.", summary(jumps), done)
        executed: Floats = guarded[0]
        return executed
