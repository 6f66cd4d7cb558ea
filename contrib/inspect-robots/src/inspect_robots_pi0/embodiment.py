"""A Gymnasium environment as an embodiment of inspect-robots."""

from __future__ import annotations

from typing import Any

import numpy as np
from inspect_robots import (
    Action,
    Box,
    CameraSpec,
    EmbodimentBase,
    EmbodimentInfo,
    Observation,
    ObservationSpace,
    Scene,
    StateField,
    StateSpec,
    StepResult,
)
from inspect_robots.embodiment import AUTO_RESET, PRIVILEGED_SUCCESS, RESETTABLE, SEEDABLE

from inspect_robots_pi0.semantics import semantics_of
from pi0.eval.environment import Environment, Moment, find
from pi0.eval.plan import DEFAULT_ENV, EnvOptions
from pi0.policy.robots import ROBOTS


class GymnasiumEmbodiment(EmbodimentBase):
    """Any environment that `pi0 eval` takes. Cameras and states have the keys of its observations.

    Args:
        env: as `gymnasium.make` takes it.
        max_steps: of an episode; None: as registered.
        prompt: the sentence of every episode; None: the environment's, else the scene's.
        on_limit: "error", "clamp" or "warn", for actions beyond the action space.
        control_mode: what actions mean, in inspect-robots' words; None: known for the tabletop.

    Raises:
        Pi0Error: see `pi0.eval.environment.Environment`.
    """

    def __init__(
        self,
        env: str = DEFAULT_ENV,
        max_steps: int | None = None,
        prompt: str | None = None,
        on_limit: str = "error",
        control_mode: str | None = None,
    ) -> None:
        self._env = Environment(EnvOptions(env, max_steps, prompt))
        self._on_limit = on_limit
        robot = ROBOTS.get(self._env.robot or "")
        self._names = robot.action_names if robot else ()
        boxes = {key: box for key, box in self._env.spaces.items() if box.shape is not None}
        self._cameras = {key: box.shape for key, box in boxes.items() if len(box.shape) == 3}
        self._state = {key: box.shape for key, box in boxes.items() if len(box.shape) == 1}
        self._instruction: str | None = None
        self.info = self._describe(control_mode)

    def reset(self, scene: Scene, *, seed: int | None = None) -> Observation:
        """Begins an episode; a scene's metadata may hold `task` and `env_seed`."""
        seed = scene.metadata.get("env_seed", seed)
        moment = self._env.reset(seed, scene.metadata.get("task"))
        self._instruction = scene.instruction
        return self._observe(moment)

    def step(self, action: Action) -> StepResult:
        """Executes an action [D].

        Raises:
            LimitError: it is beyond the action space, and `on_limit` is "error".
            Pi0Error: see `Environment.step`.
        """
        values = np.asarray(action.data, np.float64).reshape(1, -1)
        (values,), _ = self._env.within(values, self._on_limit, self._names)
        moment = self._env.step(values)
        info: dict[str, Any] = {"success": moment.success}
        if moment.wrong is not None:
            info["wrong"] = moment.wrong
        return StepResult(
            self._observe(moment),
            terminated=bool(moment.success),
            termination_reason="success" if moment.success else None,
            truncated=moment.over and not moment.success,
            info=info,
        )

    def close(self) -> None:
        """Releases the environment."""
        self._env.close()

    def _observe(self, moment: Moment) -> Observation:
        seen = {key: find(moment.observation, key, {}) for key in (*self._cameras, *self._state)}
        return Observation(
            images={key: np.asarray(seen[key]) for key in self._cameras},
            state={key: np.asarray(seen[key]) for key in self._state},
            instruction=moment.prompt or self._instruction,
        )

    def _describe(self, control_mode: str | None) -> EmbodimentInfo:
        limits = self._env.limits
        low, high = (
            np.array([np.nan if v is None else v for v in bound])
            for bound in (limits.low, limits.high)
        )
        bounded = bool(np.isfinite(low).all() and np.isfinite(high).all())
        fields = tuple(StateField(key, shape) for key, shape in self._state.items())
        return EmbodimentInfo(
            name=self._env.id,
            action_space=Box(
                low.shape,
                low if bounded else None,
                high if bounded else None,
                semantics_of(self._env.robot, self._names, control_mode),
            ),
            observation_space=ObservationSpace(
                tuple(CameraSpec(key, *shape) for key, shape in self._cameras.items()),
                state=StateSpec(fields),
            ),
            control_hz=self._env.fps,
            is_simulated=True,
            capabilities=frozenset({SEEDABLE, RESETTABLE, AUTO_RESET, PRIVILEGED_SUCCESS}),
            environment_id=self._env.id,
        )
